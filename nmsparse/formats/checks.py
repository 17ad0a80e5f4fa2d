"""What may enter a format: dtypes, shapes, and the options that rank or mask a weight."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from ..errors import NMSparseError, UnsupportedDeviceError

HOST = (1, 3)  # DLPack's kDLCPU and kDLCUDAHost
DTYPES = tuple(map(np.dtype, (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)))


def check_dtype(dtype: np.dtype, who: str) -> np.dtype:
    """``dtype`` if weights may have it."""
    if dtype not in DTYPES:
        names = ", ".join(d.name for d in DTYPES)
        raise NMSparseError(f"{who}: expected weights in {names}, got {dtype}; convert with .astype(numpy.float32)")
    return dtype


def common_dtype(a: np.dtype, b: np.dtype) -> np.dtype:
    """The dtype of a product: the one that both have, or else float32, or float64 where one is that.

    >>> common_dtype(np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)).name
    'float32'
    """
    if a == b:
        return a
    return np.dtype(np.float64 if np.float64 in (a, b) else np.float32)


def is_on_gpu(x: Any) -> bool:
    """Whether ``x`` is an array that the host cannot read: by DLPack, or by the type's CUDA array interface.

    >>> is_on_gpu(np.ones(3)), is_on_gpu([1.0])
    (False, False)
    """
    if isinstance(x, np.ndarray):
        return False
    if hasattr(x, "__dlpack_device__"):
        return x.__dlpack_device__()[0] not in HOST
    return hasattr(type(x), "__cuda_array_interface__")


def as_weight(w: Any, who: str) -> np.ndarray:
    """``w`` as a NumPy weight ``(M, K)`` or ``(E, M, K)``."""
    if is_on_gpu(w):
        raise UnsupportedDeviceError(f"{who}: the weight is on a GPU; use nmsparse.array, or copy it to the host first")
    w = np.asarray(w)
    check_dtype(w.dtype, who)
    if w.ndim not in (2, 3):
        raise NMSparseError(f"{who}: expected a weight (M, K), or (E, M, K) for experts, got shape {w.shape}")
    return w


def resolve_scores(w: np.ndarray, scores: Any, mask: Any, strict: bool) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The scores that rank ``w`` and the mask that the result must obey, from the options of ``from_dense``."""
    if sum((scores is not None, mask is not None, bool(strict))) > 1:
        raise NMSparseError("scores=, mask= and strict= exclude one another: give one of them")
    if strict:
        mask = w != 0
    if mask is not None:
        mask = np.asarray(mask)
        if mask.dtype != bool or mask.shape != w.shape:
            raise NMSparseError(f"mask: expected bool{list(w.shape)}, got {mask.dtype}{list(mask.shape)}")
        return mask.astype(np.float32), mask
    if scores is not None and np.shape(scores) != w.shape:
        raise NMSparseError(f"scores: expected shape {w.shape} like the weight, got {np.shape(scores)}")
    return scores, None
