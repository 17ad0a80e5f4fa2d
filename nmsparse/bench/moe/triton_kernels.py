"""A fused MoE layer in Triton: the kernels.

The known way to do it: token ids sorted by expert and cut into blocks of rows of one expert each, two grouped products
that gather their rows, a sum over the experts of each token. Written for this benchmark, for Hopper: weights come
through tensor descriptors, gate and up are one pass with SwiGLU behind it, blocks are not padded (the last of an expert
masks its rows), nothing is added atomically.

Sizes are those of a layer: T tokens, k experts each, S = T·k pairs, E experts, H hidden, I intermediate. A pair is
``token * k + j``. Columns and depths of the tiles have to divide I and H.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["combine", "count", "down", "gate_up", "place"]


@triton.jit(do_not_specialize=["size"])
def count(ids, counts, size, CHUNK: tl.constexpr, BINS: tl.constexpr):
    """``counts (chunks, BINS)``: how many pairs of each chunk of ``ids (S,)`` go to each expert. Grid: chunks."""
    chunk = tl.program_id(0)
    pair = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = tl.load(ids + pair, mask=pair < size, other=0)
    found = tl.histogram(expert, BINS, mask=pair < size)
    tl.store(counts + chunk * BINS + tl.arange(0, BINS), found)


@triton.jit(do_not_specialize=["size", "chunks", "chunk_size", "rows"])
def place(
    ids, counts, order, blocks, num_blocks, size, chunks, chunk_size, rows,
    PART: tl.constexpr, BINS: tl.constexpr, WIDE: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """``order (S,)``: the pairs sorted by expert, stably; ``blocks (·, 3)``: expert, first row and end of each block of
    at most ``rows`` rows. Grid: chunks. With COUNTED the histograms of the ``WIDE >= chunks`` chunks come from
    :func:`count`; without, each program counts all ``WIDE >= S`` pairs itself."""
    chunk = tl.program_id(0)
    bins = tl.arange(0, BINS)
    wide = tl.arange(0, WIDE)
    if COUNTED:
        table = tl.load(counts + wide[:, None] * BINS + bins[None, :], mask=(wide < chunks)[:, None], other=0)
        total = tl.sum(table, 0)
        before = tl.sum(tl.where((wide < chunk)[:, None], table, 0), 0)
    else:
        every = tl.load(ids + wide, mask=wide < size, other=0)
        total = tl.histogram(every, BINS, mask=wide < size)
        before = tl.histogram(every, BINS, mask=wide < chunk * chunk_size)
    first = tl.cumsum(total, 0) - total

    cut = (total + rows - 1) // rows
    at = tl.cumsum(cut, 0) - cut
    for b in range(chunk, tl.max(cut, 0), chunks):
        row = blocks + 3 * (at + b)
        tl.store(row, bins, mask=b < cut)
        tl.store(row + 1, first + b * rows, mask=b < cut)
        tl.store(row + 2, first + total, mask=b < cut)
    if chunk == 0:
        tl.store(num_blocks, tl.sum(cut, 0))

    free = first + before
    lane = tl.arange(0, PART)
    for part in range(0, chunk_size, PART):
        pair = chunk * chunk_size + part + lane
        expert = tl.load(ids + pair, mask=pair < size, other=-1)
        mine = expert[:, None] == bins[None, :]
        earlier = (expert[:, None] == expert[None, :]) & (lane[None, :] < lane[:, None])
        spot = tl.sum(tl.where(mine, free[None, :], 0), 1) + tl.sum(earlier.to(tl.int32), 1)
        tl.store(order + spot, pair, mask=pair < size)
        free += tl.sum(mine.to(tl.int32), 0)


@triton.jit
def _corner(tile, num_blocks, num_columns, GROUP: tl.constexpr):
    """Block of rows and block of columns of a tile: GROUP blocks of rows share the weights they read."""
    span = GROUP * num_columns
    top = tile // span * GROUP
    height = tl.minimum(num_blocks - top, GROUP)
    return top + tile % span % height, tile % span // height


@triton.jit
def _block(ids, blocks, block, SORTED: tl.constexpr):
    """Expert, first row and end of a block; without a schedule each pair is a block."""
    if SORTED:
        expert = tl.load(blocks + 3 * block)
        first = tl.load(blocks + 3 * block + 1)
        end = tl.load(blocks + 3 * block + 2)
    else:
        expert = tl.load(ids + block)
        first = block
        end = block + 1
    return expert, first, end


@triton.jit
def _gate_up(
    tile, x, w, h, ids, order, blocks, num_blocks, top_k, hidden, intermediate,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, SORTED: tl.constexpr,
):  # fmt: skip
    block, column = _corner(tile, num_blocks, intermediate // COLUMNS, GROUP)
    expert, first, end = _block(ids, blocks, block, SORTED)
    row = first + tl.arange(0, ROWS)
    pair = row
    if SORTED:
        pair = tl.load(order + row, mask=row < end, other=0)
    token = tl.where(row < end, pair, 0) // top_k  # what is beyond the end reads token 0 and is not written
    tokens = x + token[:, None] * hidden + tl.arange(0, DEPTH)[None, :]
    gate_row = expert * 2 * intermediate + column * COLUMNS
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, hidden, DEPTH):
        a = tl.load(tokens + k)
        gate = tl.dot(a, w.load([gate_row, k]).T, gate)
        up = tl.dot(a, w.load([gate_row + intermediate, k]).T, up)
    out = (gate * tl.sigmoid(gate) * up).to(h.dtype.element_ty)
    n = column * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(h + row[:, None] * intermediate + n[None, :], out, mask=(row < end)[:, None])


@triton.jit(do_not_specialize=["size", "top_k"])
def gate_up(
    x, w, h, ids, order, blocks, num_blocks, size, top_k, hidden, intermediate,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, SORTED: tl.constexpr,
    PERSISTENT: tl.constexpr,
):  # fmt: skip
    """``h (S, I)``, in the order of the schedule: ``silu(gate x) * up x``. ``w``: descriptor of (E·2I, H), tile
    (COLUMNS, DEPTH). Grid: most blocks there can be, times I / COLUMNS; with PERSISTENT any, and the copies of the next
    tile start before this one is done."""
    row_blocks = size
    if SORTED:
        row_blocks = tl.load(num_blocks)
    tiles = row_blocks * (intermediate // COLUMNS)
    if PERSISTENT:
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _gate_up(tile, x, w, h, ids, order, blocks, row_blocks, top_k, hidden, intermediate,
                     ROWS, COLUMNS, DEPTH, GROUP, SORTED)  # fmt: skip
    elif tl.program_id(0) < tiles:
        _gate_up(tl.program_id(0), x, w, h, ids, order, blocks, row_blocks, top_k, hidden, intermediate,
                 ROWS, COLUMNS, DEPTH, GROUP, SORTED)  # fmt: skip


@triton.jit
def _down(
    tile, h, w, y, weights, ids, order, blocks, num_blocks, hidden, intermediate,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, SORTED: tl.constexpr,
):  # fmt: skip
    block, column = _corner(tile, num_blocks, hidden // COLUMNS, GROUP)
    expert, first, end = _block(ids, blocks, block, SORTED)
    top = expert * hidden + column * COLUMNS
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, intermediate, DEPTH):
        sums = tl.dot(h.load([first, k]), w.load([top, k]).T, sums)
    row = first + tl.arange(0, ROWS)
    pair = row
    if SORTED:
        pair = tl.load(order + row, mask=row < end, other=0)
    weight = tl.load(weights + pair, mask=row < end, other=0)
    n = column * COLUMNS + tl.arange(0, COLUMNS)
    out = (sums * weight[:, None]).to(y.dtype.element_ty)
    tl.store(y + pair[:, None] * hidden + n[None, :], out, mask=(row < end)[:, None])


@triton.jit(do_not_specialize=["size"])
def down(
    h, w, y, weights, ids, order, blocks, num_blocks, size, hidden, intermediate,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, SORTED: tl.constexpr,
    PERSISTENT: tl.constexpr,
):  # fmt: skip
    """``y (S, H)``, in the order of the pairs: the routing weight times ``down h``. ``h``, ``w``: descriptors of (S, I)
    and (E·H, I), tiles (ROWS, DEPTH) and (COLUMNS, DEPTH). Grid: as that of :func:`gate_up`, of H / COLUMNS."""
    row_blocks = size
    if SORTED:
        row_blocks = tl.load(num_blocks)
    tiles = row_blocks * (hidden // COLUMNS)
    if PERSISTENT:
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _down(tile, h, w, y, weights, ids, order, blocks, row_blocks, hidden, intermediate,
                  ROWS, COLUMNS, DEPTH, GROUP, SORTED)  # fmt: skip
    elif tl.program_id(0) < tiles:
        _down(tl.program_id(0), h, w, y, weights, ids, order, blocks, row_blocks, hidden, intermediate,
              ROWS, COLUMNS, DEPTH, GROUP, SORTED)  # fmt: skip


@triton.jit
def combine(pairs, y, hidden, TOP_K: tl.constexpr, WIDTH: tl.constexpr):
    """``y (T, H)``: the sum of the k rows of each token in ``pairs (S, H)``. Grid: (T, ⌈H / WIDTH⌉)."""
    token = tl.program_id(0)
    n = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for j in tl.static_range(TOP_K):
        total += tl.load(pairs + (token * TOP_K + j) * hidden + n, mask=n < hidden, other=0).to(tl.float32)
    tl.store(y + token * hidden + n, total.to(y.dtype.element_ty), mask=n < hidden)
