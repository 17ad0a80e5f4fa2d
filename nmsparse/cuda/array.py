"""Arrays on a GPU: the library's own, minimal one, and zero-copy views of everybody else's.

Rule of streams: what a :class:`DeviceArray` of this library holds was written on the legacy default stream, or was
complete before anybody could see it. Work on a caller's array runs on the caller's stream.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..errors import NMSparseError, UnsupportedDeviceError
from . import dlpack, driver
from .dlpack import c_strides

__all__ = [
    "DeviceArray",
    "Kind",
    "comparable",
    "current_stream",
    "empty",
    "empty_like_kind",
    "from_host",
    "kind_of",
    "view",
]


class DeviceArray:
    """Memory of a GPU as an array: ``pointer``, ``shape``, ``dtype``, ``strides`` (in elements), ``device`` (number).

    It owns nothing itself; ``owner`` is whatever keeps the memory alive. Other libraries take it without a copy
    (``torch.from_dlpack(a)``, ``cupy.asarray(a)``); :meth:`numpy` copies it to the host. The first axis can be indexed.

    >>> a = DeviceArray(0x1000, (2, 3), np.dtype(np.float16), 0)
    >>> a, a[1].pointer - a.pointer, a.T.strides
    (DeviceArray(float16[2, 3], device='cuda:0'), 6, (1, 3))
    """

    __slots__ = ("__weakref__", "device", "dtype", "owner", "pointer", "shape", "strides")

    def __init__(
        self,
        pointer: int,
        shape: tuple[int, ...],
        dtype: np.dtype,
        device: int,
        owner: Any = None,
        strides: tuple[int, ...] | None = None,
    ):
        self.pointer, self.shape, self.dtype, self.device, self.owner = pointer, shape, dtype, device, owner
        self.strides = c_strides(shape) if strides is None else strides

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return self.size * self.dtype.itemsize

    @property
    def contiguous(self) -> bool:
        """Whether the elements follow each other in C order."""
        inside = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != inside:
                return False
            inside *= size
        return True

    @property
    def T(self) -> DeviceArray:
        """The same memory with the axes in reverse order."""
        return DeviceArray(self.pointer, self.shape[::-1], self.dtype, self.device, self, self.strides[::-1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> DeviceArray:
        if not isinstance(index, (int, np.integer)) or not self.shape:
            raise NMSparseError(f"{self!r} takes one integer index, got {index!r}; slice torch.from_dlpack of it")
        if not -self.shape[0] <= index < self.shape[0]:
            raise IndexError(f"index {index} of {self.shape[0]}")
        pointer = self.pointer + int(index) % self.shape[0] * self.strides[0] * self.dtype.itemsize
        return DeviceArray(pointer, self.shape[1:], self.dtype, self.device, self, self.strides[1:])

    def reshape(self, *shape: int) -> DeviceArray:
        """The same memory in another shape; only of a contiguous array.

        >>> DeviceArray(0, (2, 3), np.dtype(np.int8), 0).reshape(3, 2).shape
        (3, 2)
        """
        if not self.contiguous or math.prod(shape) != self.size:
            raise NMSparseError(f"reshape to {shape}: expected as many elements in C order, got {self!r}")
        return DeviceArray(self.pointer, shape, self.dtype, self.device, self)

    def numpy(self) -> np.ndarray:
        """A copy on the host, after all work that the device has been given."""
        if not self.size:
            return np.empty(self.shape, self.dtype)
        span = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        raw = np.empty(span, self.dtype)
        driver.copy_to_host(raw.ctypes.data, self.pointer, raw.nbytes, self.device)
        steps = [stride * self.dtype.itemsize for stride in self.strides]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(raw, self.shape, steps)).reshape(self.shape)

    def copy(self) -> DeviceArray:
        """A copy on the same device; only of a contiguous array."""
        if not self.contiguous:
            raise NMSparseError(f"copy: expected an array in C order, got {self!r} with strides {self.strides}")
        target = empty(self.shape, self.dtype, self.device)
        if self.nbytes:
            driver.copy_on_device(target.pointer, self.pointer, self.nbytes, self.device)
        return target

    def __reduce__(self) -> tuple[Any, ...]:
        return from_host, (self.numpy(), self.device)

    def __repr__(self) -> str:
        return f"DeviceArray({self.dtype.name}[{', '.join(map(str, self.shape))}], device='cuda:{self.device}')"

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise TypeError(f"{self!r} does not come to the host by itself; call its numpy()")

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self.device

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        if dl_device not in (None, self.__dlpack_device__()) or copy:
            raise BufferError(f"DLPack: {self!r} is handed on where it lies, without a copy; call copy() or numpy()")
        if stream not in (None, -1, 1):  # none given, no waiting wanted, the legacy default stream itself
            driver.wait_for_legacy_stream(int(stream), self.device)  # type: ignore[arg-type]
        place = self.__dlpack_device__()
        return dlpack.export(dlpack.Tensor(self.pointer, self.shape, self.strides, self.dtype, place), self)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.dtype.kind not in "fiub":
            raise AttributeError(f"{self.dtype} has no type string; pass the array on through DLPack")
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "strides": None if self.contiguous else tuple(s * self.dtype.itemsize for s in self.strides),
            "stream": 1,
        }


class _Memory:
    """An allocation that gives itself back."""

    __slots__ = ("__weakref__", "pointer")

    def __init__(self, nbytes: int, device: int):
        self.pointer = driver.allocate(nbytes, device)
        # Not at exit: the driver may be gone by then, and takes everything back anyhow.
        weakref.finalize(self, driver.free, self.pointer, device).atexit = False


def empty(shape: tuple[int, ...], dtype: Any, device: int = 0) -> DeviceArray:
    """An array of ``shape`` and ``dtype`` in memory of GPU number ``device``, not initialised.

    Raises :class:`~nmsparse.errors.UnsupportedDeviceError` where there is no driver, no such device or no memory left.
    """
    shape, dtype = tuple(int(size) for size in shape), np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    memory = _Memory(nbytes, device) if nbytes else None  # the driver allocates no 0 bytes
    return DeviceArray(memory.pointer if memory else 0, shape, dtype, device, memory)


def from_host(array: np.ndarray, device: int = 0) -> DeviceArray:
    """A copy of a NumPy array in memory of GPU number ``device``, complete on return."""
    array = np.asarray(array)
    target, source = empty(array.shape, array.dtype, device), np.ascontiguousarray(array)
    if source.nbytes:
        driver.copy_to_device(target.pointer, source.ctypes.data, source.nbytes, device)
    return target


# --- everybody else's arrays -----------------------------------------------------------------------------------------


def _no_product(weight: DeviceArray) -> Callable[[Any], Any]:
    raise UnsupportedDeviceError(
        "expected an array of torch or cupy, whose float32 product makes the logits of a router; make the logits "
        "yourself and call from_logits of the experts"
    )


class Kind(NamedTuple):
    """How to deal with one library's arrays.

    ``view(x)``, ``stream(x)`` and ``empty(x, shape, dtype)`` are :func:`view`, :func:`current_stream` and
    :func:`empty_like_kind` for this library; ``address(y, shape, dtype)`` is the address of ``y`` if it is such an
    array in C order on a GPU, else None. ``linear(weight)`` of a float32 ``weight (E, H)`` is the library's own product
    ``x -> x · weightᵀ`` in float32, on its current stream.

    ``like(x, shape)`` is ``empty`` in the dtype of ``x``, ``pointer(x)`` the address of ``x`` and ``signature(x)`` all
    else that a view of it tells, to compare and to hash: who has seen an array of this signature need not look at a
    view again. They are None of arrays that only a view makes readable.
    """

    view: Callable[[Any], DeviceArray]
    stream: Callable[[Any], int]
    empty: Callable[[Any, tuple[int, ...], np.dtype], Any]
    address: Callable[[Any, tuple[int, ...], np.dtype], int | None]
    linear: Callable[[DeviceArray], Callable[[Any], Any]] = _no_product
    like: Callable[[Any, tuple[int, ...]], Any] | None = None
    pointer: Callable[[Any], int] | None = None
    signature: Callable[[Any], tuple[Any, ...]] | None = None


def view(x: Any) -> DeviceArray:
    """``x`` as a :class:`DeviceArray` on the same memory: of torch, cupy, or anything that speaks DLPack or the CUDA
    array interface. Takes about a microsecond for a torch tensor.

    Raises :class:`~nmsparse.errors.UnsupportedDeviceError` for what is not on an NVIDIA GPU.
    """
    return kind_of(x).view(x)


def current_stream(x: Any) -> int:
    """Handle of the stream that work on ``x`` belongs to: its library's current one, 0 (the legacy default stream) for
    arrays of libraries that have none."""
    return kind_of(x).stream(x)


def empty_like_kind(x: Any, shape: tuple[int, ...], dtype: np.dtype) -> Any:
    """An uninitialised array on the device of ``x``: of torch or cupy if ``x`` is, else a :class:`DeviceArray`."""
    return kind_of(x).empty(x, shape, dtype)


def comparable(x: Any) -> Any:
    """``x`` if its kind has signatures, else its view, which has."""
    kind = kind_of(x)
    return x if kind.signature else kind.view(x)


_kinds: dict[type, Kind] = {}


def kind_of(x: Any) -> Kind:
    """What the library of ``x`` needs; for callers that ask more than one of the three questions above."""
    try:
        return _kinds[type(x)]
    except KeyError:
        kind = _kinds[type(x)] = _find_kind(type(x))
        return kind


def _find_kind(of: type) -> Kind:
    """Recognises libraries by the modules of the type and its bases; imports none of them."""
    origins = {(base.__module__.split(".")[0], base.__name__) for base in of.__mro__}
    if issubclass(of, DeviceArray):
        return Kind(
            lambda x: x,
            lambda x: 0,
            _empty_plain,
            _address,
            like=lambda x, shape: empty(shape, x.dtype, x.device),
            pointer=lambda x: x.pointer,
            signature=lambda x: (x.shape, x.strides, x.dtype, x.device),
        )
    if ("torch", "Tensor") in origins:
        return _torch_kind(sys.modules["torch"])
    if ("cupy", "ndarray") in origins:
        return _cupy_kind(sys.modules["cupy"])
    return Kind(_view_by_protocol, lambda x: 0, _empty_plain, _address)


def _empty_plain(x: Any, shape: tuple[int, ...], dtype: np.dtype) -> DeviceArray:
    return empty(shape, dtype, view(x).device)


def _address(y: Any, shape: tuple[int, ...], dtype: np.dtype) -> int | None:
    there = view(y)
    return there.pointer if there.shape == shape and there.dtype == dtype and there.contiguous else None


def _torch_kind(torch: Any) -> Kind:
    names = ("float16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64", "bool", "uint16", "uint32")
    to_numpy = {getattr(torch, name): np.dtype(name) for name in names if hasattr(torch, name)}
    to_numpy[torch.bfloat16] = dlpack.BFLOAT16
    to_torch = {dtype: name for name, dtype in to_numpy.items()}
    stream_of = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # a build without CUDA has none

    def view_torch(x: Any) -> DeviceArray:
        if not x.is_cuda:
            raise _not_on_gpu(x, x.device)
        if x.requires_grad and torch.is_grad_enabled():
            raise NMSparseError("a tensor that requires grad would lose it here; use torch.no_grad() or its detach()")
        try:
            dtype = to_numpy[x.dtype]
        except KeyError:
            raise NMSparseError(f"expected a tensor of {', '.join(map(str, to_numpy))}, got {x.dtype}") from None
        return DeviceArray(x.data_ptr(), x.shape, dtype, x.get_device(), x, x.stride())

    def signature_torch(x: Any) -> tuple[Any, ...]:
        if x.requires_grad:
            view_torch(x)  # which may refuse
        return x.shape, x.stride(), x.dtype, x.get_device()

    def empty_torch(x: Any, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        return x.new_empty(shape, dtype=to_torch[dtype])

    def address_torch(y: Any, shape: tuple[int, ...], dtype: np.dtype) -> int | None:
        fits = y.is_cuda and y.shape == shape and to_numpy.get(y.dtype) == dtype and y.is_contiguous()
        return y.data_ptr() if fits else None

    def linear_torch(weight: DeviceArray) -> Callable[[Any], Any]:
        columns = torch.from_dlpack(weight.__dlpack__()).T  # a capsule waits for no stream: the weight is complete
        return lambda x: x.float() @ columns

    return Kind(
        view_torch,
        lambda x: stream_of(x.get_device()),
        empty_torch,
        address_torch,
        linear_torch,
        torch.Tensor.new_empty,
        torch.Tensor.data_ptr,
        signature_torch,
    )


def _cupy_kind(cupy: Any) -> Kind:
    def view_cupy(x: Any) -> DeviceArray:
        strides = tuple(stride // x.dtype.itemsize for stride in x.strides)
        return DeviceArray(x.data.ptr, x.shape, x.dtype, x.device.id, x, strides)

    def stream(x: Any) -> int:
        with x.device:  # the current stream is one for each device
            return cupy.cuda.get_current_stream().ptr

    def empty_cupy(x: Any, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        with x.device:
            return cupy.empty(shape, dtype)

    def linear_cupy(weight: DeviceArray) -> Callable[[Any], Any]:
        columns = cupy.asarray(weight).T
        return lambda x: x.astype(np.float32) @ columns

    def signature_cupy(x: Any) -> tuple[Any, ...]:
        return x.shape, x.strides, x.dtype, x.device.id

    def like_cupy(x: Any, shape: tuple[int, ...]) -> Any:
        return empty_cupy(x, shape, x.dtype)

    def pointer_cupy(x: Any) -> int:
        return x.data.ptr

    return Kind(view_cupy, stream, empty_cupy, _address, linear_cupy, like_cupy, pointer_cupy, signature_cupy)


def _view_by_protocol(x: Any) -> DeviceArray:
    interface = getattr(x, "__cuda_array_interface__", None)
    if interface is not None:
        return _view_interface(x, interface)
    if not hasattr(x, "__dlpack_device__"):
        raise _not_on_gpu(x, "the host")
    kind, number = x.__dlpack_device__()
    if kind not in (dlpack.CUDA, dlpack.CUDA_MANAGED):
        raise _not_on_gpu(x, "the host" if kind == 1 else f"DLPack device type {int(kind)}")
    capsule = x.__dlpack__(stream=1)  # ready for the legacy default stream
    tensor = dlpack.inspect(capsule)
    # Kept unconsumed, the capsule calls its deleter when the view is gone.
    return DeviceArray(tensor.pointer, tensor.shape, tensor.dtype, number, (x, capsule), tensor.strides)


def _view_interface(x: Any, interface: dict[str, Any]) -> DeviceArray:
    shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
    if interface.get("mask") is not None:
        raise NMSparseError(f"{type(x).__name__}: masked arrays are not supported")
    pointer, strides = interface["data"][0], interface.get("strides")
    if strides is not None:
        strides = tuple(stride // dtype.itemsize for stride in strides)
    device = driver.device_of(pointer) if pointer else driver.current_device()
    stream = interface.get("stream")
    if stream is not None and stream != 1:
        driver.synchronize(stream, device)
    return DeviceArray(pointer, shape, dtype, device, x, strides)


def _not_on_gpu(x: Any, where: Any) -> UnsupportedDeviceError:
    return UnsupportedDeviceError(
        f"expected an array on an NVIDIA GPU, got {type(x).__name__} on {where}; "
        "move one operand, a sparse array with its to_device('cuda') or to_device('cpu')"
    )
