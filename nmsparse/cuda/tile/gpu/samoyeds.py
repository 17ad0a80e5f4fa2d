"""The words of :mod:`nmsparse.cuda.kernels.samoyeds` that :mod:`~nmsparse.cuda.kernels.gemm` does not have."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from numba import cuda
from numba.cuda import types

from ... import schedule
from ...layout import BLOCK
from ...ptx import arithmetic, barrier, memory, wgmma
from ...ptx.numba_glue import callable_of
from . import consumer_words, place_words, producer_words, ring_words
from .staging import make_store, read_thread
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
        turn_words,
        partial_words,
        store_words,
    ):
        for word, function in part(cfg).items():
            setattr(tile, word, function)
    del tile.wait_wgmma_but_one  # each step waits for all of its own
    return tile


def run_words(cfg: Any) -> dict[str, Callable[..., Any]]:
    """Sums of a run, and what becomes of them."""
    SUMS, (FIRST, LAST), TILE_M = cfg.run_sums, cfg.kept, cfg.tile_m
    QUADS = SUMS // 4
    add = arithmetic.add_to_one_of_two(2)
    get = callable_of(memory.load("global", "u8", hint="nc"))
    run_at = schedule.run_of

    @jit
    def run_of(step, run_steps):
        run, left = run_at(step, run_steps)
        return i32(run), i32(left)

    @jit
    def zero(acc):
        for i in range(FIRST, LAST):
            acc[i] = f32(0)

    @jit
    def picks(picks_gmem, row, rows, runs):
        """Where the choices of this thread's two sub-rows begin."""
        mine = row * (TILE_M // 2) + cuda.threadIdx.x // 32 * 16 - BLOCK + cuda.threadIdx.x % 32 // 4
        last = (rows + 1) // 2 - 1  # rows beyond the last are not stored; they may go anywhere
        return picks_gmem + u64(min(mine, last)) * u64(runs), picks_gmem + u64(min(mine + 8, last)) * u64(runs)

    @jit
    def pick(picks, run):
        return get(picks[0] + u64(run)), get(picks[1] + u64(run))

    def add_quad(i):
        """Columns 2q and 2q + 1 of eight: of the lower row, of the upper row."""
        adds = [
            callable_of(add, places=[SUMS + c, SUMS + c + 1, 2 * SUMS + c, 2 * SUMS + c + 1])
            for c in (4 * i, 4 * i + 2)
        ]
        lower, upper = adds

        @jit
        def part(acc, low, high):
            lower(acc, acc[4 * i], acc[4 * i + 1], low)
            upper(acc, acc[4 * i + 2], acc[4 * i + 3], high)

        return part

    add_all = sequence([add_quad(i) for i in range(QUADS)])

    @jit
    def add_run(acc, odd):
        add_all(acc, odd[0], odd[1])

    return {"run_of": run_of, "zero": zero, "picks": picks, "pick": pick, "add_run": add_run}


def turn_words(cfg: Any) -> dict[str, Callable[..., Any]]:
    """Consumers that multiply by turns: while one adds its run, the tensor cores have the other's products."""
    ORDERED = cfg.ordered and cfg.warpgroups == 2
    sync, arrive = callable_of(barrier.named_barrier(256)), callable_of(barrier.named_arrive(256))
    wait_1 = callable_of(wgmma.wait(1))

    @jit
    def take_turns():
        if ORDERED and cuda.threadIdx.x // 128 == 2:
            arrive(3)  # the first consumer begins

    @jit
    def await_turn():
        if ORDERED:
            sync(u32(2 + cuda.threadIdx.x // 128))

    @jit
    def pass_turn():
        if ORDERED:
            wait_1()
            arrive(u32(5 - cuda.threadIdx.x // 128))

    return {"take_turns": take_turns, "await_turn": await_turn, "pass_turn": pass_turn}


def store_words(cfg: Any) -> dict[str, Callable[..., Any]]:
    """The epilogue: a thread holds both outputs of its sub-rows, which are neighbours in a token of Y."""
    TILE_M, TILE_T, SUMS, HEIGHT, PITCH = cfg.tile_m, cfg.tile_t, cfg.run_sums, cfg.height, cfg.staged_token_bytes
    EIGHTS = cfg.chunk // 8
    pack, put, bias_of = callable_of(memory.pack(cfg.dtype)), callable_of(memory.store("shared", "u32")), make_bias(cfg)

    def stage_tokens(number):
        """Eight tokens, of which a thread holds two."""
        EVEN, ODD = SUMS + 4 * number, 2 * SUMS + 4 * number

        @jit
        def part(acc, at, bias):
            for column in range(2):
                to = at + u32((8 * number + column) * PITCH)
                put(to, pack(acc[EVEN + column] + bias[0], acc[ODD + column] + bias[1]))
                put(to + u32(32), pack(acc[EVEN + column + 2] + bias[2], acc[ODD + column + 2] + bias[3]))

        return part

    def stage_of(first):
        all_tokens = sequence([stage_tokens(first // 8 + i) for i in range(EIGHTS)])

        @jit
        def stage(acc, staging, thread, bias):
            sub = thread // 32 * 16 + thread % 32 // 4
            all_tokens(acc, staging + u32(thread % 4 * 2 * PITCH + sub * 4), bias)

        return stage

    store_all = make_store(cfg, HEIGHT, stage_of)

    @jit
    def store(acc, ring, y_gmem, bias_gmem, row, token, rows, tokens, pitch):
        thread = read_thread()
        group, thread = thread // 128, thread % 128
        first = row * TILE_M + (group - 1) * HEIGHT
        at = first + (thread // 32 * 16 + thread % 32 // 4) * 2
        bias = (
            bias_of(bias_gmem, at, rows),
            bias_of(bias_gmem, at + 1, rows),
            bias_of(bias_gmem, at + 16, rows),
            bias_of(bias_gmem, at + 17, rows),
        )
        store_all(acc, ring, thread, group, bias, y_gmem, first, rows, token * TILE_T, tokens, pitch)

    return {"store": store}
