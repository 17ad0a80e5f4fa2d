"""Taking whole experts out of a layer, router rows included."""

from __future__ import annotations

import numpy as np

from ...errors import NMSparseError
from .weights import ExpertWeights, as_experts


def best_experts(scores: np.ndarray, keep: int, *, guard: np.ndarray | None = None) -> np.ndarray:
    """Which experts stay: the ``keep`` best of each layer by ``scores`` (L, E), as a bool mask (L, E).

    ``guard`` (L, E) bool, see :func:`super_experts`, are kept first. Ties go to the lower expert. The cut is made in
    each layer, since scores of different layers have different scales (REAP and EASY-EP do so).

    >>> best_experts(np.array([[3.0, 1.0, 2.0]]), 2).tolist()
    [[True, False, True]]
    """
    scores = np.array(scores, np.float64)
    if scores.ndim != 2 or not np.isfinite(scores).all():
        raise NMSparseError(f"scores: expected finite numbers (layers, experts), got shape {scores.shape}")
    if not 1 <= keep <= scores.shape[1]:
        raise NMSparseError(f"keep: expected 1..{scores.shape[1]} experts per layer, got {keep}")
    if guard is not None:
        guarded = np.asarray(guard, bool)
        if guarded.shape != scores.shape or guarded.sum(axis=1).max(initial=0) > keep:
            raise NMSparseError(
                f"guard: expected a mask of shape {scores.shape} with at most {keep} experts in a layer, got "
                f"{guarded.shape} with {guarded.sum(axis=-1).max(initial=0)}; keep more experts"
            )
        scores[guarded] = np.inf
    mask = np.zeros(scores.shape, bool)
    np.put_along_axis(mask, np.argsort(-scores, axis=1, kind="stable")[:, :keep], True, axis=1)
    return mask


def remove_experts(
    kept: np.ndarray, router_weight: np.ndarray, weights: tuple[np.ndarray, np.ndarray], bias: np.ndarray | None = None
) -> tuple[np.ndarray, ExpertWeights, np.ndarray | None]:
    """Router rows (E', H), experts and bias (E',) of a layer with the experts of ``kept`` (E,) bool only.

    The smaller layer routes as the whole one would if the removed experts could not be chosen: a token that never
    chose one is untouched where weights are renormalised or sigmoid, and a softmax without renormalisation divides by
    less. With expert groups (DeepSeek) the rest must still form equal groups; ``Router.check`` tells.

    >>> w = (np.zeros((3, 4, 5)), np.zeros((3, 5, 2)))
    >>> rows, experts, bias = remove_experts(np.array([True, False, True]), np.eye(3, 5), w)
    >>> rows.shape, experts.down.shape, bias
    ((2, 5), (2, 5, 2), None)
    """
    experts, kept = as_experts(weights), np.asarray(kept)
    if kept.dtype != bool or kept.shape != experts.down.shape[:1] or len(router_weight) != len(kept):
        raise NMSparseError(
            f"kept: expected bool[{len(router_weight)}], one per router row and expert, got "
            f"{kept.dtype}{list(kept.shape)} for experts {experts.down.shape}"
        )
    rest = ExpertWeights(experts.gate_up[kept], experts.down[kept])
    return router_weight[kept], rest, None if bias is None else bias[kept]
