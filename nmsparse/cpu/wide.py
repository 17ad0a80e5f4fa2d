"""Many tokens: a tile of them lies transposed in a panel, and a vector of sums, one for each token, follows a row.

A row of weights is decoded into values and the offsets of their columns in the panel; then it is ``sums += value *
panel[offset]`` for each of them. No format is left in the inner loop, and half of the multiply-adds of the dense
product, or a quarter.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .decode import add_products, chunk_planes, chunk_values, panel_columns
from .doorbell import next_task, share
from .operand import INLINED, addresses
from .panel import fill_panel
from .planes import aligned
from .simd import address, at, put, splat, store

ROWS = 256  # dense rows whose sums are kept at a time
LINE = 16  # elements of a cache line: what is transposed at a time


@njit(cache=True, nogil=True)
def wide_8(bell, wake, *job):
    """:func:`wide` for tiles of up to 8 tokens, shared by a team; ``job`` is ``a, x, token_ids, tiles, parts, y``."""
    return share(bell, wake, _wide_8, job)


@njit(**INLINED)
def _wide_8(queue, a, x, token_ids, tiles, parts, y):
    panel, sums, weights = aligned(panel_columns(a) * 8), aligned((ROWS + a.m) * 8), aligned(chunk_values(a, 8))
    offsets, planes = aligned(chunk_values(a, 8)).view(np.int32), aligned(chunk_planes(a, 8)).view(np.int32)
    wide(queue, a, x, token_ids, tiles, parts, y, panel, sums, weights, offsets, planes, 8)


@njit(cache=True, nogil=True)
def wide_32(bell, wake, *job):
    """:func:`wide` for tiles of up to 32 tokens, shared by a team; ``job`` is ``a, x, token_ids, tiles, parts, y``."""
    return share(bell, wake, _wide_32, job)


@njit(**INLINED)
def _wide_32(queue, a, x, token_ids, tiles, parts, y):
    panel, sums, weights = aligned(panel_columns(a) * 32), aligned((ROWS + a.m) * 32), aligned(chunk_values(a, 32))
    offsets, planes = aligned(chunk_values(a, 32)).view(np.int32), aligned(chunk_planes(a, 32)).view(np.int32)
    wide(queue, a, x, token_ids, tiles, parts, y, panel, sums, weights, offsets, planes, 32)


@njit(cache=True, nogil=True)
def wide_64(bell, wake, *job):
    """:func:`wide` for tiles of up to 64 tokens, shared by a team; ``job`` is ``a, x, token_ids, tiles, parts, y``."""
    return share(bell, wake, _wide_64, job)


@njit(**INLINED)
def _wide_64(queue, a, x, token_ids, tiles, parts, y):
    panel, sums, weights = aligned(panel_columns(a) * 64), aligned((ROWS + a.m) * 64), aligned(chunk_values(a, 64))
    offsets, planes = aligned(chunk_values(a, 64)).view(np.int32), aligned(chunk_planes(a, 64)).view(np.int32)
    wide(queue, a, x, token_ids, tiles, parts, y, panel, sums, weights, offsets, planes, 64)


@njit(**INLINED)
def wide(queue, a, x, token_ids, tiles, parts, y, panel, sums, weights, offsets, planes, tokens):
    """Rows of ``y`` for tiles of up to ``tokens`` (a literal). A task is one tile and one of ``parts`` of the rows."""
    a, tasks, width, height = addresses(a), len(tiles) * parts, x.shape[1], y.shape[1]
    x, y, panel, sums = address(x), address(y), address(panel), address(sums)
    weights, offsets, planes = address(weights), address(offsets), address(planes)
    groups = a.height // a.n
    step = max(1, ROWS // a.m)
    for i in range(width * tokens, panel_columns(a) * tokens):
        put(panel, i, np.float32(0))
    ready = -1
    task = next_task(queue)
    while task < tasks:
        tile, part = task // parts, task % parts
        expert, first, count = tiles[tile, 0], tiles[tile, 1], tiles[tile, 2]
        if tile != ready:
            fill_panel(panel, x, width, token_ids, first, count, tokens)
            ready = tile
        group, stop = groups * part // parts, groups * (part + 1) // parts
        while group < stop:
            until = min(stop, group + step)
            for i in range((until - group) * a.m):
                store(sums, i * tokens, splat(np.float32(0), tokens))
            add_products(a, expert, group, until, panel, sums, weights, offsets, planes, tokens)
            top = group * a.m
            rows = min(until * a.m, height) - top
            for left in range(0, rows, LINE):
                for t in range(count):
                    for row in range(left, min(left + LINE, rows)):
                        put(y, (first + t) * height + top + row, at(sums, row * tokens + t))
            group = until
        task = next_task(queue)
