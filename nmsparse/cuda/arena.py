"""Memory for the steps of a layer of experts: one piece for each stream, whose calls use it one after the other."""

from __future__ import annotations

import numpy as np

from . import array, driver
from .array import DeviceArray
from .config_route import MAX_EXPERTS
from .route import counters

__all__ = ["COUNTER_BYTES", "arena"]

COUNTER_BYTES = 4 * counters(MAX_EXPERTS)  # those of any layer lie where no layer keeps anything else

_arenas: dict[tuple[int, int, int], list[DeviceArray]] = {}


def arena(device: int, stream: int, nbytes: int) -> int:
    """Address of memory for the calls on ``stream``; it begins with zeros, which each call leaves as zeros.

    A graph under capture gets its own, since it may be replayed beside the stream. What is outgrown stays, for a
    running kernel or a graph may still use it; each is twice as large as the last.
    """
    held = _arenas.setdefault((device, stream, driver.capture_id(stream)), [])
    if not held or held[-1].size < nbytes:
        size = max(nbytes, 2 * held[-1].size if held else 0)
        with driver.relaxed_capture():
            memory = array.empty((size,), np.uint8, device)
            zeros = np.zeros(COUNTER_BYTES, np.uint8)
            driver.copy_to_device(memory.pointer, zeros.ctypes.data, zeros.nbytes, device)
        held.append(memory)
    return held[-1].pointer
