"""The CUDA driver through ctypes: the only file that calls it.

Errors carry the driver's own message and what was being done. Works in the context that is current, else in the
primary context of device 0, the one that torch and cupy use too.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from ..errors import UnsupportedDeviceError

__all__ = [
    "Kernel",
    "Recording",
    "Varying",
    "allocate",
    "attribute",
    "capability",
    "copy_on_device",
    "copy_to_device",
    "copy_to_host",
    "current_device",
    "device_of",
    "driver",
    "free",
    "synchronize",
    "tensor_map",
    "using",
    "wait_for_legacy_stream",
]

U32, U64, POINTER = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p

# CUdevice_attribute, CUfunction_attribute, CUlaunchAttributeID: the values of cuda.h.
SM_COUNT, CAPABILITY_MAJOR, CAPABILITY_MINOR, MEMORY_CLOCK, BUS_WIDTH = 16, 75, 76, 36, 37
MAX_DYNAMIC_SHARED = 8
LAUNCH_CLUSTER, LAUNCH_OVERLAPPING = 4, 6  # the latter: programmatic stream serialization


class CudaError(UnsupportedDeviceError):
    """A call of the driver failed."""


class Driver:
    """``driver()(name, *args)`` calls ``name`` and raises :class:`CudaError` unless it succeeds."""

    def __init__(self) -> None:
        names = ("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1", "libcuda.so")
        for name in names:
            try:
                self.library = ctypes.CDLL(name)
                break
            except OSError:
                continue
        else:
            raise UnsupportedDeviceError(f"no NVIDIA driver: {' or '.join(names)} could not be loaded")
        self("cuInit", 0)

    def __call__(self, name: str, *args: Any, doing: str = "") -> None:
        if code := getattr(self.library, name)(*args):
            raise CudaError(f"{name}{' (' + doing + ')' if doing else ''}: {self.message(code)}")

    def message(self, code: int) -> str:
        """The driver's words for an error code."""
        text = ctypes.c_char_p()
        self.library.cuGetErrorString(code, ctypes.byref(text))
        return f"{(text.value or b'unknown error').decode()} ({code})"


@functools.lru_cache(maxsize=1)
def driver() -> Driver:
    """The driver, loaded at first use."""
    return Driver()


def current_device() -> int:
    """Number of the current context's device; device 0 and its primary context if there is no context."""
    call, device, context = driver(), ctypes.c_int(), POINTER()
    call("cuCtxGetCurrent", ctypes.byref(context))
    if not context:
        call("cuDeviceGet", ctypes.byref(device), 0)
        call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        call("cuCtxSetCurrent", context)
    call("cuCtxGetDevice", ctypes.byref(device))
    return device.value


@functools.cache
def attribute(number: int, device: int) -> int:
    """A CUdevice_attribute."""
    value = ctypes.c_int()
    driver()("cuDeviceGetAttribute", ctypes.byref(value), number, device)
    return value.value


def capability(device: int) -> tuple[int, int]:
    """Compute capability, ``(9, 0)`` for Hopper."""
    return attribute(CAPABILITY_MAJOR, device), attribute(CAPABILITY_MINOR, device)


class _Attribute(ctypes.Structure):
    _fields_ = (("id", U32), ("pad", U32), ("value", U32 * 16))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", U32 * 3),
        ("block", U32 * 3),
        ("shared_bytes", U32),
        ("stream", POINTER),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", U32),
    )


def _attributes(cluster: int, overlaps: bool) -> ctypes.Array[_Attribute]:
    """Those of a launch that differ from the driver's defaults.

    >>> [(found.id, found.value[:3]) for found in _attributes(2, True)], len(_attributes(1, False))
    ([(4, [2, 1, 1]), (6, [1, 0, 0])], 0)
    """
    wanted = [(LAUNCH_CLUSTER, (cluster, 1, 1))] * (cluster > 1) + [(LAUNCH_OVERLAPPING, (1,))] * overlaps
    return (_Attribute * len(wanted))(*(_Attribute(number, 0, value) for number, value in wanted))


