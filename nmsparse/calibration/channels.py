"""One order of the hidden dimension for a whole model, folded into its weights: the outputs stay, patterns meet others.

Gate and up read the residual stream, so the order of their input columns is that of the stream, which everything else
reads and writes as well: embedding, norms, attention, router and head. All of them are reordered alike. An RMS norm
commutes with that, rotary positions and heads do not see it, so the model computes what it did, to the rounding of
sums. Nothing is gathered at run time, and no format needs a field for it: an order for each expert would keep more, but
would have to move every token's inputs for each of its experts.
"""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import Any

import numpy as np

from ..demo.mixtral import Mixtral, load
from ..errors import NMSparseError
from ..formats import Pattern
from ..io import Checkpoint
from ..io.conversion import read_config
from ..prune.permutation import column_order
from .choices import weight_scores
from .walk import Walk, survey

_ROWS = 1 << 15  # of gate and up that decide an order: enough to see which columns are strong together

# The last part of a tensor's name in Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-V2 and -V3, without ".weight".
_NORMS = ("norm", "input_layernorm", "post_attention_layernorm")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa")
_EXPERTS = ("gate", "shared_expert_gate", "w1", "w3", "gate_proj", "up_proj", "gate_up_proj")
_WRITERS = ("o_proj", "w2", "down_proj")
_INSIDE = ("q_norm", "k_norm", "q_a_layernorm", "q_b_proj", "kv_a_layernorm", "kv_b_proj", "e_score_correction_bias")
_AXES: dict[str, int | None] = {
    **dict.fromkeys(("embed_tokens", "lm_head", *_NORMS, *_ATTENTION, *_EXPERTS), -1),
    **dict.fromkeys(_WRITERS, -2),
    **dict.fromkeys([f"{name}.bias" for name in _WRITERS], -1),
    **dict.fromkeys((*_INSIDE, *(f"{name}.bias" for name in _ATTENTION)), None),
}


def hidden_axis(name: str) -> int | None:
    """Which axis of a checkpoint's tensor runs along the hidden dimension; None if none does.

    Raises :class:`~nmsparse.errors.NMSparseError` for a name that is not known: a tensor that is left out would break
    the model.

    >>> [hidden_axis(f"model.layers.0.{name}") for name in ("mlp.experts.3.w1.weight", "self_attn.q_norm.weight")]
    [-1, None]
    """
    parts = name.removesuffix(".weight").split(".")
    last = ".".join(parts[-2:]) if parts[-1] == "bias" else parts[-1]
    if last not in _AXES:
        raise NMSparseError(
            f"{name}: expected a tensor of Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE or DeepSeek; whether this reads or "
            "writes the hidden dimension is not known, so that cannot be reordered: leave --reorder out"
        )
    return _AXES[last]


def reorder_hidden(name: str, tensor: np.ndarray, order: np.ndarray) -> np.ndarray:
    """A checkpoint's tensor after the hidden dimension was put in ``order`` ``(H,)``; one without it stays as it is.

    >>> reorder_hidden("model.layers.0.block_sparse_moe.experts.0.w2.weight", np.array([[1], [2]]), np.array([1, 0]))
    array([[2],
           [1]])
    """
    axis = hidden_axis(name)
    if axis is None:
        return tensor
    if tensor.ndim < -axis or tensor.shape[axis] != len(order):
        raise NMSparseError(f"{name}: expected the hidden size {len(order)} on axis {axis}, got shape {tensor.shape}")
    return np.ascontiguousarray(np.take(tensor, order, axis=axis))


def reordered(tensor: Callable[[str], Any], order: np.ndarray | None) -> Callable[[str], Any]:
    """``tensor(name)`` of a checkpoint, with the hidden dimension in ``order`` (None: as it is)."""
    return tensor if order is None else lambda name: reorder_hidden(name, tensor(name), order)


def channel_order(walk: Walk, pattern: str | Pattern, method: str) -> np.ndarray:
    """The order ``(H,)`` of the hidden dimension in which ``pattern`` keeps most of gate and up, all layers together.

    Weights count by :func:`~nmsparse.calibration.choices.weight_scores`; of a large model, those of some experts of
    each layer. The walk ends at its last layer, the model as it was.
    """
    scores: list[np.ndarray] = []
    for record in survey(walk):
        experts, rows = record.gate_up.shape[:2]
        step = max(1, len(walk) * experts * rows // _ROWS)
        scores += [weight_scores(record, e, method)[0] for e in range(0, experts, step)]
    return column_order(np.concatenate(scores), pattern)


def load_mixtral(source: str | PathLike[str], order: np.ndarray | None = None) -> Mixtral:
    """The NumPy Mixtral of a checkpoint directory, its hidden dimension in ``order``: the same logits, to rounding."""
    return load(read_config(source), reordered(Checkpoint(source).__getitem__, order))
