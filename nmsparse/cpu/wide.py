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
from .simd import address, at, put, splat, store, transpose

ROWS = 256  # dense rows whose sums are kept at a time
SIDE = 16  # tokens or rows that are transposed at a time, at most


@njit(cache=True, nogil=True)
def wide_8(bell, wake, *job):
    """:func:`wide` for tiles of up to 8 tokens, shared by a team; ``job`` is ``a, x, token_ids, tiles, parts, y``."""
    return share(bell, wake, _wide_8, job)


@njit(**INLINED)
def _wide_8(queue, a, x, token_ids, tiles, parts, y):
    wide(queue, a, x, token_ids, tiles, parts, y, make_room(a, 8), 8, 8)


@njit(cache=True, nogil=True)
def wide_32(bell, wake, *job):
    """:func:`wide` for tiles of up to 32 tokens, shared by a team; ``job`` is ``a, x, token_ids, tiles, parts, y``."""
    return share(bell, wake, _wide_32, job)


@njit(**INLINED)
def _wide_32(queue, a, x, token_ids, tiles, parts, y):
    wide(queue, a, x, token_ids, tiles, parts, y, make_room(a, 32), 32, SIDE)


@njit(cache=True, nogil=True)
def wide_64(bell, wake, *job):
    """:func:`wide` for tiles of up to 64 tokens, shared by a team; ``job`` is ``a, x, token_ids, tiles, parts, y``."""
    return share(bell, wake, _wide_64, job)


@njit(**INLINED)
def _wide_64(queue, a, x, token_ids, tiles, parts, y):
    wide(queue, a, x, token_ids, tiles, parts, y, make_room(a, 64), 64, SIDE)


@njit(cache=True, nogil=True)
def wide_128(bell, wake, *job):
    """:func:`wide` for tiles of up to 128 tokens, shared by a team; ``job`` is ``a, x, token_ids, tiles, parts, y``."""
    return share(bell, wake, _wide_128, job)


@njit(**INLINED)
def _wide_128(queue, a, x, token_ids, tiles, parts, y):
    wide(queue, a, x, token_ids, tiles, parts, y, make_room(a, 128), 128, SIDE)


@njit(**INLINED)
def make_room(a, tokens):
    """What one thread works in. Its caller must hold it: :func:`wide` takes addresses of it."""
    panel, sums = aligned(panel_columns(a) * tokens), aligned((ROWS + a.m) * tokens)
    weights, offsets = aligned(chunk_values(a, tokens)), aligned(chunk_values(a, tokens)).view(np.int32)
    return panel, sums, weights, offsets, aligned(chunk_planes(a, tokens)).view(np.int32), np.empty(SIDE, np.int64)


@njit(**INLINED)
def wide(queue, a, x, token_ids, tiles, parts, y, room, tokens, side):
    """Rows of ``y`` for tiles of up to ``tokens``. A task is one tile and one of ``parts`` of the rows.

    ``side`` is how many tokens or rows are transposed at a time; both are literals.
    """
    a, tasks, width, height = addresses(a), len(tiles) * parts, x.shape[1], y.shape[1]
    panel, sums, weights, offsets, planes, starts = room
    x, y, panel, sums = address(x), address(y), address(panel), address(sums)
    weights, offsets, planes, starts = address(weights), address(offsets), address(planes), address(starts)
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
            fill_panel(panel, x, width, token_ids, first, count, starts, tokens, side)
            ready = tile
        group, stop = groups * part // parts, groups * (part + 1) // parts
        while group < stop:
            until = min(stop, group + step)
            for i in range((until - group) * a.m):
                store(sums, i * tokens, splat(np.float32(0), tokens))
            add_products(a, expert, group, until, panel, sums, weights, offsets, planes, tokens)
            top = group * a.m
            rows = min(until * a.m, height) - top
            write_sums(sums, rows, starts, y, first * height + top, height, count, tokens, side)
            group = until
        task = next_task(queue)


@njit(**INLINED)
def write_sums(sums, rows, starts, y, start, height, count, tokens, side):
    """The sums of ``rows`` rows and ``count`` tokens, token by token from ``y[start]`` on."""
    for r in range(side):
        put(starts, r, r * tokens)
    for t in range(0, count, side):
        for row in range(0, rows, side):
            i, target = row * tokens + t, start + t * height + row
            if row + side <= rows and t + side <= count:
                transpose(sums, starts, i, y, target, height, side)
            else:
                for r in range(min(side, rows - row)):
                    for c in range(min(side, count - t)):
                        put(y, target + c * height + r, at(sums, i + r * tokens + c))
