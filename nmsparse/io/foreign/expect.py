"""The one check that all readers share."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import NMSparseError


def expect(who: str, name: str, array: Any, shape: tuple[int, ...], *dtypes: Any) -> np.ndarray:
    """``array`` in C order if it has ``shape`` and one of ``dtypes`` (none: any)."""
    array = np.ascontiguousarray(array)
    if array.shape != shape or (dtypes and array.dtype not in dtypes):
        kinds = " or ".join(np.dtype(dtype).name for dtype in dtypes) or "array"
        raise NMSparseError(
            f"{who}: expected {name} as {kinds}{list(shape)}, got {array.dtype.name}{list(array.shape)}"
        )
    return array


def expect_multiples(who: str, shape: tuple[int, int], rows: int, columns: int) -> tuple[int, int]:
    """The two sizes of ``shape`` if they are multiples of ``rows`` and ``columns``."""
    if len(shape) != 2 or shape[0] % rows or shape[1] % columns:
        raise NMSparseError(
            f"{who}: expected the shape (M, K) of the dense weight, M a multiple of {rows} and K of {columns}, "
            f"got {tuple(shape)}"
        )
    return int(shape[0]), int(shape[1])
