"""The words of :mod:`nmsparse.cuda.kernels.gemv` on Numba CUDA."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from numba import cuda
from numba.cuda import types

from ... import schedule
from ...layout import BLOCK, BLOCK_BYTES, EMPTY, VALUE_BYTES
from ...ptx import arithmetic, barrier, copy, matrix, memory, mma
from ...ptx.numba_glue import address_of, callable_of, registers
from . import jit, nothing  # and that module's divide for the schedule
from .grouped import picks_word
from .numbers import cta_number, lane_number, thread_number, warp_number
from .store import sequence

u8, u16, u32, u64, i32, f32 = types.uint8, types.uint16, types.uint32, types.uint64, types.int32, types.float32

Words = dict[str, Callable[..., Any]]


def make(cfg: Any) -> ModuleType:
    """The words for ``cfg``, a :class:`~nmsparse.cuda.config.GemvConfig`."""
    tile = ModuleType("tile")
    tile.BLOCKS_A_ROUND = cfg.warps * cfg.batch
    for words in (weight_words(cfg), _place_words(cfg), _token_words(cfg), sum_words(cfg), _store_words(cfg)):
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


def _place_words(cfg: Any) -> Words:
    of_slab, divide, TILE_T = picks_word(gated=False), schedule.divide, cfg.tile_t

    @jit
    def place(tokens):
        number, token_tiles = i32(cta_number()), i32((tokens + TILE_T - 1) // TILE_T)
        if token_tiles == 1:
            return number, i32(0)
        slab = i32(divide(number, token_tiles))
        return slab, i32(i32(number - slab * token_tiles) * TILE_T)

    @jit
    def picks(picks_gmem, slab, rows, runs):
        return of_slab(picks_gmem, 0, slab, (rows + 1) // 2, runs)

    return {"place": place, "picks": picks if cfg.pairs else nothing}


def _token_words(cfg: Any) -> Words:
    places = [(i, group) for i in range(cfg.batch) for group in range(cfg.tile_t // 8)]

    def load_tokens_of(i, group, number):
        copy_part, of_lane = token_copy(cfg, i, group), token_of_lane(cfg, number)

        @jit
        def part(x_gmem, first, block, tokens, columns, x_pitch):
            token = i32(first + i32(u32(group * 8) + of_lane()))
            row = x_gmem + u64(u32(token)) * u64(u32(x_pitch)) * u64(2)
            copy_part(row, of_lane(), token < tokens, block, columns)

        return part

    return {
        "load_tokens": sequence(
            [load_tokens_of(i, group, number) for i, group in places for number in range(cfg.copies)]
        ),
        "wait_tokens": wait_word(),
    }


def token_of_lane(cfg: Any, number: int) -> Callable[..., Any]:
    """Which of eight tokens this lane copies a part of, in copy ``number`` of ``cfg.copies``."""
    TOKENS = 8 // cfg.copies  # at a time

    @jit
    def token():
        return u32(u32(number * TOKENS) + lane_number() // u32(32 // TOKENS))

    return token


def token_copy(cfg: Any, i: int, group: int) -> Callable[..., None]:
    """This lane's share of block ``block + i`` of ``token`` among the eight of ``group``, whose row is at ``row`` if it
    is ``present``: zeros from ``columns`` on. Chunks of 16 bytes are swizzled, for ``ldmatrix``.
    """
    WIDTH, LANES, PLACE = cfg.width, 4 * cfg.copies, (i * (cfg.tile_t // 8) + group) * 1024
    copy_bytes, area = callable_of(copy.cp_async(cfg.width)), _area_word(cfg)

    @jit
    def part(row, token, present, block, columns):
        word = u32(lane_number() % u32(LANES))
        chunk = u32(u32(word * u32(WIDTH)) // u32(16))
        to = u32(area() + u32(PLACE) + token * u32(128) + (chunk ^ token) * u32(16) + word * u32(WIDTH) % u32(16))
        column = i32(i32(block + i) * BLOCK + i32(word * u32(WIDTH // 2)))
        if present:  # what stands for a token beyond the last does not matter: its sums are not stored
            size = i32(min(max(i32(columns - column), i32(0)), i32(WIDTH // 2)))
            copy_bytes(to, row + u64(u32(column)) * u64(2), u32(2 * size))

    return part


def wait_word() -> Callable[..., None]:
    """``wait_tokens``."""
    commit, wait = callable_of(copy.commit), callable_of(copy.wait(0))
    warp_barrier = callable_of(barrier.warp_barrier)

    @jit
    def wait_tokens():
        commit()
        wait()
        warp_barrier()

    return wait_tokens


def sum_words(cfg: Any) -> Words:
    """Products of a warp and their sums: of Samoyeds those of a block, of the even and of the odd rows."""
    BATCH, GROUPS, PAIRS, SETS, TILE_T = cfg.batch, cfg.tile_t // 8, cfg.pairs, cfg.sets, cfg.tile_t
    read_tokens, warp_barrier = callable_of(matrix.ldmatrix(4)), callable_of(barrier.warp_barrier)
    SUMS = 4 * GROUPS  # of a set
    FIRST = SUMS if PAIRS else 0  # of those that are outputs
    add = arithmetic.add_to_one_of_two(2)
    block_barrier, put = callable_of(barrier.block_barrier), callable_of(memory.store("shared", "f32"))
    area = _area_word(cfg)

    @jit
    def zero(acc):
        for i in range(FIRST + SETS * SUMS):
            acc[i] = f32(0)

    def step_of(i, group):
        A, PLACE, R = 8 * i, (i * GROUPS + group) * 1024, 4 * group
        multiply = callable_of(mma.mma_sp(cfg.dtype), first=R)
        lower, upper = (
            callable_of(add, places=[SUMS + c, SUMS + c + 1, 2 * SUMS + c, 2 * SUMS + c + 1]) for c in (R, R + 2)
        )

        @jit
        def part(acc, a, e, odd, at):
            if PAIRS:
                for j in range(4):
                    acc[R + j] = f32(0)
            b = read_tokens(u32(at + u32(PLACE)))
            multiply(acc, a[A], a[A + 1], a[A + 2], a[A + 3], b[0], b[1], b[2], b[3], e[2 * i])
            b = read_tokens(u32(u32(at ^ u32(64)) + u32(PLACE)))
            multiply(acc, a[A + 4], a[A + 5], a[A + 6], a[A + 7], b[0], b[1], b[2], b[3], e[2 * i + 1])
            if PAIRS:
                lower(acc, acc[R], acc[R + 1], odd[2 * i])
                upper(acc, acc[R + 2], acc[R + 3], odd[2 * i + 1])

        return part

    multiply_all = sequence([step_of(i, group) for i in range(BATCH) for group in range(GROUPS)])

    @jit
    def mma_sp(acc, a, e, odd):
        # Lane 8j + r says where row r of matrix j is: token r, columns 8j and on.
        token, chunk = u32(lane_number() % u32(8)), u32(lane_number() // u32(8))
        multiply_all(acc, a, e, odd, u32(area() + token * u32(128) + (chunk ^ token) * u32(16)))
        warp_barrier()  # the tokens' place is free

    @jit
    def share(acc):
        """D[row, token] of each set of this warp to ``[set][token][row]``, in the place of its tokens."""
        row, token = lane_number() // u32(4), lane_number() % u32(4) * u32(2)
        mine = u32(area() + (token * u32(16) + row) * u32(4))
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
        "mma_sp": mma_sp,
        "share": share,
        "barrier": barrier_,
    }


def _area_word(cfg: Any) -> Callable[..., Any]:
    """Where this warp's part of shared memory begins: for its tokens, then for its sums."""
    AREA, to_shared = cfg.area, callable_of(memory.cvta_shared)

    @jit
    def area():
        return u32(to_shared(address_of(cuda.shared.array(0, u8, alignment=128))) + warp_number() * u32(AREA))

    return area


