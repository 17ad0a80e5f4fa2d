"""Which experts each token takes, and with what weight: the published routers, in NumPy.

Every one of them is the same five steps, so one :class:`Router` with seven settings is all of them:

1. a score for each expert, ``softmax`` over the experts or an independent ``sigmoid``;
2. a bias added for the choice only (DeepSeek-V3's ``e_score_correction_bias``);
3. only the experts of the best groups stay eligible (DeepSeek: fewer devices per token);
4. the ``top_k`` best experts are chosen, and weigh as much as their score without the bias;
5. the weights are divided by their sum, or not, and multiplied by a constant.

All arithmetic is float32, whatever the dtype of the logits, as in the published code. Logits on a GPU are routed there,
by one kernel.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import NMSparseError
from ..formats.checks import DTYPES, is_on_gpu
from ..ops import _cuda, takes_tensors
from .configs import settings_of

SCORINGS = ("softmax", "sigmoid")
GROUP_SCORES = ("max", "top2")

# Added to the sum before dividing, as DeepSeek-V3 does: sigmoid scores may all underflow to 0. It changes no bit of a
# sum above 2e-13, hence nothing in the softmax routers, which divide by the bare sum.
_TINY = np.float32(1e-20)


@dataclass(frozen=True)
class Router:
    """The settings of a router; called with logits it routes.

    ``top_k`` experts per token; ``scoring`` is ``"softmax"`` or ``"sigmoid"``; ``renormalize`` divides the chosen
    weights by their sum; the experts form ``num_groups`` equal groups of neighbours, of which the ``topk_groups`` best
    are eligible, a group being worth its best expert (``group_score="max"``) or its two best together (``"top2"``);
    ``scale`` multiplies the weights in the end. Raises NMSparseError for settings that contradict each other.

    >>> Router(top_k=2, renormalize=True)(np.array([[0.0, 2.0, 1.0]], np.float32))[0]
    array([[1, 2]], dtype=int32)
    """

    top_k: int
    scoring: str = "softmax"
    renormalize: bool = False
    num_groups: int = 1
    topk_groups: int = 1
    group_score: str = "max"
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("top_k", "num_groups", "topk_groups"):
            object.__setattr__(self, name, _positive(name, getattr(self, name)))
        for name, known in (("scoring", SCORINGS), ("group_score", GROUP_SCORES)):
            if getattr(self, name) not in known:
                raise NMSparseError(f"{name}: expected one of {', '.join(known)}; got {getattr(self, name)!r}")
        if self.topk_groups > self.num_groups:
            raise NMSparseError(
                f"topk_groups: expected at most num_groups = {self.num_groups}, got {self.topk_groups}; "
                "no more groups can be kept than there are"
            )
        object.__setattr__(self, "renormalize", bool(self.renormalize))
        object.__setattr__(self, "scale", _scale(self.scale))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Router:
        """The router of a Hugging Face ``config.json``, parsed.

        Knows the ``model_type`` of Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-V2 and DeepSeek-V3. A missing
        optional field takes the default of ``transformers``. Raises NMSparseError for another model, for a missing
        ``num_experts_per_tok``, and for settings on which the published implementations disagree.

        >>> Router.from_config({"model_type": "olmoe", "num_experts_per_tok": 8, "norm_topk_prob": False}).renormalize
        False
        """
        router = cls(**settings_of(config))
        for name in ("num_local_experts", "num_experts", "n_routed_experts"):
            if config.get(name) is not None:
                router.check(_positive(name, config[name]))
        return router

    def check(self, num_experts: int) -> None:
        """Raise NMSparseError unless these settings can route among ``num_experts`` experts.

        >>> Router(top_k=4).check(2)
        Traceback (most recent call last):
        ...
        nmsparse.errors.NMSparseError: top_k: expected at most the number of experts, 2; got 4
        """
        if self.top_k > num_experts:
            raise NMSparseError(f"top_k: expected at most the number of experts, {num_experts}; got {self.top_k}")
        group_size, left_over = divmod(num_experts, self.num_groups)
        if left_over:
            raise NMSparseError(
                f"num_groups: expected a divisor of the number of experts, {num_experts}; got {self.num_groups}"
            )
        if self.top_k > self.topk_groups * group_size:
            # The published code would go on and take experts of dropped groups.
            raise NMSparseError(
                f"top_k: expected at most the {self.topk_groups * group_size} experts of the kept groups "
                f"({self.topk_groups} of {self.num_groups} groups of {group_size}), got {self.top_k}; keep more groups"
            )
        if self._limits_groups and self.group_score == "top2" and group_size < 2:
            raise NMSparseError(
                f"group_score='top2': expected groups of two experts or more, got {self.num_groups} groups of "
                f"{group_size}; use fewer groups or group_score='max'"
            )

    @property
    def _limits_groups(self) -> bool:
        return self.topk_groups < self.num_groups

    @takes_tensors
    def __call__(self, logits: np.ndarray, bias: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The experts of each token and their weights, as :func:`route` returns them.

        >>> ids, weights = Router(top_k=1, scoring="sigmoid")(np.zeros((1, 2), np.float32), bias=[0.0, 0.1])
        >>> ids.item(), weights.item()
        (1, 0.5)
        """
        if is_on_gpu(logits):
            routing = _cuda("routing")
            return routing.route(logits, routing.logits_of(logits, self, bias))
        logits = finite_float32("logits", logits, ("tokens", "experts"))
        num_experts = logits.shape[1]
        self.check(num_experts)

        scores = _softmax(logits) if self.scoring == "softmax" else sigmoid(logits)
        choice = scores if bias is None else scores + finite_float32("bias", bias, (num_experts,))
        if self._limits_groups:
            choice = self._drop_groups(choice)
        ids = _best(choice, self.top_k)
        weights = np.take_along_axis(scores, ids, axis=1)
        if bias is not None:  # the best choice need not have the largest weight
            order = np.lexsort((ids, -weights))
            ids, weights = np.take_along_axis(ids, order, axis=1), np.take_along_axis(weights, order, axis=1)
        if self.renormalize:
            weights = weights / (weights.sum(axis=1, keepdims=True) + _TINY)
        return ids, weights * np.float32(self.scale)

    def _drop_groups(self, choice: np.ndarray) -> np.ndarray:
        """``choice`` with -inf for the experts outside the ``topk_groups`` best groups of each token."""
        groups = choice.reshape(len(choice), self.num_groups, choice.shape[1] // self.num_groups)
        if self.group_score == "max":
            worth = groups.max(axis=2)
        else:  # float64, so that two biases of -3e38 (an expert ruled out) do not overflow
            worth = np.partition(groups, -2, axis=2)[:, :, -2:].sum(axis=2, dtype=np.float64)
        kept = np.zeros(worth.shape, bool)
        np.put_along_axis(kept, _best(worth, self.topk_groups), True, axis=1)
        # Not 0, with which older code masks: a kept expert with a negative bias would lose to the dropped ones.
        return np.where(kept[:, :, None], groups, np.float32(-np.inf)).reshape(choice.shape)


def route(
    logits: np.ndarray,
    top_k: int,
    *,
    scoring: str = "softmax",
    renormalize: bool = False,
    bias: np.ndarray | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "max",
    scale: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Choose ``top_k`` of E experts for each of T tokens.

    ``logits`` (T, E) are float16, bfloat16, float32 or float64 and are taken as float32; ``bias`` (E,) is added to the
    scores for the choice only. The other settings are those of :class:`Router`. Returns ``ids`` (T, top_k) int32 and
    ``weights`` (T, top_k) float32, each row by descending weight, equal weights by ascending expert; a tie for the last
    place goes to the lower expert. T may be 0.

    Raises NMSparseError for NaN or inf, for a wrong shape or dtype, and for settings that do not fit E.

    Logits on a GPU (of torch, cupy or DLPack; not float64) are routed there, by one launch on their stream that a CUDA
    graph may hold; ``bias`` is float32 on the same device, and the results are arrays of the same library. The weights
    then agree to a few ulp, so that scores as close as that may change places. Nobody looks at the values, which would
    mean to wait: a token with a NaN among its logits gets weights of NaN and some experts. Up to 512 experts, 32
    choices and 32 groups.

    Mixtral (arXiv:2401.04088) is ``renormalize=True``; Qwen2-MoE, Qwen3-MoE and OLMoE leave that to the checkpoint.
    DeepSeek-V2 (arXiv:2405.04434) adds groups and a scale; DeepSeek-V3 (arXiv:2412.19437) is
    ``scoring="sigmoid", group_score="top2"`` with a bias.

    >>> ids, weights = route(np.log(np.array([[1.0, 4.0, 2.0, 1.0]])), 2, renormalize=True)
    >>> ids, weights.round(3)
    (array([[1, 2]], dtype=int32), array([[0.667, 0.333]], dtype=float32))

    With two groups of which one is kept, experts 0 and 1 win together although expert 3 is the second best:

    >>> route(np.array([[5.0, 1.0, 0.0, 4.0]], np.float32), 2, num_groups=2)[0]
    array([[0, 1]], dtype=int32)
    """
    router = Router(top_k, scoring, renormalize, num_groups, topk_groups, group_score, scale)
    return router(logits, bias)


def _best(scores: np.ndarray, k: int) -> np.ndarray:
    """Columns of the k largest scores of each row, best first, ties to the lower column. Needs k scores above -inf."""
    scores, rows = scores.copy(), np.arange(len(scores))
    columns = np.empty((len(scores), k), np.int32)
    for j in range(k):  # argmax returns the first maximum; k passes are cheaper than a stable sort for the k of an MoE
        columns[:, j] = scores.argmax(axis=1)
        scores[rows, columns[:, j]] = -np.inf
    return columns


def _softmax(logits: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # 3e38 - -3e38: the exponential of -inf is the right 0
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    power = np.exp(-np.abs(logits))  # in (0, 1]: no overflow
    return np.where(logits >= 0, 1, power) / (1 + power)


def finite_float32(name: str, values: np.ndarray, shape: tuple[int | str, ...]) -> np.ndarray:
    """``values`` as float32, all finite and of ``shape``, in which a name stands for any size."""
    values = np.asarray(values)
    if values.dtype not in DTYPES:
        names = ", ".join(dtype.name for dtype in DTYPES)
        raise NMSparseError(f"{name}: expected {names}; got {values.dtype}; convert with .astype(numpy.float32)")
    sizes = [want if isinstance(want, int) else got for want, got in zip(shape, values.shape, strict=False)]
    if values.ndim != len(shape) or values.shape != tuple(sizes):
        raise NMSparseError(f"{name}: expected shape {str(shape).replace(chr(39), '')}, got {values.shape}")
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, and is refused
        values = values.astype(np.float32, copy=False)
    bad = ~np.isfinite(values)
    if bad.any():
        where = tuple(map(int, np.argwhere(bad)[0]))
        raise NMSparseError(
            f"{name}: expected finite float32 values, got {np.count_nonzero(bad)} NaN or inf, the first at {where}; "
            "look for an overflow in what computed them"
        )
    return values


def _positive(name: str, value: Any) -> int:
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise NMSparseError(f"{name}: expected an integer of 1 or more, got {value!r}")
    return number


def _scale(value: Any) -> float:
    try:
        scale = float(value)
    except (TypeError, ValueError):
        scale = math.nan
    if not 0 < scale < float(np.finfo(np.float32).max):
        raise NMSparseError(f"scale: expected a positive finite float32 number, got {value!r}")
    return scale
