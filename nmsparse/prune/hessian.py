"""The quadratic that calibrated pruning minimises: what a layer's output loses when its weight changes.

With inputs X ``(T, K)`` as rows and a row w of the weight, the loss of a changed row v is ``‖X v − X w‖² / T`` =
``(v − w)ᵀ H (v − w)``, H = XᵀX / T: half the second derivative, which everybody calls the Hessian. It is the same for
all rows. Statistics are float64 ``(K, K)``; they are sums over tokens, so batches add up.
"""

from __future__ import annotations

import numpy as np

from ..errors import NMSparseError

DAMPING = 0.01


def damped(hessian: np.ndarray, damping: float = DAMPING) -> np.ndarray:
    """``hessian`` plus ``damping`` times its mean diagonal on the diagonal: invertible, and wary of rare inputs.

    An input column that was never active gets a diagonal of 1 if all are inactive.

    >>> damped(np.diag([1.0, 3.0]), 0.5).tolist()
    [[2.0, 0.0], [0.0, 4.0]]
    """
    hessian = _square(hessian)
    return hessian + damping * (np.trace(hessian) / len(hessian) or 1.0) * np.eye(len(hessian))


def shrunk(hessian: np.ndarray, tokens: float, shared: np.ndarray, prior: float) -> np.ndarray:
    """The Hessian of an expert with few tokens, drawn towards that of its layer.

    ``(tokens · hessian + prior · shared) / (tokens + prior)``: ``prior`` is how many tokens of the layer's mixture the
    expert is taken to have seen besides its own. Without own tokens it is the layer's.

    >>> shrunk(np.eye(1), 30, 5 * np.eye(1), 10).tolist()
    [[2.0]]
    """
    return (tokens * _square(hessian) + prior * _square(shared)) / max(tokens + prior, 1e-300)


def recentred(w: np.ndarray, hessian: np.ndarray, target: np.ndarray, ridge: float) -> np.ndarray:
    """The dense weight with the least loss where inputs have changed but outputs should not: float64 ``(M, K)``.

    What comes before is pruned already, so the layer reads X' ``(T, K)`` and should still write Y ``(T, M)``. With
    ``hessian`` = X'ᵀX'/T and ``target`` = YᵀX'/T ``(M, K)``: argmin over V of ``‖Y − X' Vᵀ‖²/T + ridge · ‖V − W‖²`` is
    ``(target + ridge W) (hessian + ridge)⁻¹``. The loss of any V is that of this one plus
    ``(V − this) (hessian + ridge) (V − this)ᵀ``, so every solver that works around a weight works around this one.

    >>> recentred(np.array([[2.0]]), np.array([[4.0]]), np.array([[4.0]]), 0.0).tolist()  # X' = 2 X, Y = 2 X
    [[1.0]]
    """
    eye = ridge * np.eye(len(hessian))
    return np.linalg.solve(hessian + eye, (target + ridge * w).T).T


def quadratic_loss(w: np.ndarray, v: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """``(v − w)ᵀ H (v − w)`` of each row, float64 ``(M,)``.

    >>> quadratic_loss(np.array([[1.0, 0.0]]), np.array([[0.0, 0.0]]), 3 * np.eye(2)).tolist()
    [3.0]
    """
    change = np.asarray(v, np.float64) - w
    return np.einsum("mk,mk->m", change @ hessian, change)


def _square(hessian: np.ndarray) -> np.ndarray:
    hessian = np.asarray(hessian, np.float64)
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1] or not np.isfinite(hessian).all():
        raise NMSparseError(
            f"hessian: expected finite numbers (K, K), got shape {hessian.shape}; a NaN or inf here comes from the "
            "activations of the calibration text"
        )
    return hessian
