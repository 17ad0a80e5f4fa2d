"""What the kernels multiply: every format as one of two structures.

A 2:4 matrix, a V:N:M one and a Samoyeds one are the same thing to a processor: 2:4 rows. In V:N:M their columns are
*gathered* (the condensed columns stand for others, the same ones for a block of rows); in Samoyeds their rows are
*scattered* (a stored row belongs to another dense row in each run of columns). One kernel serves all three.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numba.extending import overload

from .simd import address, at
from .storage import as_storage

# The functions that a kernel is made of: compiled into it, never called from Python, and not guarded against dividing
# by zero, which would cost a branch for each.
INLINED = {"forceinline": True, "error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


class TwoFour(NamedTuple):
    """E matrices of ``height`` 2:4 rows: the canonical buffers, flat. Row r of expert e is row ``e * height + r``."""

    values: np.ndarray  # 8 for each word
    meta: np.ndarray  # uint16, ``words`` for each row
    columns: np.ndarray  # uint8, gathered columns: four for each group, for each block of rows
    rows: np.ndarray  # uint8, scattered rows: ``runs`` for each row
    height: int
    words: int
    block: int  # rows that gather the same columns; the height if nothing is gathered
    spread: int  # dense columns that a group of four gathered ones comes from; 0 if nothing is gathered
    run: int  # stored columns that belong to the same dense row; the width if nothing is scattered
    runs: int  # 0 if nothing is scattered
    n: int  # stored rows of
    m: int  # dense rows


class AnyNM(NamedTuple):
    """E matrices of ``height`` rows that keep some of every few columns, but not 2:4: the canonical buffers, flat.

    A *block* is as many groups as fit into what one AVX-512 permute can reach: 16 stored values of 32 columns.
    """

    values: np.ndarray  # ``keep * groups`` for each row
    meta: np.ndarray  # uint8, as many: position inside the group
    starts: np.ndarray  # int32: first column of the group of each of 16 stored values of a block
    height: int
    groups: int
    keep: int  # stored columns of
    every: int  # dense columns
    together: int  # groups of a block; 0 if a group is too large
    block: int  # rows that gather the same columns: all
    run: int  # stored columns that belong to the same dense row: all
    n: int  # stored rows of
    m: int  # dense rows: 1 of 1


def operand(a: Any) -> TwoFour | AnyNM:
    """The buffers of a sparse array ``(M, K)`` or ``(E, M, K)`` as the kernels take them, without a copy."""
    pattern, (height, width) = a.pattern, a.values.shape[-2:]
    values, meta = as_storage(a.values, "values").reshape(-1), a.meta.reshape(-1)
    if pattern.format == "nm" and (pattern.n, pattern.m) != (2, 4):
        n, m = pattern.n, pattern.m
        groups = width // n
        return AnyNM(values, meta, _starts(n, m), height, groups, n, m, min(16 // n, 32 // m), height, groups * m, 1, 1)
    none, words = np.zeros(0, np.uint8), width // 8
    if pattern.format == "vnm":
        columns = a.indices.reshape(-1)
        return TwoFour(values, meta, columns, none, height, words, pattern.v, pattern.m, 2 * width, 0, 1, 1)
    if pattern.format == "samoyeds":
        rows, runs = a.indices.reshape(-1), a.indices.shape[-1]
        return TwoFour(values, meta, none, rows, height, words, height, 0, pattern.v, runs, pattern.n, pattern.m)
    return TwoFour(values, meta, none, none, height, words, height, 0, 2 * width, 0, 1, 1)


@lru_cache
def _starts(n: int, m: int) -> np.ndarray:
    """First column of the group of each value of a block of n:m."""
    return (np.arange(16) // n * m).astype(np.int32)


def addresses(a):
    """The operand with addresses for arrays; the caller must hold the arrays."""
    raise NotImplementedError("for compiled code")


@overload(addresses, jit_options=INLINED)
def _addresses(a):
    def two_four(a):
        values, meta, columns, rows = address(a.values), address(a.meta), address(a.columns), address(a.rows)
        return TwoFour(values, meta, columns, rows, a.height, a.words, a.block, a.spread, a.run, a.runs, a.n, a.m)

    def any_nm(a):
        values, meta, starts = address(a.values), address(a.meta), address(a.starts)
        shape = a.height, a.groups, a.keep, a.every, a.together
        return AnyNM(values, meta, starts, *shape, a.block, a.run, a.n, a.m)

    return two_four if a.instance_class is TwoFour else any_nm


# --- what follows is for an operand with addresses -------------------------------------------------------------------


def row_values(a):
    """Stored values of a row."""
    raise NotImplementedError("for compiled code")


@overload(row_values, jit_options=INLINED)
def _row_values(a):
    return (lambda a: 8 * a.words) if a.instance_class is TwoFour else (lambda a: a.groups * a.keep)


def scattered(a, row, run, dense):
    """The dense row that a stored ``row`` belongs to in a ``run``; ``dense`` is the first that it can belong to."""
    raise NotImplementedError("for compiled code")


@overload(scattered, jit_options=INLINED)
def _scattered(a, row, run, dense):
    if a.instance_class is TwoFour:
        return lambda a, row, run, dense: dense + at(a.rows, row * a.runs + run) if a.runs else dense
    return lambda a, row, run, dense: dense


@njit(**INLINED)
def gathered(a, expert, row):
    """Where the gathered columns that stored ``row`` sees start in ``a.columns``."""
    return (expert * a.height + row) // a.block * 16 * a.words


@njit(**INLINED)
def dense_column(a, start, column):
    """The column of x that stored ``column`` stands for, where ``start`` is :func:`gathered`."""
    if a.spread == 0:
        return column
    return column // 4 * a.spread + at(a.columns, start + column)
