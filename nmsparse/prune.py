"""Which weights to keep: masks and pruned dense weights for any pattern.

``formats`` defines what a pattern keeps of given scores; this module is where scores come from (magnitude today) and
where a caller gets the mask or the pruned dense weight without caring for buffers.
"""

from __future__ import annotations

import numpy as np

from . import formats
from .formats import Pattern
from .formats.selection import magnitude

__all__ = ["apply", "magnitude", "mask"]


def mask(w: np.ndarray, pattern: str | Pattern, *, scores: np.ndarray | None = None) -> np.ndarray:
    """Where ``pattern`` keeps ``w`` ``(M, K)`` or ``(E, M, K)``, as a bool array of the same shape.

    ``scores`` of the same shape rank the weights; ``|w|`` by default. Ties go to the lower column, then row.

    >>> mask(np.array([[1.0, -5.0, 2.0, 0.0]]), "2:4").astype(int).tolist()
    [[0, 1, 1, 0]]
    """
    return formats.from_dense(w, pattern, scores=scores).mask()


def apply(w: np.ndarray, pattern: str | Pattern, *, scores: np.ndarray | None = None) -> np.ndarray:
    """``w`` with zeros where ``pattern`` does not keep it.

    >>> apply(np.array([[1.0, -5.0, 2.0, 0.0]]), "1:4").tolist()
    [[0.0, -5.0, 0.0, 0.0]]
    """
    return formats.from_dense(w, pattern, scores=scores).todense()
