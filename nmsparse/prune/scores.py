"""How much each weight is worth: the scores that rank weights before a pattern chooses among them.

A score has the weight's shape ``(M, K)``; larger is kept. Patterns that choose between rows or columns add scores up,
so these are squares where the error that they stand for is a sum of squares.
"""

from __future__ import annotations

import numpy as np

from ..errors import NMSparseError


def wanda(w: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """``|w_ij| · ‖x_j‖₂``: float64 ``(M, K)`` from a weight ``(M, K)`` and the norm ``(K,)`` of each input column.

    Within a row this ranks weights by what the output loses if one of them goes alone. The scale of ``norms`` is free.

    Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR'24, arXiv:2306.11695.

    >>> wanda(np.array([[3.0, -1.0]]), np.array([1.0, 4.0])).tolist()
    [[3.0, 4.0]]
    """
    return np.abs(np.asarray(w, np.float64)) * _norms(w, norms)


def ria(w: np.ndarray, norms: np.ndarray, power: float = 0.5) -> np.ndarray:
    """Relative importance, ``(|w_ij| / Σ_j |w_ij| + |w_ij| / Σ_i |w_ij|) · ‖x_j‖₂^power``: float64 ``(M, K)``.

    Each weight is compared with its row and with its column, so that no input is pruned away as a whole. A row or
    column of zeros scores 0.

    Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", ICLR'24.

    >>> ria(np.array([[3.0, 1.0], [0.0, 1.0]]), np.ones(2)).tolist()
    [[1.75, 0.75], [0.0, 1.5]]
    """
    size = np.abs(np.asarray(w, np.float64))
    return (_share(size, 1) + _share(size, 0)) * _norms(w, norms) ** power


def _share(size: np.ndarray, axis: int) -> np.ndarray:
    total = size.sum(axis=axis, keepdims=True)
    return np.divide(size, total, out=np.zeros_like(size), where=total > 0)


def _norms(w: np.ndarray, norms: np.ndarray) -> np.ndarray:
    norms = np.asarray(norms, np.float64)
    if norms.shape != w.shape[-1:] or not (np.isfinite(norms).all() and (norms >= 0).all()):
        raise NMSparseError(
            f"norms: expected one finite number of 0 or more for each of the {w.shape[-1]} input columns, got shape "
            f"{norms.shape}"
        )
    return norms
