"""A row of weights as values and offsets into a panel, a chunk of columns at a time, for either operand.

A chunk is as many columns of the panel as stay in the first-level cache while all rows pass over them.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numba.extending import overload

from .operand import INLINED, TwoFour, row_values, scattered
from .panel import add_run
from .pick import CANDIDATES, candidates, pick, word
from .planes import COLUMNS, LANES, blocks, fill_offsets
from .simd import at, load, number, prefetch, put, store, widen

CHUNK = 8192  # elements of a panel: 32 KiB
AHEAD = 4  # rows: the next chunk of a row is far from this one, and no hardware foresees it


def panel_columns(a):
    """Dense columns that positions of ``a`` can point to; K or more."""
    raise NotImplementedError("for compiled code")


def chunk_values(a, tokens):
    """Stored values of one row in one chunk, at most."""
    raise NotImplementedError("for compiled code")


def chunk_planes(a, tokens):
    """Elements of what one chunk needs to decode its rows."""
    raise NotImplementedError("for compiled code")


def add_products(a, expert, group, until, panel, sums, weights, offsets, planes, tokens):
    """Add to ``sums`` (one vector of ``tokens`` for each dense row) what the row groups contribute.

    ``weights``, ``offsets`` and ``planes`` are room for one row of one chunk.
    """
    raise NotImplementedError("for compiled code")


@overload(panel_columns, jit_options=INLINED)
def _panel_columns(a):
    if a.instance_class is TwoFour:
        return lambda a: 4 * a.words * a.spread if a.spread else 16 * a.words
    return lambda a: a.groups * a.every


@overload(chunk_values, jit_options=INLINED)
def _chunk_values(a, tokens):
    if a.instance_class is TwoFour:
        return lambda a, tokens: LANES * chunk_blocks(tokens)
    return lambda a, tokens: a.keep * chunk_groups(a, tokens)


@overload(chunk_planes, jit_options=INLINED)
def _chunk_planes(a, tokens):
    if a.instance_class is TwoFour:
        return lambda a, tokens: CANDIDATES * LANES * chunk_blocks(tokens)
    return lambda a, tokens: a.keep * chunk_groups(a, tokens)


@overload(add_products, prefer_literal=True, jit_options=INLINED)
def _add_products(a, expert, group, until, panel, sums, weights, offsets, planes, tokens):
    if a.instance_class is TwoFour:

        def two_four(a, expert, group, until, panel, sums, weights, offsets, planes, tokens):
            add_two_four(a, expert, group, until, panel, sums, weights, offsets, planes, tokens)

        return two_four

    def any_nm(a, expert, group, until, panel, sums, weights, offsets, planes, tokens):
        add_any_nm(a, expert, group, until, panel, sums, weights, offsets, planes, tokens)

    return any_nm


@njit(**INLINED)
def chunk_blocks(tokens):
    """Blocks of 32 stored columns in a chunk."""
    return max(1, CHUNK // (COLUMNS * tokens))


@njit(**INLINED)
def chunk_groups(a, tokens):
    """Groups of ``every`` columns in a chunk."""
    return max(1, CHUNK // (a.every * tokens))


@njit(**INLINED)
def add_two_four(a, expert, group, until, panel, sums, weights, offsets, planes, tokens):
    """:func:`add_products` of a :class:`TwoFour`. Divisions stay out of the inner loops: a row has few columns here."""
    step = chunk_blocks(tokens)
    for left in range(0, blocks(a), step):
        right = min(left + step, blocks(a))
        start, stop = COLUMNS * left, min(COLUMNS * right, 16 * a.words)
        first_run = start // a.run
        row = regather = group * a.n
        for dense in range(0, (until - group) * a.m, a.m):
            for _ in range(a.n):
                if row == regather:
                    fill_offsets(planes, a, expert, row, left, right, tokens)
                    regather = (row // a.block + 1) * a.block
                stored = expert * a.height + row
                decode_two_four(a, stored * a.words, left, right, weights, offsets, planes)
                run, column = first_run, start
                while column < stop:
                    end = min(stop, (run + 1) * a.run)
                    i = scattered(a, stored, run, dense) * tokens
                    add_run(sums, i, offsets, weights, (column - start) // 2, (end - start) // 2, panel, tokens)
                    column = end
                    run += 1
                row += 1


@njit(**INLINED)
def decode_two_four(a, w, left, right, weights, offsets, planes):
    """Blocks ``left`` to ``right`` of the row whose words start at ``w``."""
    prefetch(a.meta, w + 2 * left + AHEAD * a.words)
    whole = min(right, a.words // 2)
    for block in range(left, whole):
        i, v = LANES * (block - left), w + 2 * block
        prefetch(a.values, 8 * v + AHEAD * row_values(a))
        store(offsets, i, pick(word(a.meta, v), candidates(planes, CANDIDATES * i, LANES)))
        store(weights, i, load(a.values, 8 * v, 16))
    if whole < right:  # half a block: what is written after its eight values is not used
        i, v = LANES * (whole - left), w + 2 * whole
        store(offsets, i, pick(at(a.meta, v), candidates(planes, CANDIDATES * i, LANES)))
        store(weights, i, widen(load(a.values, 8 * v, 8), 16))


@njit(**INLINED)
def add_any_nm(a, expert, group, until, panel, sums, weights, offsets, starts, tokens):
    """:func:`add_products` of an :class:`AnyNM`. ``starts`` is room for where the group of each value starts."""
    step = chunk_groups(a, tokens)
    for left in range(0, a.groups, step):
        groups = min(step, a.groups - left)
        for g in range(groups):
            for i in range(g * a.keep, (g + 1) * a.keep):
                put(starts, i, np.int32((left + g) * a.every * tokens))
        for row in range(group, until):
            stored = ((expert * a.height + row) * a.groups + left) * a.keep
            decode_any_nm(a, stored, groups * a.keep, weights, offsets, starts, tokens)
            add_run(sums, (row - group) * tokens, offsets, weights, 0, groups * a.keep, panel, tokens)


@njit(**INLINED)
def decode_any_nm(a, stored, count, weights, offsets, starts, tokens):
    """``count`` values from number ``stored`` on."""
    for i in range(0, count, LANES):
        prefetch(a.values, stored + i + AHEAD * row_values(a))
    prefetch(a.meta, stored + AHEAD * row_values(a))
    for i in range(count):
        put(offsets, i, np.int32(at(starts, i) + np.int32(at(a.meta, stored + i)) * np.int32(tokens)))
    whole = count // LANES * LANES
    for i in range(0, whole, LANES):
        store(weights, i, load(a.values, stored + i, LANES))
    for i in range(whole, count):
        put(weights, i, number(at(a.values, stored + i)))
