"""Prune-and-pack of dense weights on the CPU: speed, and memory beyond the packed output."""

from __future__ import annotations

import math
import subprocess
import sys

import ml_dtypes
import numpy as np

from ..formats import random
from ..ops import array
from . import PATTERNS, bar
from .timing import medians

SHAPE = (8192, 4096)

# A fresh process: its peak is then that of this packing alone. Compile first on a small weight of the same kind.
MEMORY_PROBE = """
import resource, sys, ml_dtypes, numpy as np, nmsparse
pattern, dtype, rows, cols = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
w = np.random.default_rng(0).standard_normal((rows, cols), np.float32).astype(dtype)
nmsparse.array(w[:256], pattern)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def now():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()
np.ones(1)
filler = np.ones(max(0, peak() - now()), np.uint8)  # lift the current size to the old peak, so that growth shows
before = peak()
A = nmsparse.array(w, pattern)
print((peak() - before) / A.nbytes)
"""


def run() -> list[dict]:
    """Million weights per second, and peak extra memory over the packed size."""
    rows = []
    rng = np.random.default_rng(0)
    for pattern in PATTERNS:
        bits = 8 * random(SHAPE, pattern, dtype=np.float16, rng=rng).nbytes / math.prod(SHAPE)
        print(f"{pattern}: {bits:.2f} bits per float16 weight")
        rows.append({"what": f"{pattern}, bits per float16 weight", "value": bits})
    w32 = rng.standard_normal(SHAPE, np.float32)
    for dtype in (np.float32, ml_dtypes.bfloat16):
        w = w32.astype(dtype)
        for pattern in PATTERNS:
            seconds = medians({"pack": lambda w=w, pattern=pattern: array(w, pattern)})["pack"]
            what = f"pack {w.dtype.name} {pattern}, million weights/s"
            rows.append(bar(what, w.size / seconds / 1e6, 100))
            if sys.platform == "linux":
                rows.append(
                    bar(
                        f"pack {w.dtype.name} {pattern}, extra memory / packed bytes",
                        extra_memory(pattern, w),
                        1.25,
                        at_least=False,
                    )
                )
    return rows


def extra_memory(pattern: str, w: np.ndarray) -> float:
    """Growth of the peak resident size while packing, the output included, over the size of the output."""
    command = [sys.executable, "-c", MEMORY_PROBE, pattern, w.dtype.name, *map(str, w.shape)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
