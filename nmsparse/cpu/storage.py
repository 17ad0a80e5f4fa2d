"""16-bit floats as integers: Numba has no bfloat16 and little float16, so the integer type says which one it is."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from ..errors import NMSparseError

# uint16 arrays hold bfloat16 and int16 arrays hold float16 in everything that Numba compiles here.
_AS_INTEGERS = {
    np.dtype(np.float32): np.float32,
    np.dtype(ml_dtypes.bfloat16): np.uint16,
    np.dtype(np.float16): np.int16,
}


def as_storage(array: np.ndarray, name: str) -> np.ndarray:
    """``array`` as a type that the kernels take: the same memory, bfloat16 as uint16 and float16 as int16.

    Raises :class:`~nmsparse.errors.NMSparseError` for another dtype than float32, bfloat16 and float16.

    >>> as_storage(np.ones(2, np.float16), "w").dtype.name
    'int16'
    """
    if array.dtype not in _AS_INTEGERS:
        raise NMSparseError(
            f"{name}: the compiled kernels take float32, bfloat16 and float16, got {array.dtype}; convert with astype"
        )
    return array.view(_AS_INTEGERS[array.dtype])
