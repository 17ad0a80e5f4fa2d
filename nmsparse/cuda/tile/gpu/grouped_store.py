"""The epilogue of :mod:`nmsparse.cuda.kernels.grouped` on Numba CUDA: activation, rounding, and the way to memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from ...ptx import memory
from ...ptx.numba_glue import callable_of
from .activation import ACTIVATIONS
from .numbers import read_thread
from .staging import make_stage_rows, make_store
from .store import sequence

u32, u64, i32, f32 = types.uint32, types.uint64, types.int32, types.float32

jit = cuda.jit(device=True, forceinline=True)


def store_words(cfg: Any) -> dict[str, Callable[..., Any]]:
    """``store`` for ``cfg``."""
    WARPGROUPS, OUTPUTS = cfg.warpgroups, cfg.outputs
    store_all = make_store(cfg, OUTPUTS, _stage_pairs(cfg) if cfg.pairs else _stage_rows(cfg))

    @jit
    def store(acc, ring, y_gmem, row, first, end, outputs, pitch):
        number = read_thread()
        group, thread = u32(number // u32(128)), u32(number % u32(128))
        mine = i32((row * WARPGROUPS + i32(group - u32(1))) * OUTPUTS)
        store_all(acc, ring, thread, group, 0, y_gmem, mine, outputs, i32(first), i32(end), pitch)

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
                to = u32(at + u32((8 * number + column) * PITCH))
                a, c = acc[EVEN + column], acc[EVEN + column + 2]
                b, d = act(acc[BOTH + column] - a), acc[BOTH + column + 2] - c
                a = act(a)
                if GATED:
                    put(to, pack(a * c, b * d))
                else:
                    put(to, pack(a, b))
                    put(u32(to + u32(32)), pack(act(c), act(d)))

        return part

    SLAB, EIGHTS = 8 if GATED else 16, cfg.chunk // 8  # pairs of a warp

    def stage_of(first):
        all_tokens = sequence([tokens(first // 8 + i) for i in range(EIGHTS)])

        @jit
        def stage(acc, staging, thread, extra):
            warp, lane = u32(thread // u32(32)), u32(thread % u32(32))
            pair = u32(warp * u32(SLAB) + lane // u32(4))
            all_tokens(acc, u32(staging + lane % u32(4) * u32(2 * PITCH) + pair * u32(4)))

        return stage

    return stage_of


def _stage_rows(cfg: Any) -> Callable[[int], Callable[..., None]]:
    """Of other weights: a thread's rows are both of a neuron, or two of the output's."""
    act, pack = ACTIVATIONS[cfg.activation], callable_of(memory.pack(cfg.dtype))

    @jit
    def product(acc, i, extra):
        """Two tokens of a neuron."""
        return pack(act(acc[i]) * acc[i + 2], act(acc[i + 1]) * acc[i + 3])

    @jit
    def row(acc, i, extra):
        """Two tokens of a row."""
        return pack(act(acc[i]), act(acc[i + 1]))

    return make_stage_rows(cfg, (product,) if cfg.gated else (row, row))
