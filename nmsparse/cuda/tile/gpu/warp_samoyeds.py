"""What the ``mma.sp`` kernel says of Samoyeds on Numba CUDA: whose the sums of a run are, and the epilogue of pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from ...ptx import arithmetic, memory
from ...ptx.numba_glue import callable_of
from . import jit, nothing
from .store import collect, make_bias, sequence

u32, u64, i32, f32 = types.uint32, types.uint64, types.int32, types.float32


def run_words(cfg: Any) -> dict[str, Callable[..., Any]]:
    """Sums of a run, and what becomes of them; weights other than Samoyeds have nothing to say here."""
    if not cfg.pairs:
        return {"picks": nothing, "pick": nothing, "add_run": nothing}
    (HIGH, WIDE), WARPS_T, ROWS, SUMS = cfg.atoms, cfg.warps_t, cfg.tile_rows, cfg.run_sums
    get, add = callable_of(memory.load("global", "u8", hint="nc")), arithmetic.add_to_one_of_two(2)

    def row_of(i):
        @jit
        def part(mine, last, runs):
            # Rows beyond the last are not stored; they may go anywhere.
            return i32(min(mine + 16 * i, last) * runs), i32(min(mine + 16 * i + 8, last) * runs)

        return part

    rows_of = collect([row_of(i) for i in range(HIGH)])

    @jit
    def picks(index_gmem, row, rows, runs):
        """Where the choices of this thread's sub-rows begin: an address, and how far after it each is."""
        lane, warp = i32(cuda.threadIdx.x) % 32, i32(cuda.threadIdx.x) // 32
        mine = row * ROWS + warp // WARPS_T * (16 * HIGH) + lane // 4
        return index_gmem, rows_of(i32(mine), i32((rows - 1) // 2), i32(runs))

    def pick_row(i):
        @jit
        def part(index_gmem, offsets, run):
            return get(index_gmem + u64(offsets[2 * i] + run)), get(index_gmem + u64(offsets[2 * i + 1] + run))

        return part

    pick_rows = collect([pick_row(i) for i in range(HIGH)])

    @jit
    def pick(picks, run):
        return pick_rows(picks[0], picks[1], i32(run))

    def add_atom(i, j):
        C = 4 * (i * WIDE + j)
        lower, upper = (
            callable_of(add, places=[SUMS + c, SUMS + c + 1, 2 * SUMS + c, 2 * SUMS + c + 1]) for c in (C, C + 2)
        )

        @jit
        def part(acc, odd):
            lower(acc, acc[C], acc[C + 1], odd[2 * i])
            upper(acc, acc[C + 2], acc[C + 3], odd[2 * i + 1])
            for c in range(4):
                acc[C + c] = f32(0)

        return part

    add_run = sequence([add_atom(i, j) for i in range(HIGH) for j in range(WIDE)])
    return {"picks": picks, "pick": pick, "add_run": add_run}


def stage_pairs(cfg: Any) -> Callable[..., Any]:
    """A thread holds both outputs of its sub-rows, which are neighbours in a token of the output."""
    (HIGH, WIDE), STAGED, SUMS = cfg.atoms, cfg.staged_bytes, cfg.run_sums
    bias_of, pack = make_bias(cfg), callable_of(memory.pack(cfg.dtype))
    put = callable_of(memory.store("shared", "u32"))

    def stage_atom(i, j):
        EVEN, ODD = SUMS + 4 * (i * WIDE + j), 2 * SUMS + 4 * (i * WIDE + j)

        @jit
        def part(acc, at, a, b, c, d):
            for column in range(2):
                to = u32(at + (8 * j + column) * STAGED + 64 * i)
                put(to, pack(acc[EVEN + column] + a, acc[ODD + column] + b))
                put(to + u32(32), pack(acc[EVEN + column + 2] + c, acc[ODD + column + 2] + d))

        return part

    def stage_row(i):
        atoms = sequence([stage_atom(i, j) for j in range(WIDE)])

        @jit
        def part(acc, at, bias_gmem, row, rows):
            a, b = bias_of(bias_gmem, row + 32 * i, rows), bias_of(bias_gmem, row + 32 * i + 1, rows)
            c, d = bias_of(bias_gmem, row + 32 * i + 16, rows), bias_of(bias_gmem, row + 32 * i + 17, rows)
            atoms(acc, at, a, b, c, d)

        return part

    stage_all = sequence([stage_row(i) for i in range(HIGH)])

    @jit
    def stage(acc, ring, lane, m, t, bias_gmem, first, rows):
        at = ring + (t + lane % 4 * 2) * STAGED + (m + lane // 4) * 4
        stage_all(acc, at, bias_gmem, first + 2 * (m + lane // 4), rows)

    return stage
