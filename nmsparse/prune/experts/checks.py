"""What a calibration statistic must be to enter a score."""

from __future__ import annotations

import numpy as np

from ...errors import NMSparseError


def statistic(
    name: str, values: np.ndarray, *, ndim: int | None = None, shape: tuple[int, ...] | None = None
) -> np.ndarray:
    """``values`` as float64: real numbers, 0 or more, none NaN or inf, of ``ndim`` axes or ``shape`` where given."""
    values = np.asarray(values)
    if values.dtype.kind not in "fiub" and values.dtype.name != "bfloat16":
        raise NMSparseError(f"{name}: expected real numbers, got {values.dtype}")
    if ndim not in (None, values.ndim) or shape not in (None, values.shape):
        expected = f"shape {shape}" if shape is not None else f"{ndim} axes"
        raise NMSparseError(f"{name}: expected {expected}, got shape {values.shape}")
    values = values.astype(np.float64)
    if not (np.isfinite(values).all() and (values >= 0).all()):
        where = tuple(map(int, np.argwhere(~(values >= 0) | np.isinf(values))[0]))
        raise NMSparseError(
            f"{name}: expected finite numbers of 0 or more, got {values[where]} at {where}; "
            "look for an overflow in the calibration pass"
        )
    return values


def per_token(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """``total / count``, and 0 where nothing was counted."""
    return np.divide(total, count, out=np.zeros(np.broadcast_shapes(total.shape, count.shape)), where=count > 0)
