"""A panel: the tokens of a tile transposed, so that a column of all of them is one vector.

Element ``column * tokens + t`` is column ``column`` of token ``t``.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .operand import INLINED
from .simd import add, at, fma, load, put, splat, store, transpose


@njit(**INLINED)
def fill_panel(panel, x, width, token_ids, first, count, starts, tokens, side):
    """Transpose the tokens of a tile, ``side`` at a time; ``starts`` is room for where these start.

    The lanes after the last token repeat it and are never read.
    """
    whole = width // side * side
    for t in range(0, tokens, side):
        for i in range(side):
            put(starts, i, row_of(t + i, token_ids, first, count) * width)
        for column in range(0, whole, side):
            transpose(x, starts, column, panel, column * tokens + t, tokens, side)
        for column in range(whole, width):
            for i in range(side):
                put(panel, column * tokens + t + i, at(x, at(starts, i) + column))


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
