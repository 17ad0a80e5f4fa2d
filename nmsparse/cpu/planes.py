"""What each stored value of a row can meet, laid out as the kernels load it.

The stored columns go in blocks of 32: 8 groups, 16 stored values. :func:`~nmsparse.cpu.pick.pick` finds out what each
of the 16 meets. With AVX-512 it looks it up among the 32 columns themselves: two vectors. Without, it chooses among
three candidates, and a block is three *planes* of 16 lanes: lane i belongs to stored value i, and plane q holds what is
q columns after the first that value i can sit in. The columns 0 1 2 3 of a group stand in them as ``0 1``, ``1 2`` and
``2 3``.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numba.extending import overload

from .operand import INLINED, TwoFour, dense_column, gathered, row_values
from .pick import CANDIDATES
from .simd import at, load, put, store

COLUMNS = 32  # of a block
LANES = 16  # of a vector of candidates: the stored values of a block


@njit(**INLINED)
def blocks(a):
    """Blocks that a stored row takes; the last may not be full."""
    return -(-row_values(a) // block_values(a))


def block_values(a):
    """Stored values of a block."""
    raise NotImplementedError("for compiled code")


@overload(block_values, jit_options=INLINED)
def _block_values(a):
    return (lambda a: LANES) if a.instance_class is TwoFour else (lambda a: a.together * a.keep)


@njit(**INLINED)
def put_group(planes, block, group, t, tokens, c0, c1, c2, c3):
    """Write the four columns of ``group`` (0 to 7) of a ``block``, for token ``t`` of ``tokens`` side by side."""
    vector = LANES * tokens
    start = CANDIDATES * vector * block + LANES * t
    if CANDIDATES == 2:
        i = start + group // 4 * vector + group % 4 * 4
        put(planes, i, c0)
        put(planes, i + 1, c1)
        put(planes, i + 2, c2)
        put(planes, i + 3, c3)
    else:
        i = start + 2 * group
        put(planes, i, c0)
        put(planes, i + 1, c1)
        put(planes, i + vector, c1)
        put(planes, i + vector + 1, c2)
        put(planes, i + 2 * vector, c2)
        put(planes, i + 2 * vector + 1, c3)


def fill_tokens(planes, a, expert, row, x, width, starts, tokens):
    """The planes of ``tokens`` tokens side by side, as the stored rows around ``row`` see them.

    Token t is the ``width`` elements of ``x`` from ``starts[t]`` on.
    """
    raise NotImplementedError("for compiled code")


@overload(fill_tokens, jit_options=INLINED)
def _fill_tokens(planes, a, expert, row, x, width, starts, tokens):
    def two_four(planes, a, expert, row, x, width, starts, tokens):
        fill_two_four(planes, a, expert, row, x, width, starts, tokens)

    def any_nm(planes, a, expert, row, x, width, starts, tokens):
        fill_any_nm(planes, a, x, width, starts, tokens)

    return two_four if a.instance_class is TwoFour else any_nm


@njit(**INLINED)
def fill_any_nm(planes, a, x, width, starts, tokens):
    """:func:`fill_tokens` of an :class:`AnyNM`: 32 columns for each block, though it may reach fewer."""
    for block in range(blocks(a)):
        column = block * a.together * a.every
        for t in range(tokens):
            i, source = LANES * (2 * tokens * block + t), at(starts, t)
            if column + COLUMNS <= width:
                store(planes, i, load(x, source + column, LANES))
                store(planes, i + LANES * tokens, load(x, source + column + LANES, LANES))
            else:
                for lane in range(LANES):
                    put(planes, i + lane, element(x, source, column + lane, width))
                    put(planes, i + LANES * tokens + lane, element(x, source, column + LANES + lane, width))


@njit(**INLINED)
def fill_two_four(planes, a, expert, row, x, width, starts, tokens):
    """:func:`fill_tokens` of a :class:`TwoFour`."""
    block = 0
    if CANDIDATES == 2 and a.spread == 0:  # whole blocks as they are
        while COLUMNS * (block + 1) <= width:
            for t in range(tokens):
                i, source = LANES * (2 * tokens * block + t), at(starts, t) + COLUMNS * block
                store(planes, i, load(x, source, LANES))
                store(planes, i + LANES * tokens, load(x, source + LANES, LANES))
            block += 1
    first = gathered(a, expert, row)
    spread = a.spread if a.spread else 4
    for group in range(8 * block, 8 * blocks(a)):
        # Stored columns in the padding, and dense ones beyond the token, are as good as column ``width``: zero.
        c0, c1, c2, c3 = width, width, width, width
        if group < 4 * a.words:
            c0, c1 = dense_column(a, first, 4 * group), dense_column(a, first, 4 * group + 1)
            c2, c3 = dense_column(a, first, 4 * group + 2), dense_column(a, first, 4 * group + 3)
        for t in range(tokens):
            i = at(starts, t)
            if (group + 1) * spread <= width:
                x0, x1, x2, x3 = at(x, i + c0), at(x, i + c1), at(x, i + c2), at(x, i + c3)
            else:
                x0, x1 = element(x, i, c0, width), element(x, i, c1, width)
                x2, x3 = element(x, i, c2, width), element(x, i, c3, width)
            put_group(planes, group // 8, group % 8, t, tokens, x0, x1, x2, x3)


@njit(**INLINED)
def element(x, start, column, width):
    """``column`` of the token that starts at ``start``; 0 in the padding."""
    return at(x, start + column) if column < width else np.float32(0)


@njit(**INLINED)
def fill_offsets(planes, a, expert, row, left, right, stride):
    """Where the columns of blocks ``left`` to ``right`` start in a panel: dense column times ``stride``."""
    start = gathered(a, expert, row)
    for group in range(8 * left, min(8 * right, 4 * a.words)):
        put_group(
            planes,
            group // 8 - left,
            group % 8,
            0,
            1,
            np.int32(dense_column(a, start, 4 * group) * stride),
            np.int32(dense_column(a, start, 4 * group + 1) * stride),
            np.int32(dense_column(a, start, 4 * group + 2) * stride),
            np.int32(dense_column(a, start, 4 * group + 3) * stride),
        )


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def aligned(size):
    """``size`` float32 that start on a cache line: a vector that straddles two takes two loads."""
    buffer = np.empty(size + 16, np.float32)
    skip = (-buffer.ctypes.data & 63) // 4
    return buffer[skip : skip + size]