def total_word(cfg: Any) -> Callable[..., Any]:
    """The sum of all warps, in their order."""
    WARPS, AREA, TILE_T = cfg.warps, cfg.area, cfg.tile_t
    get, to_shared = callable_of(memory.load("shared", "f32")), callable_of(memory.cvta_shared)

    @jit
    def total(half, token, row):
        base = to_shared(address_of(cuda.shared.array(0, u8, alignment=128)))
        found, first = f32(0), u32(base + ((half * u32(TILE_T) + token) * u32(16) + row) * u32(4))
        for i in range(WARPS):
            found += get(u32(first + u32(i * AREA)))
        return found

    return total


def _store_words(cfg: Any) -> Words:
    THREADS, SETS, OUTPUTS, TILE_T, BIAS = cfg.threads, cfg.sets, cfg.outputs, cfg.tile_t, cfg.bias
    total = total_word(cfg)
    pack, unpack = callable_of(memory.pack(cfg.dtype)), callable_of(memory.unpack(cfg.dtype))
    get_bias, write = callable_of(memory.load("global", "u16")), callable_of(memory.store("global", "u16"))

    @jit
    def store(y_gmem, bias_gmem, slab, first, rows, tokens, y_pitch):
        for i in range(-(-OUTPUTS * TILE_T // THREADS)):
            index = u32(thread_number() + u32(i * THREADS))
            token, output = u32(index // u32(OUTPUTS)), u32(index % u32(OUTPUTS))
            row = u32(u32(slab) * u32(OUTPUTS) + output)
            position = u32(u32(first) + token)
            if token < TILE_T and i32(position) < tokens and i32(row) < rows:
                value = total(u32(output % u32(SETS)), token, u32(output // u32(SETS)))
                if BIAS:
                    value += unpack(u32(get_bias(bias_gmem + u64(row) * u64(2))))
                at = u64(position) * u64(u32(y_pitch)) + u64(row)
                write(y_gmem + at * u64(2), u16(pack(value, f32(0)) & u32(0xFFFF)))

    return {"store": store}
