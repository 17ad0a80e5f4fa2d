"""The epilogue of :mod:`nmsparse.cuda.kernels.grouped` on Numba CUDA: activation, rounding, and the way to memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from ...ptx import memory
from ...ptx.numba_glue import callable_of
from .activation import ACTIVATIONS
from .numbers import read_consumer
from .staging import make_stage_pairs, make_stage_rows, make_store

u32, u64, i32, f32 = types.uint32, types.uint64, types.int32, types.float32

jit = cuda.jit(device=True, forceinline=True)


def store_words(cfg: Any) -> dict[str, Callable[..., Any]]:
    """``store`` for ``cfg``."""
    WARPGROUPS, OUTPUTS = cfg.warpgroups, cfg.outputs
    store_all = make_store(cfg, OUTPUTS, _stage_pairs(cfg) if cfg.pairs else _stage_rows(cfg))

    @jit
    def store(acc, ring, y_gmem, row, first, end, outputs, pitch):
        group, thread = read_consumer()
        mine = i32((row * WARPGROUPS + i32(group - u32(1))) * OUTPUTS)
        store_all(acc, ring, thread, group, 0, y_gmem, mine, outputs, i32(first), i32(end), pitch, 1)

    return {"store": store}


def _stage_pairs(cfg: Any) -> Callable[[int], Callable[..., Any]]:
    """Of Samoyeds: a thread holds both outputs of its sub-rows, which are neighbours in a token."""
    SUMS, act, pack = cfg.run_sums, ACTIVATIONS[cfg.activation], callable_of(memory.pack(cfg.dtype))

    def row(second):
        """Both outputs of a sub-row, the lower or the upper."""
        FIRST = 2 * second

        @jit
        def word(acc, i, extra):
            even = acc[SUMS + i + FIRST]
            return pack(act(even), act(acc[i + FIRST] - even))

        return word

    @jit
    def neuron(acc, i, extra):
        """Both outputs of a gate's sub-row and of its up row."""
        gate, up = acc[SUMS + i], acc[SUMS + i + 2]
        return pack(act(gate) * up, act(acc[i] - gate) * (acc[i + 2] - up))

    return make_stage_pairs(cfg, (neuron,) if cfg.gated else (row(0), row(1)))


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
