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
from typing import Any

from ..errors import UnsupportedDeviceError

__all__ = [
    "Kernel",
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
LAUNCH_CLUSTER = 4


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


class Kernel:
    """A kernel of a cubin, ready to launch: ``kernel(grid, stream, *arguments)``.

    ``signature`` has a letter for each parameter: ``p`` an address, ``i`` an int32, ``m`` a tensor map.
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
        what: str = "",
    ):
        self._call, self._what = driver(), what or entry
        self._struct = struct.Struct("".join({"p": "Q", "i": "i4x", "m": "128s"}[letter] for letter in signature))
        self._library, self._kernel = POINTER(), POINTER()
        device = current_device()
        load = (ctypes.byref(self._library), code, None, None, 0, None, None, 0)
        self._call("cuLibraryLoadData", *load, doing=self._what)
        self._call("cuLibraryGetKernel", ctypes.byref(self._kernel), self._library, entry.encode(), doing=self._what)
        if shared_bytes > 48 * 1024:
            limit = (MAX_DYNAMIC_SHARED, shared_bytes, self._kernel, device)
            self._call("cuKernelSetAttribute", *limit, doing=f"{self._what}: {shared_bytes} bytes of shared memory")
        self._shape, self._signature = (threads, shared_bytes, cluster), signature
        self._local = threading.local()
        self._launch = self._call.library.cuLaunchKernelEx

    def _prepared(self) -> tuple[Any, ...]:
        """This thread's launch structures; the driver copies the arguments before a launch returns."""
        threads, shared_bytes, cluster = self._shape
        attributes = (_Attribute * 1)()
        attributes[0].id = LAUNCH_CLUSTER
        attributes[0].value[0:3] = [cluster, 1, 1]
        config = _Config((U32 * 3)(1, 1, 1), (U32 * 3)(threads, 1, 1), shared_bytes, None, attributes, int(cluster > 1))
        values = ctypes.create_string_buffer(self._struct.size)
        places, at = [], ctypes.addressof(values)
        for letter in self._signature:
            places.append(at)
            at += 128 if letter == "m" else 8
        pointers = (POINTER * len(places))(*places)
        self._local.state = config, values, pointers, ctypes.byref(config)
        return self._local.state

    def __call__(self, grid: int, stream: int, *arguments: Any) -> None:
        try:
            config, values, pointers, reference = self._local.state
        except AttributeError:
            config, values, pointers, reference = self._prepared()
        self._struct.pack_into(values, 0, *arguments)
        config.grid[0] = grid
        config.stream = stream
        if code := self._launch(reference, self._kernel, pointers, None):
            raise CudaError(f"launch of {self._what}, {grid} blocks: {self._call.message(code)}")


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
    status, number = ctypes.c_int(), U64()
    driver()("cuStreamGetCaptureInfo_v2", POINTER(stream), ctypes.byref(status), ctypes.byref(number), None, None, None)
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