class Kernel:
    """A kernel of a cubin, ready to launch: ``kernel(grid, stream, *arguments)``.

    ``signature`` has a letter for each parameter: ``p`` an address, ``i`` an int32, ``m`` a tensor map. With
    ``overlaps`` it may begin while the launch before it on its stream still runs, and itself waits for its end.
    """

    def __init__(
        self,
        code: bytes,
        entry: str,
        signature: str,
        *,
        threads: int,
        shared_bytes: int,
        cluster: int = 1,
        overlaps: bool = False,
        what: str = "",
    ):
        self._call, self._what = driver(), what or entry
        self._struct = struct.Struct("".join({"p": "Q", "i": "i4x", "m": "128s"}[letter] for letter in signature))
        self._library, self.handle = POINTER(), POINTER()
        device = current_device()
        load = (ctypes.byref(self._library), code, None, None, 0, None, None, 0)
        self._call("cuLibraryLoadData", *load, doing=self._what)
        self._call("cuLibraryGetKernel", ctypes.byref(self.handle), self._library, entry.encode(), doing=self._what)
        if shared_bytes > 48 * 1024:
            limit = (MAX_DYNAMIC_SHARED, shared_bytes, self.handle, device)
            self._call("cuKernelSetAttribute", *limit, doing=f"{self._what}: {shared_bytes} bytes of shared memory")
        self._shape, self._signature = (threads, shared_bytes, _attributes(cluster, overlaps)), signature
        self.fill = self._struct.pack_into  # fill(values, 0, *arguments)
        self._local = threading.local()
        self.enter = self._call.library.cuLaunchKernelEx  # copies the arguments before it returns

    def prepare(self, grid: int = 1, stream: int = 0) -> Prepared:
        """The structures of a launch, with room for its arguments."""
        threads, shared_bytes, attributes = self._shape
        grids, block = (U32 * 3)(grid, 1, 1), (U32 * 3)(threads, 1, 1)
        config = _Config(grids, block, shared_bytes, stream, attributes, len(attributes))
        values = ctypes.create_string_buffer(self._struct.size)
        places, at = [], ctypes.addressof(values)
        for letter in self._signature:
            places.append(at)
            at += 128 if letter == "m" else 8
        return Prepared(self, config, values, (POINTER * len(places))(*places), ctypes.byref(config))

    def error(self, code: int) -> CudaError:
        """What is wrong with a launch."""
        return CudaError(f"launch of {self._what}: {self._call.message(code)}")

    def __call__(self, grid: int, stream: int, *arguments: Any) -> None:
        if _recordings and (recording := _recordings.get(threading.get_ident())) is not None:
            recording.add(self, grid, stream, arguments)
            return
        try:
            prepared = self._local.prepared
        except AttributeError:
            prepared = self._local.prepared = self.prepare()
        config = prepared.config
        config.grid[0] = grid
        config.stream = stream
        self.fill(prepared.values, 0, *arguments)
        if code := self.enter(prepared.reference, self.handle, prepared.pointers, None):
            raise self.error(code)


class Prepared(NamedTuple):
    """Structures of one launch of a kernel: the driver's configuration, and the arguments with their addresses."""

    kernel: Kernel
    config: _Config
    values: Any
    pointers: Any
    reference: Any


class Varying(int):
    """An address that each repetition of a :class:`Recording` gives anew: value number ``number`` of it.

    >>> address = Varying(0x1000, 2)
    >>> address == 0x1000, address.number
    (True, 2)
    """

    number: int

    def __new__(cls, value: int, number: int) -> Varying:
        self = super().__new__(cls, value)
        self.number = number
        return self


