"""From the buffers that an op receives to the array that kernels take: looked up by memory, checked and packed once.

An op of ``torch.library`` gets plain tensors, and under ``torch.compile`` not even the same tensor objects each time.
So an array is remembered by the addresses and the versions of its buffers. What is remembered owns none of the buffers'
memory: a weak reference to the storage of ``values`` tells when the address means something else.

In-place updates that autograd counts (optimisers, ``load_state_dict``, anything under ``torch.no_grad()``) are seen;
those through ``tensor.data`` are not counted by torch, and on a GPU need :func:`forget` afterwards.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..cuda.array import DeviceArray
from ..errors import NMSparseError
from ..formats import CLASSES, SparseArray, parse
from ..formats.nm import is_24
from ..moe import SparseExperts
from .buffers import as_array
from .decode import check_canonical

__all__ = ["Buffers", "array_of", "experts_of", "forget", "remember"]

Buffers = tuple[Tensor, Tensor, "Tensor | None", str, Sequence[int]]  # values, meta, indices, pattern, shape


class _Entry(NamedTuple):
    state: tuple[Any, ...]  # what must not have changed
    storage: StorageWeakRef
    array: SparseArray  # of compact weights the kernels' projection
    experts: dict[str, SparseExperts]  # by activation, if the array is a gate and up projection
    seen: tuple[Any, ...] = ()  # weak references to the tensors, and their versions: quicker for who has the same ones

    def is_of(self, values: Tensor, meta: Tensor, indices: Tensor | None, pattern: str, shape: Sequence[int]) -> bool:
        """Whether these are the very tensors that the entry was made of, unchanged."""
        if not self.seen:
            return False
        first, second, third, version, version_of_meta, others = self.seen
        return (
            first() is values
            and second() is meta
            and values._version == version
            and meta._version == version_of_meta
            and (indices is None if third is None else third() is indices and others == _state(indices))
            and self.state[0] == pattern
            and self.array.shape == tuple(shape)
        )


def _seen(values: Tensor, meta: Tensor, indices: Tensor | None) -> tuple[Any, ...]:
    third, others = (None, None) if indices is None else (weakref.ref(indices), _state(indices))
    return weakref.ref(values), weakref.ref(meta), third, values._version, meta._version, others


_entries: dict[tuple[int, int], _Entry] = {}


def array_of(*buffers: Any) -> SparseArray:
    """The sparse array of canonical :data:`Buffers`; it is valid as long as they are.

    >>> from nmsparse.formats import random
    >>> from .buffers import to_torch
    >>> values, meta = to_torch(random((4, 32), "2:4", rng=0)).values()
    >>> A = array_of(values, meta, None, "2:4", [4, 32])
    >>> array_of(values, meta, None, "2:4", [4, 32]) is A
    True
    >>> _ = values.mul_(2)
    >>> array_of(values, meta, None, "2:4", [4, 32]) is A
    False
    """
    return _entry(*buffers).array


def experts_of(gate_up: Buffers, down: Buffers, activation: str) -> SparseExperts:
    """The experts whose two projections are these."""
    entry, down_array = _entry(*gate_up), _entry(*down).array
    experts = entry.experts.get(activation)
    if experts is None or experts.down is not down_array:
        experts = entry.experts[activation] = SparseExperts(entry.array, down_array, activation)
    return experts


def remember(buffers: Buffers, array: Any, experts: dict[str, SparseExperts]) -> None:
    """From now on ``buffers`` stand for ``array``, the first or second weight of ``experts``: for compact weights."""
    values, meta, indices, pattern, shape = buffers
    state, seen = _state_of(values, meta, indices, pattern, shape), _seen(values, meta, indices)
    entry = _Entry(state, _storage(values), array, experts, seen)
    _entries[values.data_ptr(), meta.data_ptr()] = entry


def forget() -> None:
    """Drop every remembered array, and what kernels derived from it; compact weights stay."""
    for place in [place for place, entry in _entries.items() if isinstance(entry.array, SparseArray)]:
        _entries.pop(place, None)


def _entry(values: Tensor, meta: Tensor, indices: Tensor | None, pattern: str, shape: Sequence[int]) -> _Entry:
    key = values.data_ptr(), meta.data_ptr()
    entry = _entries.get(key)
    if entry is not None and entry.is_of(values, meta, indices, pattern, shape):
        return entry
    if values.is_inference() or meta.is_inference():  # torch counts no versions of these
        return _Entry((), _storage(values), _build(values, meta, indices, pattern, shape), {})
    state = _state_of(values, meta, indices, pattern, shape)
    if entry is not None and entry.state == state and not entry.storage.expired():
        return entry
    array = _build(values, meta, indices, pattern, shape)
    entry = _Entry(state, _storage(values), array, {}, _seen(values, meta, indices))
    for place, old in list(_entries.items()):
        if old.storage.expired():
            _entries.pop(place, None)
    if all(key):  # an empty tensor has no address
        _entries[key] = entry
    return entry


def _storage(values: Tensor) -> StorageWeakRef:
    return StorageWeakRef(values.untyped_storage())


def _state_of(values: Tensor, meta: Tensor, indices: Tensor | None, pattern: str, shape: Sequence[int]) -> tuple:
    return pattern, *shape, _state(values), _state(meta), None if indices is None else _state(indices)


def _state(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor._version, tensor.dtype, tensor.shape, tensor.stride()


def _build(values: Tensor, meta: Tensor, indices: Tensor | None, pattern: str, shape: Sequence[int]) -> SparseArray:
    check_canonical(values, meta)
    kind, buffers = parse(pattern), {"values": values, "meta": meta, "indices": indices}
    for name, buffer in buffers.items():
        if buffer is not None and not buffer.is_contiguous():
            raise NMSparseError(f"{name}: expected a contiguous tensor, got strides {buffer.stride()}")
    held = {name: _borrow(buffer) for name, buffer in buffers.items() if buffer is not None}
    array = CLASSES[kind.format](kind, tuple(shape), held)
    array.check_format()
    # Positions of two bits cannot point outside; bytes can, and a kernel would follow them.
    places = indices if indices is not None else None if kind.format == "nm" and is_24(kind) else meta
    if places is not None and places.numel() and int(places.max()) >= kind.m:
        raise NMSparseError(f"{pattern}: meta or indices hold positions outside 0..{kind.m - 1}; they are corrupt")
    return array


def _borrow(tensor: Tensor) -> np.ndarray | DeviceArray:
    """``tensor`` as an array that does not keep its memory alive."""
    array = as_array(tensor.detach())
    if isinstance(array, DeviceArray):
        return DeviceArray(array.pointer, tuple(array.shape), array.dtype, array.device)
    return np.asarray(_Address(array)).view(array.dtype)


class _Address:
    """Memory of somebody else, described for NumPy."""

    def __init__(self, array: np.ndarray):
        where, unsigned = (array.ctypes.data, False), f"<u{array.itemsize}"
        self.__array_interface__ = {"version": 3, "shape": array.shape, "typestr": unsigned, "data": where}
