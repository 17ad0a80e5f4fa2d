"""The epilogue of :mod:`nmsparse.cuda.kernels.grouped` on Numba CUDA: activation, rounding, and the way to memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from ...ptx import matrix, memory
from ...ptx.numba_glue import callable_of
from .activation import ACTIVATIONS
from .staging import make_store, read_thread
from .store import sequence

u32, u64, i32, f32 = types.uint32, types.uint64, types.int32, types.float32

jit = cuda.jit(device=True, forceinline=True)


def store_words(cfg: Any) -> dict[str, Callable[..., Any]]:
    """``store`` for ``cfg``."""
    WARPGROUPS, OUTPUTS = cfg.warpgroups, cfg.outputs
    store_all = make_store(cfg, OUTPUTS, _stage_pairs(cfg) if cfg.pairs else _stage_rows(cfg))

    @jit
    def store(acc, ring, y_gmem, row, first, end, outputs, pitch):
        thread = read_thread()
        group = thread // 128
        mine = (row * WARPGROUPS + group - 1) * OUTPUTS
        store_all(acc, ring, thread % 128, group, 0, y_gmem, mine, outputs, first, end, pitch)

    return {"store": store}


def _stage_pairs(cfg: Any) -> Callable[[int], Callable[..., Any]]:
    """Of Samoyeds: a thread holds both outputs of its sub-rows, which are neighbours in a token."""
    SUMS, PITCH, GATED = cfg.run_sums, cfg.staged_token_bytes, cfg.gated
    act = ACTIVATIONS[cfg.activation]
    pack, put = callable_of(memory.pack(cfg.dtype)), callable_of(memory.store("shared", "u32"))

    def tokens(number):
        """Eight tokens, of which a thread holds two."""
        BOTH, EVEN = 4 * number, SUMS + 4 * number

        @jit
        def part(acc, at):
            for column in range(2):
                to = at + u32((8 * number + column) * PITCH)
                a, c = acc[EVEN + column], acc[EVEN + column + 2]
                b, d = act(acc[BOTH + column] - a), acc[BOTH + column + 2] - c
                a = act(a)
                if GATED:
                    put(to, pack(a * c, b * d))
                else:
                    put(to, pack(a, b))
                    put(to + u32(32), pack(act(c), act(d)))

        return part

    SLAB, EIGHTS = 8 if GATED else 16, cfg.chunk // 8  # pairs of a warp

    def stage_of(first):
        all_tokens = sequence([tokens(first // 8 + i) for i in range(EIGHTS)])

        @jit
        def stage(acc, staging, thread, extra):
            lane = thread % 32
            all_tokens(acc, staging + u32(lane % 4 * 2 * PITCH + (thread // 32 * SLAB + lane // 4) * 4))

        return stage

    return stage_of


def _stage_rows(cfg: Any) -> Callable[[int], Callable[..., Any]]:
    """Of other weights: sums lie along tokens in a thread; ``stmatrix.trans`` turns 8×8 pieces."""
    PITCH, GATED, CHUNK = cfg.staged_token_bytes, cfg.gated, cfg.chunk
    act, pack = ACTIVATIONS[cfg.activation], callable_of(memory.pack(cfg.dtype))
    put_1, put_2, put_4 = (callable_of(matrix.stmatrix(count, trans=True)) for count in (1, 2, 4))

    @jit
    def product(acc, i):
        """Two tokens of a neuron."""
        return pack(act(acc[i]) * acc[i + 2], act(acc[i + 1]) * acc[i + 3])

    @jit
    def row(acc, i):
        """Two tokens of a row."""
        return pack(act(acc[i]), act(acc[i + 1]))

    STEP = min(CHUNK, 32 if GATED else 16)  # tokens that are turned at a time

    def tokens(first):
        """``STEP`` tokens."""
        SUM, COUNT = first // 2, STEP

        @jit
        def gated(acc, at):
            to = at + u32(first * PITCH)
            if COUNT == 8:
                put_1(to, product(acc, SUM))
            elif COUNT == 16:
                put_2(to, product(acc, SUM), product(acc, SUM + 4))
            else:
                put_4(to, product(acc, SUM), product(acc, SUM + 4), product(acc, SUM + 8), product(acc, SUM + 12))

        @jit
        def plain(acc, at):
            to = at + u32(first * PITCH)
            if COUNT == 8:
                put_2(to, row(acc, SUM), row(acc, SUM + 2))
            else:
                put_4(to, row(acc, SUM), row(acc, SUM + 2), row(acc, SUM + 4), row(acc, SUM + 6))

        return gated if GATED else plain

    def stage_of(first):
        all_tokens = sequence([tokens(first + i) for i in range(0, CHUNK, STEP)])

        @jit
        def stage(acc, staging, thread, extra):
            warp, line, matrix_ = thread // 32, thread % 8, thread % 32 // 8
            if GATED:  # matrix i of a warp: tokens 8i.., its eight neurons
                at = (matrix_ * 8 + line) * PITCH + warp * 16
            else:  # matrices of a warp: rows 0-7 and 8-15 of tokens 0-7, then of tokens 8-15
                at = (matrix_ // 2 * 8 + line) * PITCH + (warp * 2 + matrix_ % 2) * 16
            all_tokens(acc, staging + u32(at))

        return stage

    return stage_of
