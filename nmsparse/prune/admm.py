"""A mask chosen while the weights adapt to it: the alternating direction method of multipliers."""

from __future__ import annotations

import numpy as np

from .. import ops
from ..formats import Pattern


def admm_mask(
    w: np.ndarray,
    hessian: np.ndarray,
    pattern: str | Pattern,
    *,
    row_weights: np.ndarray | None = None,
    iterations: int = 60,
    penalty: float = 0.1,
    growth: float = 1.07,
) -> np.ndarray:
    """A mask of ``pattern`` for which :func:`~nmsparse.prune.refit.refit` loses little: bool ``(M, K)``.

    Minimises ``Σ_i d_i (v_i − w_i)ᵀ H (v_i − w_i)`` over weights V ``(M, K)`` that the pattern can store, d =
    ``row_weights`` ``(M,)`` (None: all 1), H = ``hessian`` ``(K, K)`` positive definite. Two copies of V take turns:
    one obeys the loss (a ridge towards the other), one obeys the pattern (it keeps the largest squares, which is the
    nearest weight of the pattern), and a multiplier U adds up their disagreement. ``penalty``, for a Hessian scaled to
    a diagonal of 1, ties them together and grows each time by ``growth``, so that the mask settles. It works for every
    pattern, since the pattern's own choice is the projection.

    Boyd et al., "Distributed Optimization and Statistical Learning via ADMM", 2011; for pruning: Boža, "Fast and
    Effective Weight Update for Pruned Large Language Models", arXiv:2401.02938.

    >>> w = np.array([[1.0, 1.1, 1.0, 0.9]])
    >>> same = np.eye(4) + np.kron(np.eye(2), np.ones((2, 2)))  # columns 0 and 1 do each other's work, 2 and 3 too
    >>> admm_mask(w, same, "2:4").astype(int).tolist()
    [[0, 1, 1, 0]]
    """
    scale = np.sqrt(np.diag(hessian))
    values, vectors = np.linalg.eigh(hessian / scale / scale[:, None])
    weights = np.float32(np.ones(len(w)) if row_weights is None else row_weights / row_weights.max())
    w, values, vectors = np.float32(w * scale), np.float32(values), np.float32(vectors)  # enough to find a mask
    gradient = (w @ vectors) * values
    near, u = w, np.zeros_like(w)
    for step in range(iterations):
        moved = near + u
        mask = ops.array(moved, pattern, scores=moved**2 * weights[:, None]).mask()
        u = moved * ~mask
        rho = np.float32(penalty * growth**step)
        near = ((gradient + rho * ((moved * mask - u) @ vectors)) / (values + rho)) @ vectors.T
        u /= growth
    return mask
