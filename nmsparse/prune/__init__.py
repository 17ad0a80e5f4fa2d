"""Which weights to keep, and what to make of those that stay: masks and pruned weights for any pattern.

``formats`` defines what a pattern keeps of given scores. Here is where scores come from, and solvers that change the
kept weights so that outputs stay. All are functions on arrays; :mod:`nmsparse.calibration` runs models to feed them.
Whole experts and neurons: :mod:`nmsparse.prune.experts`. What moves rows, columns or neurons comes before what prunes
them: afterwards it would break the pattern.
"""

from __future__ import annotations

import numpy as np

from .. import formats
from ..formats import Pattern
from ..formats.selection import magnitude
from .admm import admm_mask
from .methods import METHODS, prune_weight
from .permutation import column_order
from .refit import refit
from .scores import ria, wanda
from .sparsegpt import sparsegpt

__all__ = [
    "METHODS",
    "admm_mask",
    "apply",
    "column_order",
    "magnitude",
    "mask",
    "prune_weight",
    "refit",
    "ria",
    "sparsegpt",
    "wanda",
]


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
