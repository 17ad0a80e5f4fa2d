"""The words of :mod:`nmsparse.cuda.kernels.grouped` on Numba CUDA."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from numba import cuda
from numba.cuda import libdevice, types

from ... import schedule
from ...layout import BLOCK, BLOCK_BYTES
from ...ptx import barrier, copy, memory, wgmma
from ...ptx.numba_glue import callable_of, registers
from . import consumer_words, descriptor, ring_words, sparse_product
from .grouped_store import store_words
from .numbers import cta_count, cta_number, lane_number, read_thread, thread_number, warp_number
from .overlap import overlap_words
from .samoyeds import run_words
from .store import sequence

u32, u64, i32 = types.uint32, types.uint64, types.int32

jit = cuda.jit(device=True, forceinline=True)

NOWHERE = 0xFFFFFFFF  # a token that does not exist


def make(cfg: Any) -> ModuleType:
    """The words for ``cfg``, a :class:`~nmsparse.cuda.config_grouped.GroupedConfig`."""
    tile = ModuleType("tile")
    tile.PRODUCER, tile.inline = -1, jit
    for part in (
        overlap_words,
        plan_words,
        _worker_words,
        _ring_words,
        _weight_words,
        _token_words,
        _multiply_words,
        _run_words,
        store_words,
    ):
        for word, function in part(cfg).items():
            setattr(tile, word, function)
    return tile


def plan_words(cfg: Any) -> dict[str, Callable[..., Any]]:
    """Tiles of tokens as the plan says, experts side by side."""
    TILE_T, GROUP, PART = cfg.tile_t, cfg.group, cfg.part
    read, ballot = callable_of(memory.load("global", "s32")), callable_of(memory.vote_ballot)
    place_of = schedule.place

    @jit
    def entry(plan_gmem, index):
        return read(plan_gmem + u64(index * 4))

    @jit
    def end_of(plan_gmem, expert):
        """Of the positions of an expert; of a part, -1 is the one before it."""
        return entry(plan_gmem, 2 * expert + 2 if PART else expert)

    @jit
    def tiles_to(plan_gmem, experts, expert):
        """Tiles of all experts up to this one."""
        if PART:
            return i32(entry(plan_gmem, 2 * expert + 3) - entry(plan_gmem, 1))
        return entry(plan_gmem, experts + expert)

    @jit
    def tiles(plan_gmem, experts, row_tiles):
        return i32(tiles_to(plan_gmem, experts, experts - 1) * row_tiles)

    @jit
    def find(number, row_tiles, plan_gmem, experts):
        """The expert of a tile: how many have all their tiles before it. Each lane looks at some."""
        found = i32(0)
        for base in range(0, experts, 32):
            index = base + i32(lane_number())
            before = u32(0)
            if index < experts and tiles_to(plan_gmem, experts, index) * row_tiles <= number:
                before = u32(1)
            found += libdevice.popc(i32(ballot(before)))
        return i32(found)

    @jit
    def place(number, row_tiles, plan_gmem, experts):
        expert = find(number, row_tiles, plan_gmem, experts)
        first, tiles_before = i32(0), i32(0)
        if PART or expert > 0:
            first, tiles_before = end_of(plan_gmem, expert - 1), tiles_to(plan_gmem, experts, expert - 1)
        token_tiles = tiles_to(plan_gmem, experts, expert) - tiles_before
        row, token = place_of(number - tiles_before * row_tiles, row_tiles, token_tiles, GROUP)
        return expert, i32(row), i32(first + token * TILE_T), end_of(plan_gmem, expert)

    return {"tiles": tiles, "place": place}


def _worker_words(cfg: Any) -> dict[str, Callable[..., Any]]:
    BLOCKS, STEP, GATHER = cfg.warpgroups, cfg.tile_k // BLOCK, cfg.gather

    share_of, nth_of = schedule.share, schedule.nth

    @jit
    def share(tiles):
        return i32(share_of(i32(cta_number()), i32(cta_count()), tiles))

    @jit
    def nth(index):
        return i32(nth_of(i32(index), i32(cta_number()), i32(cta_count())))

    @jit
    def grid(row_blocks, k_blocks):
        return i32((row_blocks + BLOCKS - 1) // BLOCKS), i32(k_blocks // STEP)

    @jit
    def role():
        return i32(thread_number() // u32(128)) - 1

    @jit
    def elect():
        return GATHER or thread_number() < 32

    return {"grid": grid, "share": share, "nth": nth, "role": role, "elect": elect}


def _ring_words(cfg: Any) -> dict[str, Callable[..., Any]]:
    words = ring_words(cfg)
    wait, fence = words["wait_full"], callable_of(memory.fence_proxy_async)

    @jit
    def wait_full(ring, turn):
        wait(ring, turn)
        fence()  # what threads have copied becomes visible to wgmma

    used = ("ring", "wait_full", "wait_empty", "release", "give_registers", "take_registers")
    return {**{word: words[word] for word in used}, **({"wait_full": wait_full} if cfg.gather else {})}


def _weight_words(cfg: Any) -> dict[str, Callable[..., Any]]:
    STAGES, SLOT, BLOCKS, STEP = cfg.stages, cfg.slot_bytes, cfg.warpgroups, cfg.tile_k // BLOCK
    TOKENS, WEIGHTS, BARRIERS = cfg.token_bytes, cfg.weight_bytes, cfg.barrier_offset
    TOKEN_BYTES = 0 if cfg.gather else TOKENS  # those that the copy engine counts
    GROUPS = cfg.tile_rows // (16 if cfg.gated else 8)
    expect_bytes, bulk = callable_of(barrier.expect_bytes), callable_of(copy.bulk_load(cfg.weights_hint))
    load_5d = callable_of(copy.tensor_load(axes=5))

    @jit
    def load_packed(ring, turn, w_gmem, expert, row, step, row_blocks, k_blocks):
        if thread_number() == 0:
            slot = u32(turn) % u32(STAGES)
            full, to = ring + u32(BARRIERS) + u32(8) * slot, ring + slot * u32(SLOT) + u32(TOKENS)
            present = min(row_blocks - row * BLOCKS, BLOCKS)
            expect_bytes(full, TOKEN_BYTES + present * WEIGHTS)
            block = (u64(expert) * u64(row_blocks) + u64(row * BLOCKS)) * u64(k_blocks) + u64(step * STEP)
            at = w_gmem + block * u64(BLOCK_BYTES)
            bulk(to, at, WEIGHTS, full)
            if present == 2:  # a loop would be unrolled, for which the producer has no registers
                bulk(to + u32(WEIGHTS), at + u64(k_blocks) * u64(BLOCK_BYTES), WEIGHTS, full)

    @jit
    def load_dense(ring, turn, w_gmem, expert, row, step, row_blocks, k_blocks):
        if thread_number() == 0:
            slot = u32(turn) % u32(STAGES)
            full, to = ring + u32(BARRIERS) + u32(8) * slot, ring + slot * u32(SLOT) + u32(TOKENS)
            expect_bytes(full, TOKEN_BYTES + BLOCKS * WEIGHTS)
            for j in range(STEP):
                at = to + u32(j * BLOCKS * BLOCK * 128)
                load_5d(at, w_gmem, (step * STEP + j) * BLOCK, 0, 0, row * GROUPS, expert, full)

    return {"load_weights": load_dense if cfg.dense else load_packed}


def _token_words(cfg: Any) -> dict[str, Callable[..., Any]]:
    STAGES, SLOT, STEP, TILE_T = cfg.stages, cfg.slot_bytes, cfg.tile_k // BLOCK, cfg.tile_t
    BARRIERS, MINE = cfg.barrier_offset, -(-cfg.tile_t // 16)  # tokens that a thread copies a sixteenth of
    read, copy_row = callable_of(memory.load("global", "u32")), callable_of(copy.copy_row)
    arrive, load = callable_of(copy.arrive_when_done), callable_of(copy.tensor_load())

    def find_token(i):
        @jit
        def part(found, rows_gmem, first, end, x_pitch):
            token = i32(first + i32(thread_number() // u32(8)) + 16 * i)
            found[i] = u32(NOWHERE)
            if token < end:
                found[i] = read(rows_gmem + u64(token) * u64(4)) * u32(x_pitch // 8)

        return part

    find_all = sequence([find_token(i) for i in range(MINE)])

    @jit
    def gathered(tokens, rows_gmem, first, end, x_pitch):
        """Where this thread's tokens begin, in units of 16 bytes."""
        find_all(tokens, rows_gmem, first, end, x_pitch)

    def copy_token(i, j):
        @jit
        def part(found, to, source, size):
            if TILE_T >= 16 or thread_number() < 64:
                copy_row(u32(to + u32((j * TILE_T + 16 * i) * 128)), source, found[i], size)

        return part

    def copy_columns(j):
        """64 columns of all tokens, of which this thread has eight."""
        copies = sequence([copy_token(i, j) for i in range(MINE)])

        @jit
        def part(found, to, x_gmem, column, columns):
            at = u32(column + u32(j * BLOCK))
            inside = at < u32(columns)
            source = x_gmem + (u64(at) * u64(2) if inside else u64(0))
            copies(found, to, source, u32(16) if inside else u32(0))

        return part

    copy_all = sequence([copy_columns(j) for j in range(STEP)])

    @jit
    def gather(ring, turn, x_gmem, tokens, step, columns):
        # Read anew in each step: the producer has no registers for what hangs on it.
        slot, number = u32(turn) % u32(STAGES), read_thread()
        line, chunk = number // u32(8), number % u32(8)
        to = u32(ring + slot * u32(SLOT) + line * u32(128) + (chunk ^ line % u32(8)) * u32(16))
        copy_all(tokens, to, x_gmem, u32(step * (STEP * BLOCK) + chunk * u32(8)), columns)
        arrive(ring + u32(BARRIERS) + u32(8) * slot)

    @jit
    def in_order(tokens, rows_gmem, first, end, x_pitch):
        tokens[0] = u32(first)

    @jit
    def load_tokens(ring, turn, x_gmem, tokens, step, columns):
        if thread_number() == 0:
            slot = u32(turn) % u32(STAGES)
            full, to = ring + u32(BARRIERS) + u32(8) * slot, ring + slot * u32(SLOT)
            for j in range(STEP):
                load(to + u32(j * TILE_T * 128), x_gmem, (step * STEP + j) * BLOCK, i32(tokens[0]), full)

    find, load_ = (gathered, gather) if cfg.gather else (in_order, load_tokens)
    return {"token_registers": registers(MINE if cfg.gather else 1, "u32"), "find_tokens": find, "load_tokens": load_}


