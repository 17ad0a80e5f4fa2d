"""Putting the neurons of each expert in order of importance, so that its first part is the part to keep."""

from __future__ import annotations

import numpy as np

from ...errors import NMSparseError
from .weights import ExpertWeights, as_experts, take_neurons

# Of one token's act(gate) and h = act(gate) · up, the term that is summed over the tokens of an expert.
TERMS = {
    "gate": lambda gate, h: gate,
    "abs_gate": lambda gate, h: np.abs(gate),
    "h": lambda gate, h: h,
    "abs_h": lambda gate, h: np.abs(h),
}


def neuron_importance(gate: np.ndarray, h: np.ndarray, kind: str) -> np.ndarray:
    """Importance (I,) float64 of an expert's neurons over its calibration tokens; sums of batches add up.

    ``gate`` (T, I) is act(gate_proj x) and ``h`` (T, I) what the down projection reads, act(gate_proj x) · up_proj x.
    The four kinds of the paper are sums of ``"gate"``, ``"abs_gate"`` (its choice for Mixtral and OLMoE), ``"h"`` and
    ``"abs_h"`` (its choice for DeepSeek-V2-Lite). Any other score orders as well, as :func:`heapr` does.

    DualSparse-MoE (see :mod:`nmsparse.prune.experts.partition`).

    >>> gate, h = np.array([[1.0, -2.0]]), np.array([[-3.0, 1.0]])
    >>> {kind: neuron_importance(gate, h, kind).tolist() for kind in ("gate", "abs_gate", "h", "abs_h")}
    {'gate': [1.0, -2.0], 'abs_gate': [1.0, 2.0], 'h': [-3.0, 1.0], 'abs_h': [3.0, 1.0]}
    """
    if kind not in TERMS:
        raise NMSparseError(f"kind: expected one of {', '.join(TERMS)}; got {kind!r}")
    gate, h = np.asarray(gate, np.float64), np.asarray(h, np.float64)
    if gate.ndim != 2 or gate.shape != h.shape:
        raise NMSparseError(f"expected gate and h of one shape (tokens, neurons), got {gate.shape} and {h.shape}")
    return TERMS[kind](gate, h).sum(axis=0)


def reconstruct(weights: tuple[np.ndarray, np.ndarray], importance: np.ndarray) -> tuple[ExpertWeights, np.ndarray]:
    """The experts with their neurons by descending ``importance`` (…, I), and the order (…, I) int64 that was applied.

    The output is the same (a sum in another order); the first half of the neurons is the *major* half of
    :func:`drop_2t`. To be done before pruning to a pattern: afterwards it breaks the pattern, and a sparse array is
    refused. Equal importance keeps the order that it had.

    >>> experts, order = reconstruct((np.array([[1.0], [2.0]]), np.array([[5.0, 6.0]])), np.array([0.1, 0.7]))
    >>> order.tolist(), experts.gate_up.ravel().tolist(), experts.down.tolist()
    ([1, 0], [2.0, 1.0], [[6.0, 5.0]])
    """
    experts, importance = as_experts(weights), np.asarray(importance, np.float64)
    expected = (*experts.down.shape[:-2], experts.width)
    if importance.shape != expected or np.isnan(importance).any():
        raise NMSparseError(f"importance: expected numbers (no NaN) of shape {expected}, got {importance.shape}")
    order = np.argsort(-importance, axis=-1, kind="stable")
    return take_neurons(experts, order), order
