"""The words of :mod:`nmsparse.cuda.kernels.combine` on Numba CUDA: some more for passes over memory, beside those of
:mod:`~nmsparse.cuda.tile.gpu.elements` and :mod:`~nmsparse.cuda.tile.gpu.overlap`. The twin is
:mod:`~nmsparse.cuda.tile.cpu.combine`.

=========================================  ============================================================================
``place(tokens, pieces) -> t, p, exists``  token and piece of this thread; the last token again where there is none
``load_slots(gmem, token, j)``             the token's slots from j on, a batch; -1 beyond the k-th
``load_weights(gmem, token, j, slots)``    their fp32 weights; 0 where the slot is below 0
``load_row(gmem, row, pitch, i, left)``    numbers i to i + 7 of a row, of which the first ``left`` exist and the others
                                           are zeros
``load_rows(gmem, rows, pitch, i, left)``  the same of each row of a batch; zeros for a row below 0
``store_row(gmem, row, pitch, i, v, l)``   the first l of eight numbers
``zeros()``                                eight fp32 sums
``add(sums, v)``                           ``sums + v``
``add_rows(sums, weights, rows)``          ``sums + weight · row`` for one row of the batch after the other, each
                                           rounded once
``round(sums) -> v``                       to eight numbers of 16 bits
``choose(c, a, b)``                        ``a if c else b``
=========================================  ============================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from numba import cuda
from numba.cuda import libdevice, types

from ...ptx import memory
from ...ptx.numba_glue import callable_of
from . import elements
from .overlap import overlap_words
from .warp import collect

__all__ = ["make"]

u32, u64, i32, i64, f32 = types.uint32, types.uint64, types.int32, types.int64, types.float32

jit = cuda.jit(device=True, forceinline=True)


def make(cfg: Any) -> ModuleType:
    """The words for ``cfg``, a :class:`~nmsparse.cuda.config_route.CombineConfig`."""
    tile = elements.make(cfg)
    for words in (overlap_words(cfg), _row_words(cfg, tile), _sum_words(cfg)):
        for word, function in words.items():
            setattr(tile, word, function)
    return tile


def _row_words(cfg: Any, tile: ModuleType) -> dict[str, Callable[..., Any]]:
    THREADS, TOP_K, BATCH = cfg.threads, cfg.top_k, cfg.batch
    WHOLE = TOP_K % BATCH == 0
    divide = callable_of(memory.divide)
    get = callable_of(memory.load("global", "s32"))
    get_float, get_16 = callable_of(memory.load_where("f32")), callable_of(memory.load_where("u32", 4))
    get_2, store_columns = callable_of(memory.load_if), tile.store_columns

    @jit
    def place(tokens, pieces):
        thread = u32(u32(cuda.blockIdx.x) * u32(THREADS) + u32(cuda.threadIdx.x))
        token = u32(divide(thread, u32(pieces)))
        return i32(min(token, u32(tokens - 1))), i32(thread - token * u32(pieces)), token < u32(tokens)

    def load_slot(i):
        @jit
        def part(slots_gmem, token, first):
            slot = i32(-1)
            if WHOLE or first + i < TOP_K:
                slot = get(slots_gmem + (u64(token) * u64(TOP_K) + u64(first + i)) * u64(4))
            return (slot,)

        return part

    def load_weight(i):
        @jit
        def part(weights_gmem, token, first, slots):
            at = weights_gmem + (u64(token) * u64(TOP_K) + u64(first + i)) * u64(4)
            return (get_float(at, u32(slots[i] >= 0)),)

        return part

    if cfg.aligned:

        @jit
        def load_row(gmem, row, pitch, column, left):
            return get_16(gmem + (u64(row) * u64(pitch) + u64(column)) * u64(2), u32(left >= 8))

    else:

        @jit
        def load_pair(at, left):
            return u32(u32(get_2(at, u32(left >= 1))) | u32(get_2(at + u64(2), u32(left >= 2))) << u32(16))

        @jit
        def load_row(gmem, row, pitch, column, left):
            at = gmem + (u64(row) * u64(pitch) + u64(column)) * u64(2)
            a, b = load_pair(at, left), load_pair(at + u64(4), left - 2)
            return a, b, load_pair(at + u64(8), left - 4), load_pair(at + u64(12), left - 6)

    def load_row_of(i):
        @jit
        def part(gmem, rows, pitch, column, left):
            return (load_row(gmem, rows[i], pitch, column, left if rows[i] >= 0 else 0),)

        return part

    @jit
    def store_row(gmem, row, pitch, column, piece, left):
        store_columns(gmem, i64(row) * i64(pitch) + column, piece, left)

    batches = {"load_slots": load_slot, "load_weights": load_weight, "load_rows": load_row_of}
    return {
        "place": place,
        "load_row": load_row,
        "store_row": store_row,
        **{word: collect([part(i) for i in range(BATCH)]) for word, part in batches.items()},
    }


def _sum_words(cfg: Any) -> dict[str, Callable[..., Any]]:
    BATCH = cfg.batch
    pack, unpack = callable_of(memory.pack(cfg.dtype)), callable_of(memory.unpack(cfg.dtype))

    @jit
    def zeros():
        zero = f32(0)
        return zero, zero, zero, zero, zero, zero, zero, zero

    @jit
    def low(pair):
        return unpack(u32(pair & u32(0xFFFF)))

    @jit
    def high(pair):
        return unpack(u32(pair >> u32(16)))

    @jit
    def add_row(sums, weight, v):
        return (
            libdevice.fmaf_rn(weight, low(v[0]), sums[0]),
            libdevice.fmaf_rn(weight, high(v[0]), sums[1]),
            libdevice.fmaf_rn(weight, low(v[1]), sums[2]),
            libdevice.fmaf_rn(weight, high(v[1]), sums[3]),
            libdevice.fmaf_rn(weight, low(v[2]), sums[4]),
            libdevice.fmaf_rn(weight, high(v[2]), sums[5]),
            libdevice.fmaf_rn(weight, low(v[3]), sums[6]),
            libdevice.fmaf_rn(weight, high(v[3]), sums[7]),
        )

    @jit
    def round_(sums):
        return pack(sums[0], sums[1]), pack(sums[2], sums[3]), pack(sums[4], sums[5]), pack(sums[6], sums[7])

    @jit
    def add(sums, v):
        return add_row(sums, f32(1), v)

    def add_first(count):
        """The first ``count`` rows of a batch."""
        last = count - 1
        if count == 1:

            @jit
            def one(sums, weights, rows):
                return add_row(sums, weights[0], rows[0])

            return one
        before = add_first(last)

        @jit
        def several(sums, weights, rows):
            return add_row(before(sums, weights, rows), weights[last], rows[last])

        return several

    return {"zeros": zeros, "add": add, "add_rows": add_first(BATCH), "round": round_}