def _multiply_words(cfg: Any) -> dict[str, Callable[..., Any]]:
    words, product = consumer_words(cfg), _dense_product if cfg.dense else sparse_product
    return {
        "accumulator": words["accumulator"],
        "multiply": product(cfg, cfg.tile_t),
        "multiply_few": product(cfg, cfg.few),
        "wait_wgmma": words["wait_wgmma"],
        "wait_wgmma_but_one": words["wait_wgmma_but_one"],
    }


def _dense_product(cfg: Any, tokens: int) -> Callable[..., Any]:
    """``wgmma`` of a slot with its first ``tokens`` tokens, into the first sums."""
    STAGES, SLOT, TOKENS, STEP, TILE_T = cfg.stages, cfg.slot_bytes, cfg.token_bytes, cfg.tile_k // BLOCK, cfg.tile_t
    ROWS = cfg.tile_rows
    DESCRIPTOR = u64(descriptor(leading=16, stride=1024, swizzle=1))
    product = callable_of(wgmma.wgmma(tokens, cfg.dtype))
    fence, commit = callable_of(wgmma.fence), callable_of(wgmma.commit)

    def columns_of(j):
        """64 columns: four k16 instructions, 32 bytes apart."""

        @jit
        def part(acc, a, b, keep):
            for i in range(4):
                first = u64(j * ROWS * 8 + i * 2), u64(j * TILE_T * 8 + i * 2)
                product(acc, a + first[0], b + first[1], u32(keep) if j == 0 and i == 0 else u32(1))

        return part

    multiply_all = sequence([columns_of(j) for j in range(STEP)])

    @jit
    def multiply(acc, ring, turn, before):
        slot = ring + (u32(turn) % u32(STAGES)) * u32(SLOT)
        weights = slot + u32(TOKENS) + (thread_number() // u32(128) - u32(1)) * u32(BLOCK * 128)
        a, b = u64(weights >> u32(4)) | DESCRIPTOR, u64(slot >> u32(4)) | DESCRIPTOR
        fence()
        multiply_all(acc, a, b, before > 0)
        commit()

    return multiply


def _run_words(cfg: Any) -> dict[str, Callable[..., Any]]:
    if cfg.pairs:
        words = run_words(cfg)
        return {word: words[word] for word in ("zero", "pick", "end_run", "end_runs")} | {"picks": _tile_picks(cfg)}

    @jit
    def nothing(*args):
        return 0

    return dict.fromkeys(("zero", "picks", "pick", "end_run", "end_runs"), nothing)


def picks_word(gated: bool) -> Callable[..., Any]:
    """Where the choices of a thread's two sub-rows in a slab of 16 packed rows begin."""
    GATED = gated

    @jit
    def picks(picks_gmem, expert, slab, rows, runs):
        """The sub-rows of packed rows g and g + 8, which are a gate row and its up row if there is a gate."""
        mine = i32(lane_number() // u32(4))
        if GATED:
            low = min(slab * 8 + mine, rows // 2 - 1)
            high = low + rows // 2
        else:
            low = min(slab * 16 + mine, rows - 1)
            high = min(low + 8, rows - 1)
        first = picks_gmem + u64(expert) * u64(rows) * u64(runs)
        return first + u64(low) * u64(runs), first + u64(high) * u64(runs)

    return picks


def _tile_picks(cfg: Any) -> Callable[..., Any]:
    SLABS, of_slab = cfg.tile_rows // 16, picks_word(cfg.gated)

    @jit
    def picks(picks_gmem, expert, row, rows, runs):
        return of_slab(picks_gmem, expert, i32(row * SLABS + i32(warp_number()) - 4), rows, runs)

    return picks
