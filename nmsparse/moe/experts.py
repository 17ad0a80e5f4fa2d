"""The experts of a Mixture-of-Experts layer: weights sparse by pruning, activations sparse by routing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import reference
from ..errors import NMSparseError
from ..formats import MixedExperts, Pattern, RaggedTokens, SparseArray, stack_experts
from ..formats.checks import as_weight, is_on_gpu
from ..formats.mixed import DENSE, DROP, kind_of
from ..ops import _cuda, array, as_activation, takes_tensors
from .router import Router

Weights = SparseArray | MixedExperts | np.ndarray | Sequence[SparseArray | np.ndarray | None]


class SparseExperts:
    """E feed-forward networks of one shape, each applied to the tokens that are routed to it.

    ``gate_up`` (E, 2I, H) holds the gate rows, then the up rows; expert e computes ``down[e] (act(gate x) * up x)``.
    With ``gate_up`` (E, I, H) there is no gate: ``down[e] act(gate_up[e] x)``. ``down`` is (E, H, I). Both are sparse
    arrays or dense ndarrays, of one dtype. ``activation`` is a key of ``nmsparse.reference.ACTIVATIONS``.

    Experts may differ in pattern: either weight may be :class:`~nmsparse.formats.MixedExperts`, or a list with the
    weight of each expert, None for one that is dropped (it then gives zeros, as if no token took it).

    Weights on a GPU, sparse arrays or dense ones of torch, cupy or DLPack, float16 or bfloat16, serve calls there
    (:mod:`nmsparse.cuda.experts`): four launches (two, and two for each pattern, where experts differ), no waiting, any
    routing in a CUDA graph. There an expert's ``gate_up`` and ``down`` have to be grouped alike.

    Raises NMSparseError for weights that do not fit each other and for an unknown activation.

    >>> rng = np.random.default_rng(0)
    >>> gate_up, down = rng.standard_normal((4, 64, 32), np.float32), rng.standard_normal((4, 32, 32), np.float32)
    >>> experts = SparseExperts.from_dense(gate_up, down, "2:4")
    >>> experts
    SparseExperts(4 experts, hidden 32, intermediate 32, gated silu, 2:4, float32, 26112 bytes)
    >>> y = experts(np.ones((3, 32), np.float32), topk_ids=[[0, 1], [3, 0], [2, 3]], topk_weights=[[0.5, 0.5]] * 3)
    >>> y.shape, y.dtype.name
    ((3, 32), 'float32')
    """

    def __init__(self, gate_up: Weights, down: Weights, activation: str = "silu"):
        self.gate_up, self.down = _expert_weights("gate_up", gate_up), _expert_weights("down", down)
        num_experts, rows, hidden = self.gate_up.shape
        if self.down.shape[:2] != (num_experts, hidden) or rows not in (self.down.shape[2], 2 * self.down.shape[2]):
            raise NMSparseError(
                f"expected gate_up (E, 2I, H), or (E, I, H) without a gate, and down (E, H, I); got "
                f"{self.gate_up.shape} and {self.down.shape}; stack experts on axis 0, gate before up on axis 1"
            )
        if self.gate_up.dtype != self.down.dtype:
            raise NMSparseError(
                f"expected gate_up and down of one dtype, got {self.gate_up.dtype} and {self.down.dtype}; use .astype"
            )
        if activation not in reference.ACTIVATIONS:
            raise NMSparseError(f"activation: expected one of {', '.join(reference.ACTIVATIONS)}; got {activation!r}")
        self.activation = activation
        self._gpu = None
        if any(getattr(weight, "device", "cpu") != "cpu" for weight in (self.gate_up, self.down)):
            self._gpu = _cuda("experts").Experts(self.gate_up, self.down, activation)

    @classmethod
    def from_dense(
        cls, gate_up: np.ndarray, down: np.ndarray, pattern: str | Pattern | Sequence[str], activation: str = "silu"
    ) -> SparseExperts:
        """Prune dense weights by magnitude to one pattern. To rank by other scores, call ``nmsparse.array`` on each.

        ``pattern`` may also name what becomes of each expert: a pattern, ``"dense"`` or ``"drop"``.

        >>> SparseExperts.from_dense(np.ones((2, 8, 16)), np.ones((2, 16, 8)), "1:4", "relu").gated
        False
        """
        if isinstance(pattern, (str, Pattern)):
            return cls(array(gate_up, pattern), array(down, pattern), activation)
        for weight in (gate_up, down):
            if len(pattern) != len(weight):
                raise NMSparseError(f"expected a pattern for each of {len(weight)} experts, got {len(pattern)}")
        return cls(*(list(map(_pruned, weight, pattern)) for weight in (gate_up, down)), activation)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.down.shape[0]

    @property
    def hidden_size(self) -> int:
        """H, the width of the tokens."""
        return self.down.shape[1]

    @property
    def intermediate_size(self) -> int:
        """I, the width between the two projections."""
        return self.down.shape[2]

    @property
    def gated(self) -> bool:
        """Whether ``gate_up`` holds gate and up rows (2I of them) or only one projection (I)."""
        return self.gate_up.shape[1] == 2 * self.down.shape[2]

    @property
    def device(self) -> str:
        """Where the weights are: ``"cpu"`` or ``"cuda:N"``."""
        return "cpu" if self._gpu is None else f"cuda:{self._gpu.device}"

    @property
    def dtype(self) -> np.dtype:
        """dtype of the weights."""
        return self.down.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of both weights, metadata included."""
        return self.gate_up.nbytes + self.down.nbytes

    @property
    def pattern(self) -> Pattern | None:
        """The pattern that both weights have; None if they are dense or differ."""
        patterns = {getattr(weight, "pattern", None) for weight in (self.gate_up, self.down)}
        return patterns.pop() if len(patterns) == 1 else None

    def __repr__(self) -> str:
        weights = self.gate_up, self.down
        kinds = [w.summary if isinstance(w, MixedExperts) else kind_of(w) for w in weights]
        gate = "gated " if self.gated else ""
        return (
            f"SparseExperts({self.num_experts} experts, hidden {self.hidden_size}, intermediate "
            f"{self.intermediate_size}, {gate}{self.activation}, {' and '.join(dict.fromkeys(kinds))}, "
            f"{self.dtype.name}, {self.nbytes} bytes)"
        )

    def compact(self) -> SparseExperts:
        """Let go of the canonical buffers of weights on a GPU and keep what its kernels read; returns itself.

        The weights can then no longer be decoded, moved or saved from here; where nobody else holds the arrays, their
        memory is free. Nothing happens to weights on the host, whose kernels read the canonical buffers.
        """
        if self._gpu is not None:
            self.gate_up, self.down = self._gpu.gate_up, self._gpu.down
        return self

    @takes_tensors
    def __call__(self, x: np.ndarray, topk_ids: np.ndarray, topk_weights: np.ndarray) -> np.ndarray:
        """Each token's weighted sum of the outputs of its experts, in the shape and dtype of ``x``.

        ``x`` is (T, H), or (…, H) with any leading axes; ``topk_ids`` (…, k) int32 or int64 and ``topk_weights``
        (…, k), as :func:`~nmsparse.moe.route` returns them, have the same leading axes or one for all tokens.
        Arithmetic is float32, or float64 (slowly, by ``nmsparse.reference``) where ``x`` or the weights are float64.
        An id of -1 (:data:`nmsparse.formats.DROPPED`) leaves a slot out.

        Raises NMSparseError for shapes that do not fit, ids below -1 or beyond E - 1, an expert named twice by a token,
        and routing weights that are NaN or inf. On a GPU nobody looks at ids and weights, which would mean to wait: ids
        outside are left out, an expert named twice counts twice, and NaN spreads.

        >>> eye = np.eye(4, dtype=np.float32)[None]
        >>> SparseExperts(eye, 3 * eye, "identity")(np.ones((2, 4), np.float32), [[0], [0]], [[1.0], [2.0]])
        array([[3., 3., 3., 3.],
               [6., 6., 6., 6.]], dtype=float32)
        """
        if self._gpu is not None:
            return self._gpu(x, topk_ids, topk_weights)
        x = as_activation(x, "x")
        if x.ndim == 0 or x.shape[-1] != self.hidden_size:
            raise NMSparseError(f"x: expected shape (tokens, {self.hidden_size}), got {x.shape}")
        lead = x.shape[:-1]
        ids = _per_token("topk_ids", np.asarray(topk_ids), lead)
        weights = _per_token("topk_weights", as_activation(topk_weights, "topk_weights"), lead)
        if weights.shape != ids.shape:
            raise NMSparseError(f"topk_weights: expected one per id, shape {ids.shape}; got {weights.shape}")
        exact = np.float64 in (x.dtype, self.dtype)
        with np.errstate(over="ignore"):  # a float64 weight beyond float32 becomes inf, and is refused
            weights = np.ascontiguousarray(weights, np.float64 if exact else np.float32)
        if not np.isfinite(weights).all():
            t = np.argwhere(~np.isfinite(weights))[0, 0]
            raise NMSparseError(f"topk_weights: expected finite values, got {weights[t].tolist()} for token {t}")
        ragged = RaggedTokens.from_topk(ids, self.num_experts)

        tokens = x.reshape(len(ids), self.hidden_size)
        if exact:
            y = reference.moe(tokens, ids, weights, self.gate_up, self.down, self.activation)
        else:
            from ..cpu.moe import moe_forward

            y = moe_forward(
                np.ascontiguousarray(tokens, np.float32), ragged, weights, self.gate_up, self.down, self.activation
            )
        return y.reshape(x.shape).astype(x.dtype, copy=False)

    @takes_tensors
    def from_logits(self, x: np.ndarray, logits: np.ndarray, router: Router, bias: np.ndarray | None = None) -> Any:
        """``self(x, *router(logits, bias))`` for the T tokens of ``x`` and logits (T, E).

        On a GPU choosing the experts and sorting the tokens by them are one launch, so that the call is still four.

        >>> eye = np.eye(2, dtype=np.float32)[None].repeat(2, 0)
        >>> SparseExperts(eye, eye, "identity").from_logits(eye[0], 9 * eye[0], Router(1, renormalize=True))
        array([[1., 0.],
               [0., 1.]], dtype=float32)
        """
        if self._gpu is not None:
            return self._gpu.run(x, _cuda("routing").logits_of(logits, router, bias))
        return self(x, *router(logits, bias))


