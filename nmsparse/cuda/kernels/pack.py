"""Between dense weights, canonical 2:4 buffers and packed blocks: three passes over memory, bound by its bandwidth.

They share one division of the work. Four threads stand side by side along a row, each at 16 dense columns: one *piece*
of 8 stored values (16 bytes) and their metadata word. Each thread takes its piece of two rows, r and r + 8, because a
word of the packed metadata holds both; 128 threads take a block. Rows and columns outside the weight are read as zeros,
of which pruning keeps positions 0 and 1: what padding is.

The texts are straight-line code on purpose: the words take an ``inside`` instead of standing in a branch, so all loads
of a thread are under way together, and the NumPy twin runs all threads at once.
"""

from __future__ import annotations

from typing import Any

from ..layout import BLOCK, BLOCK_BYTES, EMPTY, meta_offset, value_offset

__all__ = ["make_decode", "make_pack", "make_prune"]

PIECES = BLOCK // 16  # of a row of a block


def make_pack(tile: Any, cfg: Any) -> Any:
    """Canonical 2:4 buffers, each of ``rows`` rows of ``pieces`` pieces, to packed blocks.

    In NumPy: ``layout.pack_blocks(values[e], meta[e])`` for every expert e; of ``cfg.interleave`` buffers, whose first
    half are gate rows, with the rows in the order of :func:`~nmsparse.cuda.layout.interleaved`.
    """
    INTERLEAVE, store_block = cfg.interleave, _store_block(tile)

    def pack(values_gmem, meta_gmem, blocks_gmem, rows, pieces, row_blocks, k_blocks, blocks):
        block, slab, group, part = tile.place()
        expert, down, along = tile.unravel(block, row_blocks, k_blocks)
        piece, exists = along * PIECES + part, block < blocks
        if INTERLEAVE:  # gate rows and their up rows
            row, apart, last = (down * 4 + slab) * 8 + group, rows // 2, rows // 2
        else:
            row, apart, last = down * BLOCK + slab * 16 + group, 8, rows
        low = exists & (piece < pieces) & (row < last)
        high = low & (row + apart < rows)
        first = (expert * rows + row) * pieces + piece
        second = first + apart * pieces
        a, b = tile.load_16(values_gmem, first * 16, low), tile.load_16(values_gmem, second * 16, high)
        p, q = tile.load_2(meta_gmem, first * 2, low, EMPTY), tile.load_2(meta_gmem, second * 2, high, EMPTY)
        store_block(blocks_gmem, block, slab * 16 + group, part, a, b, p, q, exists)

    return pack


def make_prune(tile: Any, cfg: Any) -> Any:
    """A dense weight ``(E·rows, columns)`` to canonical buffers if ``cfg.canonical``, to blocks if ``cfg.blocks``.

    In NumPy: ``A = NMArray.from_dense(w)``, its buffers, and ``layout.pack_blocks`` of them.
    """
    CANONICAL, BLOCKS = cfg.canonical, cfg.blocks
    store_block = _store_block(tile)

    @tile.inline
    def keep_eight(x, y):
        """Eight of 16 columns and their metadata word."""
        a, p = tile.keep_two(x[0], x[1])
        b, q = tile.keep_two(x[2], x[3])
        c, r = tile.keep_two(y[0], y[1])
        d, s = tile.keep_two(y[2], y[3])
        return (a, b, c, d), tile.word(p, q, r, s)

    def prune(w_gmem, values_gmem, meta_gmem, blocks_gmem, rows, columns, pieces, row_blocks, k_blocks, blocks):
        block, slab, group, part = tile.place()
        expert, down, along = tile.unravel(block, row_blocks, k_blocks)
        row, piece = down * BLOCK + slab * 16 + group, along * PIECES + part
        exists = block < blocks
        low, high = exists & (row < rows), exists & (row + 8 < rows)
        column = piece * 16
        here, there = tile.choose(low, columns - column, 0), tile.choose(high, columns - column, 0)
        at = (expert * rows + row) * columns + column
        below = at + 8 * columns
        x, y = tile.load_columns(w_gmem, at, here), tile.load_columns(w_gmem, at + 8, here - 8)
        u, v = tile.load_columns(w_gmem, below, there), tile.load_columns(w_gmem, below + 8, there - 8)
        a, p = keep_eight(x, y)
        b, q = keep_eight(u, v)
        if CANONICAL:
            first = (expert * rows + row) * pieces + piece
            second = first + 8 * pieces
            low, high = low & (piece < pieces), high & (piece < pieces)
            tile.store_16(values_gmem, first * 16, a, low)
            tile.store_16(values_gmem, second * 16, b, high)
            tile.store_2(meta_gmem, first * 2, p, low)
            tile.store_2(meta_gmem, second * 2, q, high)
        if BLOCKS:
            store_block(blocks_gmem, block, slab * 16 + group, part, a, b, p, q, exists)

    return prune


def make_decode(tile: Any, cfg: Any) -> Any:
    """Canonical 2:4 buffers to a dense weight ``(E·rows, columns)``. In NumPy: ``A.todense()``."""

    @tile.inline
    def spread_eight(a, word):
        """The 16 columns of eight stored values."""
        x0, x1 = tile.spread(a[0], word, 0)
        x2, x3 = tile.spread(a[1], word, 1)
        y0, y1 = tile.spread(a[2], word, 2)
        y2, y3 = tile.spread(a[3], word, 3)
        return (x0, x1, x2, x3), (y0, y1, y2, y3)

    def decode(values_gmem, meta_gmem, w_gmem, rows, columns, pieces, row_blocks, k_blocks, blocks):
        block, slab, group, part = tile.place()
        expert, down, along = tile.unravel(block, row_blocks, k_blocks)
        row, piece = down * BLOCK + slab * 16 + group, along * PIECES + part
        low = (block < blocks) & (piece < pieces) & (row < rows)
        high = (block < blocks) & (piece < pieces) & (row + 8 < rows)
        first = (expert * rows + row) * pieces + piece
        second = first + 8 * pieces
        a, b = tile.load_16(values_gmem, first * 16, low), tile.load_16(values_gmem, second * 16, high)
        p, q = tile.load_2(meta_gmem, first * 2, low, EMPTY), tile.load_2(meta_gmem, second * 2, high, EMPTY)
        x, y = spread_eight(a, p)
        u, v = spread_eight(b, q)
        column = piece * 16
        here, there = tile.choose(low, columns - column, 0), tile.choose(high, columns - column, 0)
        at = (expert * rows + row) * columns + column
        below = at + 8 * columns
        tile.store_columns(w_gmem, at, x, here)
        tile.store_columns(w_gmem, at + 8, y, here - 8)
        tile.store_columns(w_gmem, below, u, there)
        tile.store_columns(w_gmem, below + 8, v, there - 8)

    return decode


def _store_block(tile: Any) -> Any:
    """Pieces ``a``, ``b`` and words ``p``, ``q`` of rows ``row`` and ``row + 8`` of a block to their places in it."""

    @tile.inline
    def store_block(blocks_gmem, block, row, part, a, b, p, q, exists):
        start = block * BLOCK_BYTES
        tile.store_16(blocks_gmem, start + value_offset(row, part * 8), a, exists)
        tile.store_16(blocks_gmem, start + value_offset(row + 8, part * 8), b, exists)
        tile.store_4(blocks_gmem, start + meta_offset(row, part), tile.halves(p, q), exists)

    return store_block
