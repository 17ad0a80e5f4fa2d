"""How a 2:4 operand lies in memory for the sparse tensor cores: blocks of 64 rows × 64 columns, each contiguous.

A block is what one bulk copy can bring and what both instruction families read as it is:

* 4096 bytes of values, 64 rows × 32 stored columns as 8×8 *core matrices* of 128 contiguous bytes (the unswizzled
  K-major layout of ``wgmma``, and rows of ``ldmatrix``): four core matrices along K, then eight along M;
* 512 bytes of metadata, the words that the lanes of each warp hold: per warp of 16 rows, lane group and half, the two
  words of the block's two k32 steps side by side.

Blocks of one row of blocks follow each other along K. Every tile shape of every kernel reads this one layout, so a
weight is packed once. Rows are padded to 64 and columns to 128 with explicit zeros. Sources: PTX ISA, "Strides" of
wgmma's matrix descriptor and "Matrix fragments for sparse mma.m16n8k32"; confirmed on an H200.
"""

from __future__ import annotations

import numpy as np

__all__ = [
    "BLOCK",
    "BLOCK_BYTES",
    "META_BYTES",
    "VALUE_BYTES",
    "blocks_of",
    "interleaved",
    "meta_offset",
    "pack_blocks",
    "value_offset",
]

BLOCK = 64  # rows, and dense columns
VALUE_BYTES = BLOCK * BLOCK // 2 * 2
META_BYTES = BLOCK * BLOCK // 8
BLOCK_BYTES = VALUE_BYTES + META_BYTES
EMPTY = 0x4444  # positions 0 and 1 of four groups: what padding stores


def blocks_of(rows: int, columns: int) -> tuple[int, int]:
    """Blocks along M and along K that hold a dense shape ``(rows, columns)``; K in whole pairs of blocks.

    >>> blocks_of(100, 200)
    (2, 4)
    """
    return -(-rows // BLOCK), -(-columns // (2 * BLOCK)) * 2


def value_offset(row, column):
    """Byte offset, in a block, of stored ``column`` 0..31 of ``row`` 0..63. Integers or arrays.

    >>> value_offset(0, 8), value_offset(1, 0), value_offset(8, 0)
    (128, 16, 512)
    """
    return column // 8 * 128 + row // 8 * 512 + row % 8 * 16 + column % 8 * 2


def meta_offset(row, word):
    """Byte offset, in a block, of canonical metadata ``word`` 0..3 (16 dense columns each) of ``row`` 0..63.

    Rows g and g+8 of a warp share a 32-bit word, low and high half; a lane takes word F of each k32 step.

    >>> meta_offset(0, 0) - VALUE_BYTES, meta_offset(8, 0) - VALUE_BYTES, meta_offset(0, 1) - VALUE_BYTES
    (0, 2, 8)
    """
    warp, half, group = row // 16, row // 8 % 2, row % 8
    step, lane_half = word // 2, word % 2
    return VALUE_BYTES + ((warp * 16 + group * 2 + lane_half) * 2 + step) * 4 + half * 2


def interleaved(rows: int) -> np.ndarray:
    """Which of ``rows`` gate and up rows each packed row holds: eight gate rows, their eight up rows, and so on, so
    that one thread of a product gets both outputs of a neuron; -1 where there is none.

    >>> interleaved(4)[[0, 1, 2, 8, 9, 10]].tolist()
    [0, 1, -1, 2, 3, -1]
    """
    row, half = np.arange(-(-rows // 16) * 16), rows // 2
    neuron = row // 16 * 8 + row % 8
    return np.where(neuron < half, neuron + row // 8 % 2 * half, -1)


def pack_blocks(values: np.ndarray, meta: np.ndarray) -> np.ndarray:
    """Blocks of canonical 2:4 buffers: ``values (R, C)`` of 16 bits and ``meta (R, C/8)`` give uint8
    ``(⌈R/64⌉, blocks along K, BLOCK_BYTES)``. The definition; :mod:`nmsparse.cuda.pack` does it on the device.

    >>> pack_blocks(np.zeros((1, 8), np.float16), np.full((1, 1), 0x4444, np.uint16)).shape
    (1, 2, 4608)
    """
    down, along = blocks_of(len(values), 2 * values.shape[1])
    rows, columns = down * BLOCK, along * BLOCK
    bits, words = np.zeros((rows, columns // 2), np.uint16), np.full((rows, columns // 16), EMPTY, np.uint16)
    bits[: len(values), : values.shape[1]] = values.view(np.uint16)
    words[: len(meta), : meta.shape[1]] = meta
    packed = np.empty((down, along, BLOCK_BYTES // 2), np.uint16)
    row = np.arange(BLOCK)[:, None]
    tiles = bits.reshape(down, BLOCK, along, BLOCK // 2).swapaxes(1, 2)
    packed[:, :, value_offset(row, np.arange(BLOCK // 2)) // 2] = tiles
    tiles = words.reshape(down, BLOCK, along, BLOCK // 16).swapaxes(1, 2)
    packed[:, :, meta_offset(row, np.arange(BLOCK // 16)) // 2] = tiles
    return packed.view(np.uint8)