def _expert_weights(name: str, weight: Any) -> SparseArray | MixedExperts | np.ndarray:
    if isinstance(weight, (list, tuple)):
        weight = stack_experts(weight)
    if not isinstance(weight, (SparseArray, MixedExperts)):
        weight = _cuda("array").view(weight) if is_on_gpu(weight) else as_weight(weight, name)
    if weight.ndim != 3 or not weight.shape[0]:
        raise NMSparseError(f"{name}: expected one matrix per expert, shape (E, rows, columns); got {weight.shape}")
    return weight


def _pruned(weight: np.ndarray, kind: str) -> SparseArray | np.ndarray | None:
    """What becomes of one expert's matrix."""
    return None if kind == DROP else weight if kind == DENSE else array(weight, kind)


def _per_token(name: str, values: np.ndarray, lead: tuple[int, ...]) -> np.ndarray:
    """``values`` (…, k) as (tokens, k)."""
    tokens = math.prod(lead)
    if values.shape[:-1] not in (lead, (tokens,)) or values.ndim == 0 or values.shape[-1] < 1:
        shapes = dict.fromkeys(str((*axes, "k")).replace("'", "") for axes in (lead, (tokens,)))
        raise NMSparseError(f"{name}: expected shape {' or '.join(shapes)}, got {values.shape}")
    return values.reshape(tokens, values.shape[-1])
