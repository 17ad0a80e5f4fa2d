"""Memory that torch and nmsparse share: buffers as tensors and back, without a copy.

On a GPU both sides speak DLPack. On the host NumPy has no bfloat16 of its own, so those 16 bits pass as int16 and are
viewed again on the other side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from .. import formats
from ..cuda.array import DeviceArray, view
from ..errors import NMSparseError
from ..formats import Pattern, SparseArray

__all__ = ["as_array", "as_tensor", "call", "from_torch", "to_torch"]

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def as_tensor(array: np.ndarray | DeviceArray) -> Tensor:
    """``array`` as a tensor on the same memory; a NumPy array that is read-only is copied.

    >>> a = np.ones(2, ml_dtypes.bfloat16)
    >>> t = as_tensor(a)
    >>> t[0] = 3
    >>> t.dtype, float(a[0])
    (torch.bfloat16, 3.0)
    """
    if not isinstance(array, np.ndarray):
        return torch.from_dlpack(array)
    if not array.flags.writeable:
        array = array.copy()
    if array.dtype == _BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_array(tensor: Tensor) -> np.ndarray | DeviceArray:
    """``tensor`` as a NumPy array, or on a GPU as a :class:`~nmsparse.cuda.array.DeviceArray`, on the same memory.

    Raises :class:`~nmsparse.errors.NMSparseError` where autograd would lose its track.

    >>> as_array(torch.ones(2, dtype=torch.bfloat16)).dtype.name
    'bfloat16'
    """
    if tensor.is_cuda:
        return view(tensor)
    if tensor.requires_grad and torch.is_grad_enabled():
        raise NMSparseError(
            "a tensor that requires grad would lose it here; use nmsparse.torch.linear, grouped_linear or experts, "
            "which have gradients, or torch.no_grad()"
        )
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(_BFLOAT16)
    return tensor.numpy()


def to_torch(array: SparseArray) -> dict[str, Tensor]:
    """The canonical buffers of ``array`` by name, as tensors on the same memory."""
    return {name: as_tensor(buffer) for name, buffer in array.buffers().items()}


def from_torch(buffers: Mapping[str, Tensor], pattern: str | Pattern, shape: tuple[int, ...]) -> SparseArray:
    """The array that holds these canonical buffers, on their memory; every position is checked.

    >>> A = formats.random((4, 32), "2:4", rng=0)
    >>> B = from_torch(to_torch(A), "2:4", (4, 32))
    >>> np.shares_memory(A.values, B.values)
    True
    """
    with torch.no_grad():
        return formats.from_buffers(pattern, {name: as_array(buffer) for name, buffer in buffers.items()}, shape)


def call(function: Callable[..., Any], arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    """``function`` of NumPy arrays called with tensors on the host; what it returns is tensors again.

    An ``out`` tensor is written to and returned.

    >>> call(np.add, (torch.ones(2), torch.ones(2)), {})
    tensor([2., 2.])
    """

    def enter(value: Any) -> Any:
        return as_array(value) if isinstance(value, Tensor) and not value.is_cuda else value

    def leave(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(leave, value))
        return as_tensor(value) if isinstance(value, np.ndarray) else value

    result = function(*map(enter, arguments), **{name: enter(value) for name, value in options.items()})
    out = options.get("out")
    return out if isinstance(out, Tensor) else leave(result)
