"""The best values for a given mask: exact least squares, row by row."""

from __future__ import annotations

import numpy as np

_ELEMENTS = 1 << 24  # of the systems that are solved together: 128 MB


def refit(w: np.ndarray, hessian: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """``argmin (v − w)ᵀ H (v − w)`` over v that is 0 outside the row's ``mask``: float64 ``(M, K)``.

    ``w`` ``(M, K)``, ``hessian`` ``(K, K)`` positive definite (see :func:`~nmsparse.prune.hessian.damped`), ``mask``
    bool ``(M, K)``. With S the kept columns of a row, v_S solves ``H_SS v_S = (H w)_S``. Greedy solvers (OBS) end
    above this minimum, since they fix weights one after another.

    >>> h = np.array([[2.0, 1.0], [1.0, 2.0]])
    >>> refit(np.array([[1.0, 1.0]]), h, np.array([[True, False]])).tolist()
    [[1.5, 0.0]]
    """
    target, counts = np.asarray(w, np.float64) @ hessian, mask.sum(axis=1)
    out = np.zeros(mask.shape)
    for count in np.unique(counts[counts > 0]):
        same = np.flatnonzero(counts == count)
        for rows in np.array_split(same, -(-len(same) * count * count // _ELEMENTS)):
            kept = np.nonzero(mask[rows])[1].reshape(len(rows), count)
            systems = hessian[kept[:, :, None], kept[:, None, :]]
            solved = np.linalg.solve(systems, np.take_along_axis(target[rows], kept, axis=1)[..., None])
            out[rows[:, None], kept] = solved[..., 0]
    return out
