"""The NVIDIA GPUs of this machine, asked of the driver library itself, so that no CUDA package is needed."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_COMPUTE_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


class _Refused(Exception):
    pass


def gpus() -> dict[str, Any]:
    """``devices`` (name, compute capability, memory in bytes) and ``driver``, the CUDA it supports; or ``problem``.

    >>> facts = gpus()
    >>> "problem" in facts or len(facts["devices"]) > 0
    True
    """
    try:
        cuda = ctypes.CDLL(_LIBRARY)
    except OSError:
        return {"devices": [], "problem": f"no NVIDIA driver ({_LIBRARY} not found)"}
    try:
        _call(cuda.cuInit, 0)
        count = _number(cuda.cuDeviceGetCount)
        version = _number(cuda.cuDriverGetVersion)
        devices = [_device(cuda, index) for index in range(count)]
    except (_Refused, AttributeError) as error:
        return {"devices": [], "problem": f"the NVIDIA driver does not answer ({error})"}
    facts: dict[str, Any] = {"devices": devices, "driver": f"CUDA {version // 1000}.{version % 1000 // 10}"}
    return facts if devices else facts | {"problem": "the NVIDIA driver shows no GPU"}


def _device(cuda: ctypes.CDLL, index: int) -> dict[str, Any]:
    handle = _number(cuda.cuDeviceGet, index)
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    _call(cuda.cuDeviceGetName, name, len(name), handle)
    _call(cuda.cuDeviceTotalMem_v2, ctypes.byref(memory), handle)
    major, minor = (_number(cuda.cuDeviceGetAttribute, code, handle) for code in _COMPUTE_CAPABILITY)
    return {
        "name": name.value.decode(errors="replace"),
        "compute_capability": f"{major}.{minor}",
        "memory": memory.value,
    }


def _number(function: Any, *arguments: int) -> int:
    """What a driver function writes through its first argument, an int."""
    result = ctypes.c_int()
    _call(function, ctypes.byref(result), *arguments)
    return result.value


def _call(function: Any, *arguments: Any) -> None:
    code = function(*arguments)
    if code:
        raise _Refused(f"{function.__name__} returned {code}")
