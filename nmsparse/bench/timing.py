"""Fair timing on a CPU: warm up, take turns in blocks, take medians."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable


def medians(candidates: dict[str, Callable[[], object]], seconds: float = 0.3, rounds: int = 2) -> dict[str, float]:
    """Median seconds of each candidate, run in blocks of ``seconds`` that take turns.

    Turns, so that a disturbance of the machine meets all of them alike; blocks, because the threads of OpenBLAS go on
    spinning for a tenth of a second after a product, on the cores that the next candidate needs.

    >>> sorted(medians({"a": lambda: None, "b": lambda: None}, seconds=0.001))
    ['a', 'b']
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    for _ in range(rounds):
        for name, run in candidates.items():
            start = begin = time.perf_counter()
            while begin - start < seconds:
                run()
                end = time.perf_counter()
                times[name].append(end - begin)
                begin = end
    return {name: statistics.median(values) for name, values in times.items()}


def processor() -> str:
    """The CPU's own name, where the system tells it."""
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
