"""How long ``import nmsparse`` takes in a fresh interpreter."""

from __future__ import annotations

import statistics
import subprocess
import sys

from . import bar

PROBE = """
import sys, time
start = time.perf_counter()
import nmsparse
print((time.perf_counter() - start) * 1e3, *({"numba", "torch"} & set(sys.modules)))
"""


def run() -> list[dict]:
    """Median of nine fresh interpreters, in milliseconds; neither numba nor torch may be loaded."""
    times, loaded = [], set()
    for _ in range(9):
        out = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True).stdout.split()
        times.append(float(out[0]))
        loaded |= set(out[1:])
    return [
        bar("import nmsparse, ms", statistics.median(times), 100, at_least=False),
        bar("heavy packages loaded by it", len(loaded), 0, at_least=False),
    ]