class Recording:
    """Launches that were described once and are repeated with other addresses: ``recording(*values)``.

    While it is entered, launches of this thread are added to it and not made. An argument that is a :class:`Varying`
    becomes ``values[number]`` of each repetition. One thread at a time may repeat it.
    """

    def __init__(self) -> None:
        self.launches: list[Prepared] = []
        self.places: list[tuple[Any, int, int]] = []  # 64-bit words of the arguments of a launch, which, which value

    def __enter__(self) -> Recording:
        _recordings[threading.get_ident()] = self
        return self

    def __exit__(self, *_: object) -> None:
        del _recordings[threading.get_ident()]

    def add(self, kernel: Kernel, grid: int, stream: int, arguments: tuple[Any, ...]) -> None:
        """Another launch."""
        prepared = kernel.prepare(grid, stream)
        kernel.fill(prepared.values, 0, *arguments)
        words, first = memoryview(prepared.values).cast("B").cast("Q"), ctypes.addressof(prepared.values)
        for argument, place in zip(arguments, prepared.pointers, strict=True):
            if isinstance(argument, Varying):
                self.places.append((words, (place - first) // 8, argument.number))
        self.launches.append(prepared)

    def __call__(self, *values: int) -> None:
        for words, place, number in self.places:
            words[place] = values[number]
        for kernel, _, _, pointers, reference in self.launches:
            if code := kernel.enter(reference, kernel.handle, pointers, None):
                raise kernel.error(code)


_recordings: dict[int, Recording] = {}  # by thread


def tensor_map(address: int, shape: Sequence[int], pitches: Sequence[int], box: Sequence[int], dtype: str) -> bytes:
    """The 128 bytes that describe an array of 16-bit elements to the copy engine, 128-byte swizzle.

    ``shape`` and ``box``, the part that one copy brings, slowest axis first; ``pitches`` are the bytes from one index
    to the next of all axes but the last, which is contiguous. The address and the pitches have to be multiples of 16.
    Source: CUDA driver API, cuTensorMapEncodeTiled.
    """
    data = ctypes.create_string_buffer(128 + 64)
    place = (ctypes.addressof(data) + 63) & ~63
    kind = {"f16": 6, "bf16": 9}[dtype]  # CU_TENSOR_MAP_DATA_TYPE
    axes = len(shape)
    driver()(
        "cuTensorMapEncodeTiled",
        POINTER(place),
        kind,
        axes,
        POINTER(address),
        (U64 * axes)(*shape[::-1]),
        (U64 * (axes - 1))(*pitches[::-1]),
        (U32 * axes)(*box[::-1]),
        (U32 * axes)(*[1] * axes),
        0,  # not interleaved
        3,  # CU_TENSOR_MAP_SWIZZLE_128B
        2,  # CU_TENSOR_MAP_L2_PROMOTION_L2_128B
        0,  # what lies outside reads as zeros
        doing=f"tensor map of {[*shape]} elements, pitches of {[*pitches]} bytes",
    )
    return ctypes.string_at(place, 128)


# --- memory ----------------------------------------------------------------------------------------------------------

POINTER_DEVICE = 9  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
EVENT_WITHOUT_TIMING = 2


@functools.cache
def _primary_context(device: int) -> POINTER:
    """The context that the CUDA runtime, and so torch and cupy, use on ``device``."""
    context, handle = POINTER(), ctypes.c_int()
    driver()("cuDeviceGet", ctypes.byref(handle), device, doing=f"device {device}")
    driver()("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle, doing=f"device {device}")
    return context


@contextmanager
def using(device: int) -> Iterator[None]:
    """What is inside runs with ``device`` as the current one."""
    call, context = driver(), POINTER()
    call("cuCtxPushCurrent_v2", _primary_context(device))
    try:
        yield
    finally:
        call("cuCtxPopCurrent_v2", ctypes.byref(context))


def allocate(nbytes: int, device: int) -> int:
    """Address of ``nbytes`` of memory of ``device``, a multiple of 256; :func:`free` gives them back."""
    address = U64()
    with using(device), relaxed_capture():
        driver()("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes), doing=f"{nbytes} bytes")
    return address.value


def free(address: int, device: int) -> None:
    """Give memory back. Waits for the kernels that may still use it."""
    with using(device), relaxed_capture():
        driver()("cuMemFree_v2", U64(address))


def copy_to_device(address: int, source: int, nbytes: int, device: int) -> None:
    """From host address ``source``; complete on return."""
    _copy("cuMemcpyHtoDAsync_v2", U64(address), POINTER(source), nbytes, device)


def copy_to_host(target: int, address: int, nbytes: int, device: int) -> None:
    """To host address ``target``, after all work that ``device`` has been given; complete on return."""
    with using(device):
        driver()("cuCtxSynchronize")
    _copy("cuMemcpyDtoHAsync_v2", POINTER(target), U64(address), nbytes, device)


def copy_on_device(target: int, address: int, nbytes: int, device: int) -> None:
    """Between addresses of one device, on the legacy default stream."""
    _copy("cuMemcpyDtoDAsync_v2", U64(target), U64(address), nbytes, device)


def _copy(name: str, target: Any, source: Any, nbytes: int, device: int) -> None:
    with using(device):
        driver()(name, target, source, ctypes.c_size_t(nbytes), None, doing=f"{nbytes} bytes")
        driver()("cuStreamSynchronize", None)


def synchronize(stream: int, device: int) -> None:
    """Wait until ``stream`` has done all that it was given."""
    with using(device):
        driver()("cuStreamSynchronize", POINTER(stream), doing="a stream under capture cannot be waited for")


def wait_for_legacy_stream(stream: int, device: int) -> None:
    """Make ``stream`` wait for the work that the legacy default stream has been given so far; the host does not."""
    call, event = driver(), POINTER()
    with using(device):
        call("cuEventCreate", ctypes.byref(event), EVENT_WITHOUT_TIMING)
        call("cuEventRecord", event, None)
        call("cuStreamWaitEvent", POINTER(stream), event, 0)
        call("cuEventDestroy_v2", event)


def device_of(address: int) -> int:
    """Number of the device that holds ``address``."""
    device = ctypes.c_int()
    driver()("cuPointerGetAttribute", ctypes.byref(device), POINTER_DEVICE, U64(address), doing=f"address {address:#x}")
    return device.value


# --- graphs ----------------------------------------------------------------------------------------------------------


def capture_id(stream: int) -> int:
    """Number of the capture into a graph that ``stream`` is under, 0 if none."""
    call, status = driver(), ctypes.c_int()
    # Every call of a layer asks: by the short question, and without the words of a general call.
    if not call.library.cuStreamIsCapturing(POINTER(stream), ctypes.byref(status)) and not status.value:
        return 0
    number = U64()
    call("cuStreamGetCaptureInfo_v2", POINTER(stream), ctypes.byref(status), ctypes.byref(number), None, None, None)
    return number.value if status.value else 0


@contextmanager
def relaxed_capture() -> Iterator[None]:
    """What is inside may allocate and copy although a stream is under capture; it is not captured."""
    mode = ctypes.c_int(2)  # CU_STREAM_CAPTURE_MODE_RELAXED
    driver()("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    try:
        yield
    finally:
        driver()("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
