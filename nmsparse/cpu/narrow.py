"""Few tokens: the weights are read once, 16 at a time along K, and multiplied with what they meet in each token.

One token goes row by row: the weights are a single stream from memory, and that is what limits it (two rows at once are
slower). More go four at a time with two rows, so that what is loaded of either serves the other.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numba.extending import overload

from .doorbell import next_task, share
from .operand import INLINED, TwoFour, addresses, row_values, scattered
from .panel import row_of
from .pick import CANDIDATES, candidates, fma_first, load_first, pick, positions, word
from .planes import COLUMNS, LANES, aligned, block_values, blocks, fill_tokens
from .simd import add, address, at, fma, lane_sums, load, offset, prefetch, put, repeat, splat, store, widen

GROUPS = 32  # row groups (of n stored rows) whose sums are kept at a time
TOKENS = 16  # of a tile, at most
L1 = 24 << 10  # bytes of planes that serve all those rows before the next ones are loaded
CACHED = 1 << 20  # bytes of weights that may well be in the core's own cache; more are asked for a row ahead


@njit(cache=True, nogil=True)
def narrow_1(bell, wake, *job):
    """:func:`narrow` for tiles of one token, shared by a team; ``job`` is ``a, x, token_ids, tiles, parts, y``."""
    return share(bell, wake, _narrow_1, job)


@njit(cache=True, nogil=True)
def narrow_4(bell, wake, *job):
    """The same for tiles of up to ``TOKENS`` tokens, four at a time."""
    return share(bell, wake, _narrow_4, job)


@njit(**INLINED)
def _narrow_1(queue, a, x, token_ids, tiles, parts, y):
    planes, sums = aligned(CANDIDATES * 16 * blocks(a)), aligned((GROUPS * a.m + a.m + 15) * 16)
    narrow(queue, a, x, token_ids, tiles, parts, y, planes, sums, np.empty(1, np.int64), 1, 16)


@njit(**INLINED)
def _narrow_4(queue, a, x, token_ids, tiles, parts, y):
    planes, sums = aligned(CANDIDATES * 16 * TOKENS * blocks(a)), aligned((GROUPS * a.m + a.m + 3) * 64)
    narrow(queue, a, x, token_ids, tiles, parts, y, planes, sums, np.empty(4, np.int64), 4, 64)


@njit(**INLINED)
def narrow(queue, a, x, token_ids, tiles, parts, y, planes, sums, starts, tokens, lanes):
    """Rows of ``y`` for tiles of tokens, ``tokens`` at a time. A task is a tile and one of ``parts`` of the rows.

    ``lanes`` is 16 * ``tokens``; both are literals, from here down.
    """
    ahead = row_values(a) if a.values.size * a.values.itemsize > CACHED else 0
    a, tasks, width, height = addresses(a), len(tiles) * parts, x.shape[1], y.shape[1]
    x, y, planes, sums = address(x), address(y), address(planes), address(sums)
    starts = address(starts)
    groups, size = a.height // a.n, CANDIDATES * lanes * blocks(a)
    ready = -1
    task = next_task(queue)
    while task < tasks:
        tile, part = task // parts, task % parts
        expert, first, count = tiles[tile, 0], tiles[tile, 1], tiles[tile, 2]
        group, stop = groups * part // parts, groups * (part + 1) // parts
        while group < stop:
            block = group * a.n // a.block
            until = min(stop, group + GROUPS, (block + 1) * a.block // a.n)
            if ready != tile * groups + block:
                for t in range(0, count, tokens):
                    for i in range(tokens):
                        put(starts, i, row_of(t + i, token_ids, first, count) * width)
                    fill_tokens(offset(planes, t // tokens * size), a, expert, group * a.n, x, width, starts, tokens)
                ready = tile * groups + block
            top, bottom = group * a.m, min(until * a.m, height)
            for t in range(0, count, tokens):
                for i in range((until - group) * a.m):
                    store(sums, i * lanes, splat(np.float32(0), lanes))
                add_products(a, expert, group, until, offset(planes, t // tokens * size), sums, ahead, tokens, lanes)
                for i in range(0, (bottom - top) * tokens, LANES):
                    store(sums, i, lane_sums(sums, i * LANES))  # the first vectors make room for the sums
                for i in range(min(tokens, count - t)):
                    for row in range(bottom - top):
                        put(y, (first + t + i) * height + top + row, at(sums, row * tokens + i))
            group = until
        task = next_task(queue)


def add_products(a, expert, group, until, planes, sums, ahead, tokens, lanes):
    """Add to ``sums`` (16 partial sums for each dense row and token) what the row groups contribute."""
    raise NotImplementedError("for compiled code")


@overload(add_products, prefer_literal=True, jit_options=INLINED)
def _by_tokens(a, expert, group, until, planes, sums, ahead, tokens, lanes):
    def by_rows(a, expert, group, until, planes, sums, ahead, tokens, lanes):
        stored, dense = expert * a.height + group * a.n, 0
        while dense < (until - group) * a.m:
            for _ in range(a.n):
                add_row(a, stored, dense, planes, sums, ahead)
                stored += 1
            dense += a.m

    def by_pairs(a, expert, group, until, planes, sums, ahead, tokens, lanes):
        chunk = max(1, L1 // (4 * CANDIDATES * lanes))
        for start in range(0, blocks(a), chunk):
            for row in range(group * a.n, until * a.n, 2):
                stop = min(start + chunk, blocks(a))
                add_pair(a, expert, group, row, until * a.n, start, stop, planes, sums, 2 * ahead, tokens, lanes)

    return by_rows if tokens.literal_value == 1 else by_pairs


@njit(**INLINED)
def add_row(a, stored, dense, planes, sums, ahead):
    """One stored row times one token, two sums in flight."""
    whole = row_values(a) // block_values(a)
    block, run = 0, 0
    while block < blocks(a):
        stop = min(blocks(a), (run + 1) * run_blocks(a))
        even = splat(np.float32(0), LANES)
        odd = even
        while block + 2 <= min(stop, whole):
            even = add_block(even, a, stored, block, meets(planes, block, LANES), ahead, 1)
            odd = add_block(odd, a, stored, block + 1, meets(planes, block + 1, LANES), ahead, 1)
            block += 2
        if block < min(stop, whole):
            even = add_block(even, a, stored, block, meets(planes, block, LANES), ahead, 1)
        if whole < stop:
            odd = add_last_block(odd, a, stored, whole, meets(planes, whole, LANES), 1)
        add_to(sums, scattered(a, stored, run, dense) * LANES, add(even, odd), LANES)
        block = stop
        run += 1


@njit(**INLINED)
def add_pair(a, expert, group, row, rows, start, stop, planes, sums, ahead, tokens, lanes):
    """Stored rows ``row`` and ``row + 1``, blocks ``start`` to ``stop``.

    If ``row`` is the last, it is its own partner, whose sums go where nobody reads them.
    """
    nobody, partner = GROUPS * a.m, min(row + 1, rows - 1)
    stored, other = expert * a.height + row, expert * a.height + partner
    dense = (row // a.n - group) * a.m
    dense_other = (partner // a.n - group) * a.m if partner > row else nobody
    whole = row_values(a) // block_values(a)
    run = start // run_blocks(a)
    while start < stop:
        end = min(stop, (run + 1) * run_blocks(a))
        s = splat(np.float32(0), lanes)
        r = s
        for block in range(start, min(end, whole)):
            met = meets(planes, block, lanes)
            s = add_block(s, a, stored, block, met, ahead, tokens)
            r = add_block(r, a, other, block, met, ahead, tokens)
        if whole < end:
            met = meets(planes, whole, lanes)
            s = add_last_block(s, a, stored, whole, met, tokens)
            r = add_last_block(r, a, other, whole, met, tokens)
        add_to(sums, scattered(a, stored, run, dense) * lanes, s, lanes)
        add_to(sums, scattered(a, other, run, dense_other) * lanes, r, lanes)
        start = end
        run += 1


@njit(**INLINED)
def run_blocks(a):
    """Blocks that belong to the same dense row, at most."""
    return -(-a.run // COLUMNS)


@njit(**INLINED)
def meets(planes, block, lanes):
    """What the values of a ``block`` can meet."""
    return candidates(planes, CANDIDATES * lanes * block, lanes)


def add_block(total, a, stored, block, met, ahead, tokens):
    """``total`` plus the products of the values of a ``block`` of row ``stored`` with what they meet."""
    raise NotImplementedError("for compiled code")


def add_last_block(total, a, stored, block, met, tokens):
    """The same where a row ends inside the block: what comes after it is not to be read."""
    raise NotImplementedError("for compiled code")


@overload(add_block, prefer_literal=True, jit_options=INLINED)
def _add_block(total, a, stored, block, met, ahead, tokens):
    def two_four(total, a, stored, block, met, ahead, tokens):
        w = stored * a.words + 2 * block
        if ahead:
            prefetch(a.values, 8 * w + ahead)
        return fma(repeat(load(a.values, 8 * w, 16), tokens), pick(word(a.meta, w), met), total)

    def any_nm(total, a, stored, block, met, ahead, tokens):
        if ahead:
            prefetch(a.values, stored * row_values(a) + block * block_values(a) + ahead)
        return add_some(total, a, stored, block, met, block_values(a), tokens)

    return two_four if a.instance_class is TwoFour else any_nm


@overload(add_last_block, prefer_literal=True, jit_options=INLINED)
def _add_last_block(total, a, stored, block, met, tokens):
    def two_four(total, a, stored, block, met, tokens):
        w = stored * a.words + 2 * block
        return fma(repeat(widen(load(a.values, 8 * w, 8), 16), tokens), pick(at(a.meta, w), met), total)

    def any_nm(total, a, stored, block, met, tokens):
        return add_some(total, a, stored, block, met, row_values(a) - block * block_values(a), tokens)

    return two_four if a.instance_class is TwoFour else any_nm


@njit(**INLINED)
def add_some(total, a, stored, block, met, count, tokens):
    """:func:`add_block` of an :class:`~nmsparse.cpu.operand.AnyNM`, the first ``count`` values."""
    i = stored * row_values(a) + block * block_values(a)
    columns = add(load(a.starts, 0, LANES), positions(a.meta, i, count))
    return fma_first(repeat(load_first(a.values, i, count), tokens), pick(columns, met), total, count)


@njit(**INLINED)
def add_to(sums, i, vector, lanes):
    """``sums[i : i + lanes] += vector``."""
    store(sums, i, add(load(sums, i, lanes), vector))
