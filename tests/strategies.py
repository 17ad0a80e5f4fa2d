"""Hypothesis strategies shared by the tests: patterns, shapes and weights that are hard on purpose."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from nmsparse.formats import NM, VNM, Pattern, Samoyeds

DTYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]

# The hardware's patterns, wider groups, sizes that divide nothing, more rows or columns than the weight has.
PATTERNS = [
    "2:4", "1:4", "1:2", "4:8", "5:16", "3:7", "4:4",
    "vnm:64:2:8", "vnm:4:2:8", "vnm:16:2:4", "vnm:3:2:5", "vnm:1:2:16",
    "samoyeds:1:2:128", "samoyeds:1:2:4", "samoyeds:1:2:16", "samoyeds:2:4:32", "samoyeds:3:5:12", "samoyeds:2:2:8",
]  # fmt: skip


@st.composite
def patterns(draw: st.DrawFn) -> Pattern:
    """Any legal pattern with small numbers."""
    m = draw(st.integers(1, 9))
    nm = NM(draw(st.integers(1, m)), m)
    samoyeds = Samoyeds(nm.n, nm.m, 4 * draw(st.integers(1, 10)))
    return draw(st.sampled_from([NM(2, 4), nm, VNM(draw(st.integers(1, 9)), 2, draw(st.integers(4, 12))), samoyeds]))


shapes = st.tuples(st.integers(1, 24), st.integers(1, 70))
expert_shapes = st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 40))


@st.composite
def weights(draw: st.DrawFn, shape: st.SearchStrategy = shapes | expert_shapes, special: bool = True) -> np.ndarray:
    """A weight: normal numbers, small integers (ties), mostly zeros, and with ``special`` also −0.0, NaN and ±inf."""
    size, dtype = draw(shape), draw(st.sampled_from(DTYPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["normal", "ties", "sparse"] + ["special"] * special))
    if kind == "normal":
        w = rng.standard_normal(size)
    elif kind == "ties":
        w = rng.integers(-2, 3, size).astype(float)
    elif kind == "sparse":
        w = rng.standard_normal(size) * (rng.random(size) < 0.2)
    else:
        w = rng.choice([0.0, -0.0, 1.0, -2.0, np.nan, np.inf, -np.inf], size)
    return w.astype(dtype)


def bits(a: np.ndarray) -> np.ndarray:
    """The bits of a float array, so that NaN equals itself and −0.0 differs from 0.0."""
    return np.ascontiguousarray(a).view(f"u{a.dtype.itemsize}")
