"""A panel: the tokens of a tile transposed, so that a column of all of them is one vector.

Element ``column * tokens + t`` is column ``column`` of token ``t``.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .operand import INLINED
from .simd import add, at, fma, load, put, splat, store


@njit(**INLINED)
def fill_panel(panel, x, width, token_ids, first, count, tokens):
    """Transpose the tokens of a tile, eight at a time. The lanes after the last token repeat it and are never read."""
    for t in range(0, tokens, 8):
        r0, r1 = row_of(t, token_ids, first, count) * width, row_of(t + 1, token_ids, first, count) * width
        r2, r3 = row_of(t + 2, token_ids, first, count) * width, row_of(t + 3, token_ids, first, count) * width
        r4, r5 = row_of(t + 4, token_ids, first, count) * width, row_of(t + 5, token_ids, first, count) * width
        r6, r7 = row_of(t + 6, token_ids, first, count) * width, row_of(t + 7, token_ids, first, count) * width
        for column in range(width):
            i = column * tokens + t
            put(panel, i, at(x, r0 + column))
            put(panel, i + 1, at(x, r1 + column))
            put(panel, i + 2, at(x, r2 + column))
            put(panel, i + 3, at(x, r3 + column))
            put(panel, i + 4, at(x, r4 + column))
            put(panel, i + 5, at(x, r5 + column))
            put(panel, i + 6, at(x, r6 + column))
            put(panel, i + 7, at(x, r7 + column))


@njit(**INLINED)
def row_of(t, token_ids, first, count):
    """The row of x that token ``t`` of a tile is."""
    slot = first + min(t, count - 1)
    return token_ids[slot] if token_ids.size else slot


@njit(**INLINED)
def add_run(sums, i, offsets, weights, start, stop, panel, tokens):
    """Stored values ``start`` to ``stop``, all of one dense row whose sums start at ``i``. Two sums in flight."""
    even, odd = load(sums, i, tokens), splat(np.float32(0), tokens)
    while start + 2 <= stop:
        even = fma(splat(at(weights, start), tokens), load(panel, at(offsets, start), tokens), even)
        odd = fma(splat(at(weights, start + 1), tokens), load(panel, at(offsets, start + 1), tokens), odd)
        start += 2
    if start < stop:
        even = fma(splat(at(weights, start), tokens), load(panel, at(offsets, start), tokens), even)
    store(sums, i, add(even, odd))
