"""Who holds what: the register fragments and shared-memory layouts of the sparse matrix instructions, as integers.

Each function maps a place in the machine (lane or thread, register, half of a register) to a place in the matrix, for
16-bit operands. They take Python integers or NumPy integer arrays alike. The sparse operand A is *stored* (compressed):
16 stored columns stand for 32 dense ones. Sources: PTX ISA, "Matrix fragments for sparse mma.m16n8k32" and
"Asynchronous warpgroup-level matrix register fragment / shared memory layout"; confirmed on an H200.

>>> mma_sp_a(lane=5, reg=2, half=1), mma_sp_b(lane=5, reg=3, half=0), mma_sp_d(lane=5, reg=2)
((1, 11), (26, 1), (9, 2))
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np

Int = TypeVar("Int", int, np.ndarray)

LANES = 32
WARPGROUP = 128


def mma_sp_a(lane: Int, reg: Int, half: Int) -> tuple[Int, Int]:
    """``(row, stored column)`` of A ``16×16`` (dense 16×32) in ``mma.sp.m16n8k32``: 4 registers of two halves a lane.

    >>> mma_sp_a(0, 0, 0), mma_sp_a(31, 3, 1)
    ((0, 0), (15, 15))
    """
    return lane // 4 + 8 * (reg % 2), 2 * (lane % 4) + half + 8 * (reg // 2)


def mma_sp_b(lane: Int, reg: Int, half: Int) -> tuple[Int, Int]:
    """``(k, n)`` of the dense operand B ``32×8`` in ``mma.sp.m16n8k32``: 4 registers of two halves a lane.

    >>> mma_sp_b(0, 0, 0), mma_sp_b(31, 3, 1)
    ((0, 0), (31, 7))
    """
    return 2 * (lane % 4) + half + 8 * reg, lane // 4


def mma_sp_d(lane: Int, reg: Int) -> tuple[Int, Int]:
    """``(row, column)`` of the fp32 accumulator C or D ``16×8`` in ``mma.sp.m16n8k32``: 4 registers a lane.

    >>> mma_sp_d(0, 0), mma_sp_d(31, 3)
    ((0, 0), (15, 7))
    """
    return lane // 4 + 8 * (reg // 2), 2 * (lane % 4) + reg % 2


def mma_sp_meta(lane: Int, half: Int) -> tuple[Int, Int]:
    """``(row, word)`` of the metadata register of ``mma.sp.m16n8k32``: each half is one canonical 16-bit word.

    Word w of a row describes dense columns 16w..16w+15. Only the lanes of :func:`meta_lanes` are read.

    >>> mma_sp_meta(0, 0), mma_sp_meta(1, 1), mma_sp_meta(29, 1)
    ((0, 0), (8, 1), (15, 1))
    """
    return lane // 4 + 8 * half, lane % 2


def meta_lanes(selector: int) -> np.ndarray:
    """The 16 lanes whose metadata register is read, for sparsity selector 0 or 1.

    >>> meta_lanes(0)[:4].tolist(), meta_lanes(1)[:4].tolist()
    ([0, 1, 4, 5], [2, 3, 6, 7])
    """
    lanes = np.arange(LANES)
    return lanes[lanes % 4 // 2 == selector]


def wgmma_sp_a(thread: Int, reg: Int, half: Int) -> tuple[Int, Int]:
    """``(row, stored column)`` of A ``64×16`` (dense 64×32) from registers in ``wgmma.sp.m64nNk32``.

    >>> wgmma_sp_a(127, 3, 1)
    (63, 15)
    """
    row, col = mma_sp_a(thread % LANES, reg, half)
    return 16 * (thread // LANES) + row, col


def wgmma_sp_d(thread: Int, reg: Int) -> tuple[Int, Int]:
    """``(row, column)`` of the accumulator D ``64×N`` in ``wgmma(.sp).m64nN``: N/2 fp32 registers a thread.

    >>> wgmma_sp_d(0, 4), wgmma_sp_d(127, 127)
    ((0, 8), (63, 255))
    """
    row, col = mma_sp_d(thread % LANES, reg % 4)
    return 16 * (thread // LANES) + row, 8 * (reg // 4) + col


def wgmma_sp_meta(thread: Int, half: Int) -> tuple[Int, Int]:
    """``(row, word)`` of the metadata register of ``wgmma.sp.m64nNk32``: per warp, as in :func:`mma_sp_meta`.

    >>> wgmma_sp_meta(33, 1)
    (24, 1)
    """
    row, word = mma_sp_meta(thread % LANES, half)
    return 16 * (thread // LANES) + row, word


def core_matrix(row: Int, col: Int, leading: int, stride: int) -> Int:
    """Element offset of ``(row, col)`` in an unswizzled K-major ``wgmma`` operand of 16-bit elements.

    Core matrices are 8 rows × 8 columns, 64 contiguous elements; ``leading`` is the distance to the next one along K
    and ``stride`` to the next one along M or N, in elements (the two offsets of the matrix descriptor).

    >>> core_matrix(0, 8, leading=64, stride=128), core_matrix(8, 0, leading=64, stride=128), core_matrix(1, 2, 64, 128)
    (64, 128, 10)
    """
    return col // 8 * leading + row // 8 * stride + row % 8 * 8 + col % 8


def swizzle_128b(row: Int, chunk: Int) -> Int:
    """Where the 16-byte ``chunk`` (0..7) of a 128-byte ``row`` lies under the 128-byte swizzle.

    >>> [swizzle_128b(3, chunk) for chunk in range(8)]
    [3, 2, 1, 0, 7, 6, 5, 4]
    """
    return chunk ^ row % 8
