"""The words of :mod:`nmsparse.cuda.kernels.gemv` on Numba CUDA."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from numba import cuda
from numba.cuda import types

from ... import schedule
from ...layout import BLOCK, BLOCK_BYTES, EMPTY, VALUE_BYTES
from ...ptx import arithmetic, barrier, memory, mma
from ...ptx.numba_glue import address_of, callable_of, registers
from . import jit, nothing  # and that module's divide for the schedule
from .grouped import picks_word
from .numbers import cta_number, lane_number, thread_number, warp_number
from .store import sequence

u16, u32, u64, i32, f32 = types.uint16, types.uint32, types.uint64, types.int32, types.float32

Words = dict[str, Callable[..., Any]]


def make(cfg: Any) -> ModuleType:
    """The words for ``cfg``, a :class:`~nmsparse.cuda.config.GemvConfig`."""
    tile = ModuleType("tile")
    tile.BLOCKS_A_ROUND = cfg.warps * cfg.batch
    for words in (weight_words(cfg), _pick_words(cfg), _token_words(cfg), sum_words(cfg), _store_words(cfg)):
        for word, function in words.items():
            setattr(tile, word, function)
    return tile


def weight_words(cfg: Any) -> Words:
    """Weights, and of Samoyeds their picks, from memory to registers."""
    BATCH = cfg.batch
    NO_META, divide = u32(EMPTY * 0x10001), schedule.divide
    read = callable_of(memory.load("global", "u32", hint="L1::no_allocate"))
    read_meta = callable_of(memory.load("global", "u32", 2, hint="L1::no_allocate"))
    read_pick = callable_of(memory.load("global", "u8", hint="nc"))

    @jit
    def first_block():
        return i32(warp_number() * u32(BATCH))

    def load_block(i):
        @jit
        def part(a, e, w_gmem, slab, block, k_blocks):
            stripe, slice_ = u32(u32(slab) // u32(4)), u32(u32(slab) % u32(4))
            if i32(block + i) < k_blocks:
                first = w_gmem + (u64(stripe) * u64(u32(k_blocks)) + u64(u32(block))) * u64(BLOCK_BYTES)
                base = first + u64(i * BLOCK_BYTES)
                values = base + u64(u32(slice_ * u32(1024) + lane_number() * u32(4)))
                for step in range(2):
                    for register in range(4):
                        core = (2 * step + register // 2) * 128 + register % 2 * 512
                        a[8 * i + 4 * step + register] = read(values + u64(core))
                word = u32((slice_ * u32(16) + lane_number() // u32(4) * u32(2) + lane_number() % u32(2)) * u32(8))
                e[2 * i], e[2 * i + 1] = read_meta(base + u64(VALUE_BYTES) + u64(word))
            else:
                for register in range(8):
                    a[8 * i + register] = u32(0)
                e[2 * i], e[2 * i + 1] = NO_META, NO_META

        return part

    def load_pick(i):
        @jit
        def part(odd, picks, block, run_blocks, runs):
            run = u64(u32(min(i32(divide(i32(block + i), run_blocks)), i32(runs - 1))))
            odd[2 * i], odd[2 * i + 1] = read_pick(picks[0] + run), read_pick(picks[1] + run)

        return part

    return {
        "first_block": first_block,
        "load_weights": sequence([load_block(i) for i in range(BATCH)]),
        "load_picks": sequence([load_pick(i) for i in range(BATCH)]) if cfg.pairs else nothing,
        "weight_registers": registers(8 * BATCH, "u32"),
        "meta_registers": registers(2 * BATCH, "u32"),
        "pick_registers": registers(2 * BATCH, "u32"),
    }


def _pick_words(cfg: Any) -> Words:
    of_slab = picks_word(gated=False)

    @jit
    def slab():
        return i32(cta_number())

    @jit
    def picks(picks_gmem, slab, rows, runs):
        return of_slab(picks_gmem, 0, slab, (rows + 1) // 2, runs)

    return {"slab": slab, "picks": picks if cfg.pairs else nothing}


def _token_words(cfg: Any) -> Words:
    BATCH, GROUPS = cfg.batch, cfg.tile_t // 8

    def load_columns(i, group):
        load = load_row(i, (i * GROUPS + group) * 8)

        @jit
        def part(b, x_gmem, block, tokens, columns, x_pitch):
            token = i32(u32(group * 8) + lane_number() // u32(4))
            row = x_gmem + u64(u32(token)) * u64(u32(x_pitch)) * u64(2)
            load(b, row, token < tokens, i32(block), columns)

        return part

    return {
        "load_tokens": sequence([load_columns(i, group) for i in range(BATCH) for group in range(GROUPS)]),
        "token_registers": registers(8 * BATCH * GROUPS, "u32"),
    }


def load_row(i: int, first: int) -> Callable[..., None]:
    """This lane's eight pairs of columns of block ``block + i`` of a token whose row begins at ``row``, if it is
    ``present``, from register ``first`` on; zeros from ``columns`` on.
    """
    FIRST = first
    read = callable_of(memory.load("global", "u32"))

    @jit
    def load(b, row, present, block, columns):
        column = i32(i32(block + i) * BLOCK + i32(lane_number() % u32(4) * u32(2)))
        left = i32(columns - column) if present else i32(0)
        at = row + u64(u32(column)) * u64(2)
        if left > 56:  # all eight, as everywhere but at the end of a row
            for register in range(8):
                b[FIRST + register] = read(at + u64(16 * register))
        else:
            for register in range(8):
                value = u32(0)
                if 8 * register < left:
                    value = read(at + u64(16 * register))
                b[FIRST + register] = value

    return load


def sum_words(cfg: Any) -> Words:
    """Products of a warp and their sums: of Samoyeds those of a block, of the even and of the odd rows."""
    BATCH, GROUPS, PAIRS, SETS, TILE_T = cfg.batch, cfg.tile_t // 8, cfg.pairs, cfg.sets, cfg.tile_t
    SUMS = 4 * GROUPS  # of a set
    FIRST = SUMS if PAIRS else 0  # of those that are outputs
    add = arithmetic.add_to_one_of_two(2)
    block_barrier, put = callable_of(barrier.block_barrier), callable_of(memory.store("shared", "f32"))
    base = _sums_word()

    @jit
    def zero(acc):
        for i in range(FIRST + SETS * SUMS):
            acc[i] = f32(0)

    def step_of(i, group):
        A, B, R = 8 * i, (i * GROUPS + group) * 8, 4 * group
        multiply = callable_of(mma.mma_sp(cfg.dtype), first=R)
        lower, upper = (
            callable_of(add, places=[SUMS + c, SUMS + c + 1, 2 * SUMS + c, 2 * SUMS + c + 1]) for c in (R, R + 2)
        )

        @jit
        def part(acc, a, e, b, odd):
            if PAIRS:
                for j in range(4):
                    acc[R + j] = f32(0)
            multiply(acc, a[A], a[A + 1], a[A + 2], a[A + 3], b[B], b[B + 1], b[B + 2], b[B + 3], e[2 * i])
            multiply(acc, a[A + 4], a[A + 5], a[A + 6], a[A + 7], b[B + 4], b[B + 5], b[B + 6], b[B + 7], e[2 * i + 1])
            if PAIRS:
                lower(acc, acc[R], acc[R + 1], odd[2 * i])
                upper(acc, acc[R + 2], acc[R + 3], odd[2 * i + 1])

        return part

    @jit
    def share(acc):
        """D[row, token] of each set of this warp to ``[warp][set][token][row]``."""
        row, token = lane_number() // u32(4), lane_number() % u32(4) * u32(2)
        mine = u32(base() + warp_number() * u32(SETS * TILE_T * 64) + (token * u32(16) + row) * u32(4))
        for half in range(SETS):
            for i in range(SUMS):
                row, token = i % 4 // 2 * 8, i // 4 * 8 + i % 2
                put(u32(mine + u32(((half * TILE_T + token) * 16 + row) * 4)), acc[FIRST + half * SUMS + i])

    @jit
    def barrier_():
        block_barrier()

    return {
        "accumulator": registers(FIRST + SETS * SUMS),
        "zero": zero,
        "mma_sp": sequence([step_of(i, group) for i in range(BATCH) for group in range(GROUPS)]),
        "share": share,
        "barrier": barrier_,
    }


def _sums_word() -> Callable[..., Any]:
    to_shared = callable_of(memory.cvta_shared)

    @jit
    def sums():
        return to_shared(address_of(cuda.shared.array(0, f32)))

    return sums


def total_word(cfg: Any) -> Callable[..., Any]:
    """The sum of all warps, in their order."""
    WARPS, SETS, TILE_T = cfg.warps, cfg.sets, cfg.tile_t
    get, base = callable_of(memory.load("shared", "f32")), _sums_word()

    @jit
    def total(half, token, row):
        found, first = f32(0), u32(base() + ((half * u32(TILE_T) + token) * u32(16) + row) * u32(4))
        for i in range(WARPS):
            found += get(u32(first + u32(i * SETS * TILE_T * 64)))
        return found

    return total


def _store_words(cfg: Any) -> Words:
    THREADS, SETS, OUTPUTS, TILE_T, BIAS = cfg.threads, cfg.sets, cfg.outputs, cfg.tile_t, cfg.bias
    total = total_word(cfg)
    pack, unpack = callable_of(memory.pack(cfg.dtype)), callable_of(memory.unpack(cfg.dtype))
    get_bias, write = callable_of(memory.load("global", "u16")), callable_of(memory.store("global", "u16"))

    @jit
    def store(y_gmem, bias_gmem, slab, rows, tokens, y_pitch):
        for i in range(-(-OUTPUTS * TILE_T // THREADS)):
            index = u32(thread_number() + u32(i * THREADS))
            token, output = u32(index // u32(OUTPUTS)), u32(index % u32(OUTPUTS))
            row = u32(u32(slab) * u32(OUTPUTS) + output)
            if token < TILE_T and i32(token) < tokens and i32(row) < rows:
                value = total(u32(output % u32(SETS)), token, u32(output // u32(SETS)))
                if BIAS:
                    value += unpack(u32(get_bias(bias_gmem + u64(row) * u64(2))))
                at = u64(token) * u64(u32(y_pitch)) + u64(row)
                write(y_gmem + at * u64(2), u16(pack(value, f32(0)) & u32(0xFFFF)))

    return {"store": store}
