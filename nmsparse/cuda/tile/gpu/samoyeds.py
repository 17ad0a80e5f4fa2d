"""The words of :mod:`nmsparse.cuda.kernels.samoyeds` that :mod:`~nmsparse.cuda.kernels.gemm` does not have."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from numba import cuda
from numba.cuda import types

from ... import schedule
from ...layout import BLOCK
from ...ptx import arithmetic, memory
from ...ptx.numba_glue import callable_of
from . import consumer_words, place_words, producer_words, ring_words
from .cluster import cluster_words
from .numbers import read_consumer, row_of, thread_number
from .staging import make_stage_pairs, make_store
from .store import make_bias, partial_words, sequence

u32, u64, i32, f32 = types.uint32, types.uint64, types.int32, types.float32

jit = cuda.jit(device=True, forceinline=True)


def make(cfg: Any) -> ModuleType:
    """The words for ``cfg``, as a module that a kernel text receives."""
    tile = ModuleType("tile")
    tile.PRODUCER = -1
    for part in (
        place_words,
        ring_words,
        producer_words,
        consumer_words,
        run_words,
        partial_words,
        cluster_words,
        store_words,
    ):
        for word, function in part(cfg).items():
            setattr(tile, word, function)
    del tile.wait_wgmma_but_one  # each step waits for all of its own
    return tile


def run_words(cfg: Any) -> dict[str, Callable[..., Any]]:
    """The sums of all runs so far, and what of them belongs to the even rows."""
    SUMS, TILE_M = cfg.run_sums, cfg.tile_m
    QUADS = SUMS // 4
    add = arithmetic.add_scaled(2)
    get = callable_of(memory.load("global", "u8", hint="nc"))
    run_at = schedule.run_of

    @jit
    def run_of(step, run_steps):
        run, left = run_at(step, run_steps)
        return i32(run), i32(left)

    @jit
    def zero(acc):
        for i in range(SUMS, 2 * SUMS):
            acc[i] = f32(0)

    @jit
    def picks(picks_gmem, row, rows, runs):
        """Where the choices of this thread's two sub-rows begin."""
        mine = i32(row * (TILE_M // 2) + i32(row_of(thread_number())) - BLOCK)
        last = i32((rows + 1) // 2 - 1)  # rows beyond the last are not stored; they may go anywhere
        low, high = u64(u32(min(mine, last))), u64(u32(min(i32(mine + 8), last)))
        return picks_gmem + low * u64(u32(runs)), picks_gmem + high * u64(u32(runs))

    @jit
    def pick(picks, run):
        return get(picks[0] + u64(u32(run))), get(picks[1] + u64(u32(run)))

    def add_quad(i):
        """Columns 2q and 2q + 1 of eight: of the lower row, of the upper row."""
        FIRST = 4 * i
        lower, upper = (callable_of(add, first=SUMS + FIRST + c) for c in (0, 2))

        @jit
        def part(acc, low, high):
            lower(acc, acc[FIRST], acc[FIRST + 1], low)
            upper(acc, acc[FIRST + 2], acc[FIRST + 3], high)

        return part

    add_all = sequence([add_quad(i) for i in range(QUADS)])

    @jit
    def end_run(acc, odd, following):
        # Without the outer i32 the difference would be of 64 bits, whose conversion is slow.
        lower, upper = i32(i32(following[0]) - i32(odd[0])), i32(i32(following[1]) - i32(odd[1]))
        add_all(acc, f32(lower), f32(upper))

    @jit
    def end_runs(acc, odd):
        end_run(acc, odd, (u32(1), u32(1)))

    return {"run_of": run_of, "zero": zero, "picks": picks, "pick": pick, "end_run": end_run, "end_runs": end_runs}


def store_words(cfg: Any) -> dict[str, Callable[..., Any]]:
    """The epilogue: a thread holds both outputs of its sub-rows, which are neighbours in a token of Y."""
    TILE_M, TILE_T, SUMS, HEIGHT, BIAS = cfg.tile_m, cfg.tile_t, cfg.run_sums, cfg.height, cfg.bias
    pack, bias_of = callable_of(memory.pack(cfg.dtype)), make_bias(cfg)

    def row(second):
        """Both outputs of a sub-row, the lower or the upper."""
        FIRST = 2 * second

        @jit
        def word(acc, i, bias):
            even = acc[SUMS + i + FIRST]
            odd = acc[i + FIRST] - even
            if BIAS:
                even, odd = even + bias[FIRST], odd + bias[FIRST + 1]
            return pack(even, odd)

        return word

    store_all = make_store(cfg, HEIGHT, make_stage_pairs(cfg, (row(0), row(1))))

    @jit
    def store(acc, ring, y_gmem, bias_gmem, row, token, rows, tokens, pitch, cluster):
        group, thread = read_consumer()
        first = i32(row * TILE_M + i32(group - u32(1)) * HEIGHT)
        at = i32(first + i32(row_of(thread) * u32(2)))
        bias = (
            bias_of(bias_gmem, at, rows),
            bias_of(bias_gmem, i32(at + 1), rows),
            bias_of(bias_gmem, i32(at + 16), rows),
            bias_of(bias_gmem, i32(at + 17), rows),
        )
        store_all(acc, ring, thread, group, bias, y_gmem, first, rows, i32(token * TILE_T), tokens, pitch, cluster)

    return {"store": store}
