"""Which elements a pattern keeps, in plain NumPy: the definition that the compiled kernels must match bit for bit.

Every format keeps the largest total score that its pattern allows, one level at a time. Scores are magnitudes unless
the caller brings others. Rules that all formats share: a NaN weight counts as +inf (so that it is seen, not dropped),
a tie goes to the lower index, padding loses against everything, and sums run in float64 in ascending order.
"""

from __future__ import annotations

import numpy as np

from ..errors import NMSparseError

PADDING = -np.inf  # the score of an element outside the weight


def top(scores: np.ndarray, n: int) -> np.ndarray:
    """Positions of the ``n`` largest along the last axis, ascending; ties to the lower position.

    >>> top(np.array([1.0, 5.0, 5.0, 5.0]), 2).tolist()
    [1, 2]
    """
    return np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :n], axis=-1)


def ordered_sum(terms: np.ndarray) -> np.ndarray:
    """Sum along the last axis in float64, first to last, padding counting as 0."""
    total = np.zeros(terms.shape[:-1])
    for i in range(terms.shape[-1]):
        total += np.where(np.isneginf(terms[..., i]), 0, terms[..., i])
    return total


def magnitude(w: np.ndarray) -> np.ndarray:
    """``|w|`` in at least float32; a NaN counts as +inf."""
    size = np.abs(w.astype(np.promote_types(w.dtype, np.float32)))
    return np.where(np.isnan(size), np.inf, size)


def importance(w: np.ndarray, scores: np.ndarray | None) -> np.ndarray:
    """The scores to use for ``w`` ``(M, K)``: its magnitudes, or the caller's after a check."""
    if scores is None:
        return magnitude(w)
    scores = np.asarray(scores)
    if scores.shape != w.shape or (scores.dtype.kind not in "fiub" and scores.dtype.name != "bfloat16"):
        raise NMSparseError(
            f"scores: expected real numbers of the weight's shape {w.shape}, got {scores.dtype}{list(scores.shape)}"
        )
    scores = scores.astype(np.promote_types(scores.dtype, np.float32))
    if np.isnan(scores).any() or np.isneginf(scores).any():
        raise NMSparseError(
            "scores: NaN and -inf do not rank a weight; use +inf to keep one and a large negative to drop"
        )
    return scores


def pad(a: np.ndarray, rows: int, cols: int, fill: float) -> np.ndarray:
    """``a`` ``(M, K)`` grown to ``(rows, cols)`` with ``fill`` below and to the right."""
    out = np.full((rows, cols), fill, a.dtype)
    out[: a.shape[0], : a.shape[1]] = a
    return out


def ceil_to(size: int, multiple: int) -> int:
    """``size`` rounded up to a multiple."""
    return -(-size // multiple) * multiple


def merge_last(a: np.ndarray) -> np.ndarray:
    """The last two axes as one (also where a size is 0, which ``reshape(-1)`` cannot infer)."""
    return a.reshape(*a.shape[:-2], a.shape[-2] * a.shape[-1])
