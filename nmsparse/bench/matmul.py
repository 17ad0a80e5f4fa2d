"""Products on the CPU: each format against NumPy's dense product and SciPy's CSR, from one token to a thousand."""

from __future__ import annotations

import numpy as np

from ..errors import require
from ..ops import array
from . import PATTERNS, bar
from .timing import medians

SHAPES = ((4096, 4096), (1408, 2048))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
OTHERS = ("1:4", "4:8")  # no hardware multiplies these: shown without a bar, at a few token counts
SHOWN = (1, 4, 16, 256)
# pattern -> tokens -> at least this many times NumPy's dense product; 0.9 everywhere else.
FASTER = {"2:4": {1: 1.3, 4: 1.3}, "samoyeds:1:2:128": {1: 2.0, 4: 2.0}}


def run() -> list[dict]:
    """Times dense over sparse for every shape, pattern and token count, fp32, token-major ``x``."""
    scipy_sparse = require("scipy.sparse", "bench")
    rows = []
    rng = np.random.default_rng(0)
    small, one = array(np.ones((16, 64), np.float32), "2:4"), np.ones((1, 64), np.float32)
    overhead = medians({"call": lambda: one @ small.T})["call"] * 1e6
    print(f"one token times a 16 x 64 matrix, which is all overhead: {overhead:.1f} µs")
    rows.append({"what": "overhead of a product, µs", "value": overhead})
    for shape in SHAPES:
        w = rng.standard_normal(shape, np.float32)
        arrays = {pattern: array(w, pattern) for pattern in (*PATTERNS, *OTHERS)}
        for tokens in TOKENS:
            x = rng.standard_normal((tokens, shape[1]), np.float32)
            runs = {"dense": lambda x=x, w=w: x @ w.T}
            chosen = (*PATTERNS, *OTHERS) if tokens in SHOWN else PATTERNS
            runs |= {pattern: lambda x=x, A=arrays[pattern]: x @ A.T for pattern in chosen}
            if tokens == 64:
                csr, columns = scipy_sparse.csr_array(arrays["2:4"].todense()), np.ascontiguousarray(x.T)
                runs["csr"] = lambda csr=csr, columns=columns: csr @ columns
            seconds = medians(runs)
            print(
                f"\n{shape}, {tokens} tokens: " + ", ".join(f"{name} {t * 1e3:.2f} ms" for name, t in seconds.items())
            )
            for pattern in PATTERNS:
                what = f"{shape} T={tokens} {pattern}, dense time / ours"
                bound = FASTER.get(pattern, {}).get(tokens, 0.9)
                rows.append({**bar(what, seconds["dense"] / seconds[pattern], bound), "seconds": seconds[pattern]})
            for pattern in chosen[len(PATTERNS) :]:
                ratio = seconds["dense"] / seconds[pattern]
                print(f"{shape} T={tokens} {pattern}, dense time / ours: {ratio:.2f}")
                rows.append({"what": f"{shape} T={tokens} {pattern}, dense time / ours", "value": ratio})
            if "csr" in seconds:
                rows.append(bar(f"{shape} T={tokens} 2:4, SciPy CSR time / ours", seconds["csr"] / seconds["2:4"], 4))
    return rows
