"""DLPack through ctypes: how arrays on a GPU pass between libraries without a copy.

A capsule named ``dltensor`` holds a ``DLManagedTensor``; who consumes it renames it and calls its deleter when done.
A capsule that nobody consumes does that itself when it is collected. Source: DLPack 1.0, ``dlpack.h`` and "Python
Specification for DLPack".
"""

from __future__ import annotations

import ctypes
import math
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ..errors import NMSparseError

__all__ = ["CUDA", "CUDA_MANAGED", "Tensor", "export", "inspect"]

# DLDeviceType
CUDA, CUDA_MANAGED = 2, 13
# DLDataTypeCode and bits
CODES = {"i": 0, "u": 1, "f": 2, "b": 6}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
NAMES = {(4, 16): BFLOAT16} | {
    (code, bits): np.dtype(f"{kind}{bits // 8}")
    for kind, code in CODES.items()
    for bits in ((16, 32, 64) if kind == "f" else (8,) if kind == "b" else (8, 16, 32, 64))
}


class DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class DLManagedTensor(ctypes.Structure):
    _fields_ = (("tensor", DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class Tensor(NamedTuple):
    """What a capsule describes; ``strides`` in elements, None for C order."""

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: np.dtype
    device: tuple[int, int]


_api = ctypes.PyDLL(None)
_api.PyCapsule_New.restype = ctypes.py_object
_api.PyCapsule_New.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_is_valid, _get_pointer = _api.PyCapsule_IsValid, _api.PyCapsule_GetPointer
# By address: a capsule that is being collected must not be touched as an object.
_is_valid.argtypes = _get_pointer.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
_get_pointer.restype = ctypes.c_void_p
NAME = b"dltensor"

# Everything that exported tensors need, by the address of their DLManagedTensor, until their deleter is called.
_held: dict[int, tuple[Any, ...]] = {}


def _delete(address: int, held: dict[int, Any] = _held) -> None:
    held.pop(address, None)


# A consumer may call the deleter from any thread, and as late as the interpreter's end: the callbacks are never freed.
_deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_delete)


def _collect(capsule: int, valid: Any = _is_valid, pointer: Any = _get_pointer, held: dict[int, Any] = _held) -> None:
    if valid(capsule, NAME):  # nobody took it
        held.pop(pointer(capsule, NAME), None)


_collector = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(_collect)
for _callback in (_deleter, _collector):
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(_callback))


def export(tensor: Tensor, owner: Any) -> Any:
    """A capsule of ``tensor``; ``owner`` stays alive until the consumer is done with it."""
    if tensor.dtype == BFLOAT16:
        code = 4
    elif (code := CODES.get(tensor.dtype.kind, -1)) < 0:
        raise BufferError(f"DLPack: no type code for {tensor.dtype}")
    ndim = len(tensor.shape)
    shape = (ctypes.c_int64 * ndim)(*tensor.shape)
    strides = (ctypes.c_int64 * ndim)(*(tensor.strides or c_strides(tensor.shape)))
    managed = DLManagedTensor()
    managed.tensor = DLTensor(
        tensor.pointer, *tensor.device, ndim, code, tensor.dtype.itemsize * 8, 1, shape, strides, 0
    )
    managed.deleter = ctypes.cast(_deleter, ctypes.c_void_p)
    address = ctypes.addressof(managed)
    _held[address] = managed, shape, strides, owner
    return _api.PyCapsule_New(address, NAME, ctypes.cast(_collector, ctypes.c_void_p))


def inspect(capsule: Any) -> Tensor:
    """What an unconsumed capsule describes. The memory is the caller's as long as it keeps the capsule."""
    if not _is_valid(id(capsule), NAME):
        raise NMSparseError("DLPack: expected a capsule named 'dltensor' that was not consumed yet")
    t = ctypes.cast(_get_pointer(id(capsule), NAME), ctypes.POINTER(DLManagedTensor)).contents.tensor
    dtype = NAMES.get((t.code, t.bits))
    if dtype is None or t.lanes != 1:
        raise NMSparseError(f"DLPack: type code {t.code} of {t.bits} bits, {t.lanes} lanes, is not supported")
    strides = tuple(t.strides[: t.ndim]) if t.strides else None
    return Tensor((t.data or 0) + t.byte_offset, tuple(t.shape[: t.ndim]), strides, dtype, (t.device_type, t.device))


def c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a C-contiguous array.

    >>> c_strides((2, 3, 4))
    (12, 4, 1)
    """
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
