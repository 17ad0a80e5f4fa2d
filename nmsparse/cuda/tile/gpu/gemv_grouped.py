"""The words of :mod:`nmsparse.cuda.kernels.gemv_grouped` that :mod:`~nmsparse.cuda.kernels.gemv` does not have."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from numba.cuda import types

from ...layout import BLOCK_BYTES
from ...ptx import memory
from ...ptx.numba_glue import callable_of
from . import jit, nothing
from .activation import ACTIVATIONS
from .gemv import Words, sum_words, token_copy, token_of_lane, total_word, wait_word, weight_words
from .grouped import picks_word, plan_words
from .numbers import cta_number, thread_number
from .overlap import overlap_words
from .store import collect, sequence

u16, u32, u64, i32, i64, f32 = types.uint16, types.uint32, types.uint64, types.int32, types.int64, types.float32


def make(cfg: Any) -> ModuleType:
    """The words for ``cfg``, a :class:`~nmsparse.cuda.config_grouped.GroupedGemvConfig`."""
    tile = ModuleType("tile")
    tile.BLOCKS_A_ROUND = cfg.warps * cfg.batch
    for words in (
        overlap_words(cfg),
        plan_words(cfg),
        _expert_words(cfg),
        weight_words(cfg),
        _token_words(cfg),
        sum_words(cfg),
        _store_words(cfg),
    ):
        for word, function in words.items():
            setattr(tile, word, function)
    return tile


def _expert_words(cfg: Any) -> Words:
    @jit
    def number():
        return i32(cta_number())

    @jit
    def weights_of(w_gmem, expert, row_blocks, k_blocks):
        return w_gmem + u64(expert) * u64(row_blocks) * u64(k_blocks) * u64(BLOCK_BYTES)

    return {"number": number, "weights_of": weights_of, "picks": picks_word(cfg.gated) if cfg.pairs else nothing}


def _token_words(cfg: Any) -> Words:
    GATHER = cfg.gather
    read_row = callable_of(memory.load("global", "u32"))

    def source_of(number):
        of_lane = token_of_lane(cfg, number)

        @jit
        def part(rows_gmem, first, end, x_pitch):
            token = i32(first + i32(of_lane()))
            if token >= end:
                return (i64(-1),)
            if GATHER:
                token = i32(read_row(rows_gmem + u64(token) * u64(4)))
            return (i64(token) * i64(x_pitch),)

        return part

    def load_tokens_of(i, number):
        copy_part, of_lane = token_copy(cfg, i, 0), token_of_lane(cfg, number)

        @jit
        def part(x_gmem, sources, block, columns):
            source = sources[number]
            copy_part(x_gmem + u64(source) * u64(2), of_lane(), source >= 0, block, columns)

        return part

    return {
        "sources": collect([source_of(number) for number in range(cfg.copies)]),
        "load_tokens": sequence([load_tokens_of(i, number) for i in range(cfg.batch) for number in range(cfg.copies)]),
        "wait_tokens": wait_word(),
    }


def _store_words(cfg: Any) -> Words:
    THREADS, SETS, OUTPUTS, TILE_T, GATED = cfg.threads, cfg.sets, cfg.outputs, cfg.tile_t, cfg.gated
    total, act = total_word(cfg), ACTIVATIONS[cfg.activation]
    pack, write = callable_of(memory.pack(cfg.dtype)), callable_of(memory.store("global", "u16"))

    @jit
    def store(y_gmem, slab, first, end, outputs, y_pitch):
        for i in range(-(-OUTPUTS * TILE_T // THREADS)):
            index = u32(thread_number() + u32(i * THREADS))
            token, output = u32(index // u32(OUTPUTS)), u32(index % u32(OUTPUTS))
            row, half = u32(output // u32(SETS)), u32(output % u32(SETS))
            position, neuron = i32(first + i32(token)), i32(slab * OUTPUTS + i32(output))
            if token < TILE_T and position < end and neuron < outputs:
                value = act(total(half, token, row))
                if GATED:
                    value *= total(half, token, u32(row + u32(8)))
                at = u64(u32(position)) * u64(u32(y_pitch)) + u64(u32(neuron))
                write(y_gmem + at * u64(2), u16(pack(value, f32(0)) & u32(0xFFFF)))

    return {"store": store}
