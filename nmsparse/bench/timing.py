"""Fair timing on a CPU: warm up, interleave the candidates, take medians."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable


def medians(candidates: dict[str, Callable[[], object]], seconds: float = 0.4, least: int = 7) -> dict[str, float]:
    """Median seconds of each candidate, run in turn so that a disturbance of the machine meets all of them alike.

    >>> sorted(medians({"a": lambda: None, "b": lambda: None}, seconds=0.001))
    ['a', 'b']
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    start = time.perf_counter()
    while min(map(len, times.values())) < least or time.perf_counter() - start < seconds * len(candidates):
        for name, run in candidates.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def processor() -> str:
    """The CPU's own name, where the system tells it."""
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
