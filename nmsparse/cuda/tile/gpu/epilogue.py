"""The epilogue of :mod:`nmsparse.cuda.kernels.gemm` on Numba CUDA: bias, rounding, and the way to memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from ...layout import BLOCK
from ...ptx import memory
from ...ptx.numba_glue import callable_of
from .numbers import read_consumer, row_of
from .staging import make_stage_rows, make_store
from .store import collect, make_bias, sequence

__all__ = ["store_words"]

u32, i32 = types.uint32, types.int32

jit = cuda.jit(device=True, forceinline=True)


def store_words(cfg: Any) -> dict[str, Callable[..., Any]]:
    """``store`` for ``cfg``."""
    TILE_M, TILE_T, BLOCKS, BIAS = cfg.tile_m, cfg.tile_t, cfg.blocks, cfg.bias
    pack, bias_of = callable_of(memory.pack(cfg.dtype)), make_bias(cfg)

    def row(number):
        """Two tokens of one of a thread's rows."""

        @jit
        def word(acc, i, bias):
            if BIAS:
                return pack(acc[i] + bias[number], acc[i + 1] + bias[number])
            return pack(acc[i], acc[i + 1])

        return word

    def biases(block):
        @jit
        def part(bias_gmem, first, rows):
            mine = i32(first + block * BLOCK)
            return bias_of(bias_gmem, mine, rows), bias_of(bias_gmem, i32(mine + 8), rows)

        return part

    stages = [make_stage_rows(cfg, (row(2 * block), row(2 * block + 1)), block) for block in range(BLOCKS)]
    store_all = make_store(cfg, BLOCKS * BLOCK, lambda token: sequence([stage(token) for stage in stages]))
    all_biases = collect([biases(block) for block in range(BLOCKS)])

    @jit
    def store(acc, ring, y_gmem, bias_gmem, row, token, rows, tokens, pitch, cluster):
        group, thread = read_consumer()
        first = i32(row * TILE_M + i32(group - u32(1)) * (BLOCKS * BLOCK))
        bias = all_biases(bias_gmem, i32(first + i32(row_of(thread))), rows)
        store_all(acc, ring, thread, group, bias, y_gmem, first, rows, i32(token * TILE_T), tokens, pitch, cluster)

    return {"store": store}
