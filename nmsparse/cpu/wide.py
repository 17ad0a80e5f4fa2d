"""Many tokens: a tile of them lies transposed in a panel, and a vector of sums, one for each token, follows a row.

A row of weights is decoded into values and the offsets of their columns in the panel; then it is ``sums += value *
panel[offset]`` for each of them. No format is left in the inner loop, and half of the multiply-adds of the dense
product, or a quarter.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from .decode import add_products, chunk_planes, chunk_values, panel_columns
from .doorbell import next_task, share
from .operand import INLINED, addresses
from .panel import fill_panel
from .planes import aligned
from .simd import address, at, offset, put, splat, store, transpose

ROWS = 256  # dense rows whose sums are kept at a time
SIDE = 16  # tokens or rows that are transposed at a time, at most


@njit(cache=True, nogil=True)
def wide_8(bell, wake, *job):
    """:func:`wide` for tiles of up to 8 tokens, shared by a team; ``job`` is ``a, x, token_ids, tiles, parts, y``."""
    return share(bell, wake, _wide_8, job)


@njit(**INLINED)
def _wide_8(queue, a, x, token_ids, tiles, parts, y):
    wide(queue, a, x, token_ids, tiles, parts, y, make_room(a, x.shape[1], 8), 8, 8)


@njit(cache=True, nogil=True)
def wide_32(bell, wake, *job):
    """:func:`wide` for tiles of up to 32 tokens, shared by a team; ``job`` is ``a, x, token_ids, tiles, parts, y``."""
    return share(bell, wake, _wide_32, job)


@njit(**INLINED)
def _wide_32(queue, a, x, token_ids, tiles, parts, y):
    wide(queue, a, x, token_ids, tiles, parts, y, make_room(a, x.shape[1], 32), 32, SIDE)


@njit(cache=True, nogil=True)
def wide_64(bell, wake, *job):
    """:func:`wide` for tiles of up to 64 tokens, shared by a team; ``job`` is ``a, x, token_ids, tiles, parts, y``."""
    return share(bell, wake, _wide_64, job)


@njit(**INLINED)
def _wide_64(queue, a, x, token_ids, tiles, parts, y):
    wide(queue, a, x, token_ids, tiles, parts, y, make_room(a, x.shape[1], 64), 64, SIDE)


@njit(cache=True, nogil=True)
def wide_128(bell, wake, *job):
    """:func:`wide` for tiles of up to 128 tokens, shared by a team; ``job`` is ``a, x, token_ids, tiles, parts, y``."""
    return share(bell, wake, _wide_128, job)


@njit(**INLINED)
def _wide_128(queue, a, x, token_ids, tiles, parts, y):
    wide(queue, a, x, token_ids, tiles, parts, y, make_room(a, x.shape[1], 128), 128, SIDE)


class Room(NamedTuple):
    """What one thread works in: arrays, then their addresses."""

    panel: np.ndarray
    sums: np.ndarray
    weights: np.ndarray
    offsets: np.ndarray
    planes: np.ndarray
    starts: np.ndarray


@njit(**INLINED)
def make_room(a, width, tokens):
    """Room for the product of ``a`` and tokens of ``width`` columns, in a panel that is zero beyond them."""
    panel, sums = aligned(panel_columns(a) * tokens), aligned((ROWS + 2 * a.m) * tokens)
    panel[width * tokens :] = 0
    weights, offsets = aligned(chunk_values(a, tokens)), aligned(chunk_values(a, tokens)).view(np.int32)
    return Room(
        panel, sums, weights, offsets, aligned(chunk_planes(a, tokens)).view(np.int32), np.empty(SIDE, np.int64)
    )


@njit(**INLINED)
def room_addresses(room):
    """The room with addresses for arrays; the caller must hold the arrays."""
    panel, sums, starts = address(room.panel), address(room.sums), address(room.starts)
    return Room(panel, sums, address(room.weights), address(room.offsets), address(room.planes), starts)


@njit(**INLINED)
def wide(queue, a, x, token_ids, tiles, parts, y, room, tokens, side):
    """Rows of ``y`` for tiles of up to ``tokens``. A task is one tile and one of ``parts`` of the rows.

    ``side`` is how many tokens or rows are transposed at a time; both are literals.
    """
    a, room, tasks, width, height = addresses(a), room_addresses(room), len(tiles) * parts, x.shape[1], y.shape[1]
    x, y, groups = address(x), address(y), a.height // a.n
    ready = -1
    task = next_task(queue)
    while task < tasks:
        tile, part = task // parts, task % parts
        expert, first, count = tiles[tile, 0], tiles[tile, 1], tiles[tile, 2]
        if tile != ready:
            fill_panel(room.panel, x, width, token_ids, first, count, room.starts, tokens, side)
            ready = tile
        top, bottom = groups * part // parts * a.m, min(height, groups * (part + 1) // parts * a.m)
        write_rows(a, expert, top, bottom, room, offset(y, first * height), height, count, tokens, side)
        task = next_task(queue)


@njit(**INLINED)
def write_rows(a, expert, top, bottom, room, y, height, count, tokens, side):
    """Rows ``top`` to ``bottom`` of the product with the panel, for each of ``count`` tokens; these start at ``y``."""
    step = max(1, ROWS // a.m) * a.m
    while top < bottom:
        stop = min(bottom, top + step)
        sums = multiply(a, expert, top, stop, room, tokens)
        write_sums(sums, stop - top, room.starts, offset(y, top), height, count, tokens, side)
        top = stop


@njit(**INLINED)
def multiply(a, expert, top, bottom, room, tokens):
    """Where the sums of rows ``top`` to ``bottom`` are. There is room for ROWS of them, or one group."""
    group, until = top // a.m, -(-bottom // a.m)
    for i in range((until - group) * a.m):
        store(room.sums, i * tokens, splat(np.float32(0), tokens))
    add_products(a, expert, group, until, room.panel, room.sums, room.weights, room.offsets, room.planes, tokens)
    return offset(room.sums, (top - group * a.m) * tokens)


@njit(**INLINED)
def write_sums(sums, rows, starts, y, height, count, tokens, side):
    """The sums of ``rows`` rows and ``count`` tokens, token by token."""
    for r in range(side):
        put(starts, r, r * tokens)
    for t in range(0, count, side):
        for row in range(0, rows, side):
            i, target = row * tokens + t, t * height + row
            if row + side <= rows and t + side <= count:
                transpose(sums, starts, i, y, target, height, side)
            else:
                for r in range(min(side, rows - row)):
                    for c in range(min(side, count - t)):
                        put(y, target + c * height + r, at(sums, i + r * tokens + c))
