"""The vocabulary on Numba CUDA: each word a device function that the compiler inlines."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from numba import cuda
from numba.cuda import types

from ... import schedule
from ...layout import BLOCK, BLOCK_BYTES, VALUE_BYTES
from ...ptx import barrier, copy, memory, wgmma
from ...ptx.numba_glue import address_of, callable_of, registers, teach
from .cluster import cluster_words
from .epilogue import store_words
from .numbers import cta_count, cta_number, lane_number, thread_number, warp_number
from .store import partial_words, sequence

u32, u64, i32, f32 = types.uint32, types.uint64, types.int32, types.float32

jit = cuda.jit(device=True, forceinline=True)

divide = callable_of(memory.divide)
teach(schedule.divide, lambda a, b: i32(divide(a, b)))
for function in (
    schedule.whole_tiles,
    schedule.cluster_of,
    schedule.pieces,
    schedule.piece,
    schedule.part_of,
    schedule.owner_of,
    schedule.first_warp,
    schedule.banded,
    schedule.place,
    schedule.run_of,
    schedule.nth,
    schedule.share,
):
    teach(function)


@jit
def nothing(*args):
    """What a kernel says in place of a word that its weights do not need."""
    return 0


def descriptor(leading: int, stride: int, swizzle: int = 0) -> int:
    """Upper part of a wgmma matrix descriptor: byte offsets between core matrices, swizzle mode (1 = 128 bytes).

    Source: PTX ISA, "Matrix descriptor format".
    """
    return (leading >> 4) << 16 | (stride >> 4) << 32 | swizzle << 62


def make(cfg: Any) -> ModuleType:
    """The words for ``cfg``, as a module that a kernel text receives."""
    tile = ModuleType("tile")
    tile.PRODUCER = -1
    for part in (place_words, ring_words, producer_words, consumer_words, partial_words, cluster_words, store_words):
        for word, function in part(cfg).items():
            setattr(tile, word, function)
    return tile


def place_words(cfg: Any) -> dict[str, Callable[..., Any]]:
    TILE_M, TILE_T, STEP, SHARES, GROUP = cfg.tile_m, cfg.tile_t, cfg.tile_k // BLOCK, bool(cfg.clusters), cfg.group
    cluster_of, pieces_of, piece_of = schedule.cluster_of, schedule.pieces, schedule.piece
    part_of, place_of = schedule.part_of, schedule.place

    @jit
    def grid(rows, tokens, k_blocks):
        return (rows + TILE_M - 1) // TILE_M, (tokens + TILE_T - 1) // TILE_T, k_blocks // STEP

    @jit
    def cluster(split, parts):
        return i32(cluster_of(SHARES, split, parts))

    @jit
    def pieces(tiles, split, parts):
        if cluster(split, parts) > 1:
            return i32(1)
        return i32(pieces_of(i32(cta_number()), i32(cta_count()), tiles, split, parts))

    @jit
    def piece(index, tiles, split, parts, steps):
        if cluster(split, parts) > 1:
            number, first, last = part_of(i32(cta_number()), parts, steps)
            return i32(number), i32(first), i32(last)
        number, first, last = piece_of(index, i32(cta_number()), i32(cta_count()), tiles, split, parts, steps)
        return i32(number), i32(first), i32(last)

    @jit
    def place(number, row_tiles, token_tiles):
        return place_of(number, row_tiles, token_tiles, GROUP)

    @jit
    def role():
        return i32(thread_number() // u32(128)) - 1

    @jit
    def elect():
        return thread_number() == 0

    return {
        "grid": grid,
        "cluster": cluster,
        "pieces": pieces,
        "piece": piece,
        "place": place,
        "role": role,
        "elect": elect,
    }


def ring_words(cfg: Any) -> dict[str, Callable[..., Any]]:
    STAGES, CONSUMERS = cfg.stages, 128 * cfg.warpgroups
    BARRIERS, SUMS_BARRIER, FILLERS = cfg.barrier_offset, cfg.sums_barrier, cfg.fillers
    to_shared, init = callable_of(memory.cvta_shared), callable_of(barrier.init)
    fence_init, fence_async = callable_of(memory.fence_mbarrier_init), callable_of(memory.fence_proxy_async)
    block_barrier = callable_of(barrier.block_barrier)
    wait, arrive = callable_of(barrier.wait), callable_of(barrier.arrive)
    give = callable_of(memory.set_max_registers(cfg.producer_registers, grow=False))
    take = callable_of(memory.set_max_registers(cfg.consumer_registers, grow=True))

    @jit
    def ring():
        base = (to_shared(address_of(cuda.shared.array(0, types.uint8))) + 1023) & ~1023
        if thread_number() == 0:
            for slot in range(STAGES):
                init(base + BARRIERS + 8 * slot, FILLERS)
                init(base + BARRIERS + 8 * (STAGES + slot), CONSUMERS)
            init(base + SUMS_BARRIER, 1)
            fence_init()
            fence_async()
        block_barrier()
        return u32(base)

    @jit
    def wait_full(ring, turn):
        wait(ring + BARRIERS + 8 * (u32(turn) % u32(STAGES)), u32(turn) // u32(STAGES) & u32(1))

    @jit
    def wait_empty(ring, turn):
        wait(ring + BARRIERS + 8 * (STAGES + u32(turn) % u32(STAGES)), ~(u32(turn) // u32(STAGES)) & u32(1))

    @jit
    def release(ring, turn):
        # Every thread arrives, for it has read its own metadata: what race checkers follow (benchmarks/LOG.md).
        arrive(ring + BARRIERS + 8 * (STAGES + u32(turn) % u32(STAGES)))

    @jit
    def give_registers():
        give()

    @jit
    def take_registers():
        take()

    return {
        "ring": ring,
        "wait_full": wait_full,
        "wait_empty": wait_empty,
        "release": release,
        "give_registers": give_registers,
        "take_registers": take_registers,
    }


def producer_words(cfg: Any) -> dict[str, Callable[..., Any]]:
    STAGES, SLOT, BLOCKS = cfg.stages, cfg.slot_bytes, cfg.warpgroups * cfg.blocks
    STEP, TILE_T, TOKENS, WEIGHTS = cfg.tile_k // BLOCK, cfg.tile_t, cfg.token_bytes, cfg.weight_bytes
    BARRIERS, HEIGHT = cfg.barrier_offset, cfg.height
    prefetch_map, load = callable_of(copy.tensor_prefetch), callable_of(copy.tensor_load())
    expect_bytes, bulk = callable_of(barrier.expect_bytes), callable_of(copy.bulk_load(cfg.weights_hint))

    @jit
    def present(row, rows):
        """Blocks of row tile ``row`` that exist."""
        return min(max(i32(i32((rows + HEIGHT - 1) // HEIGHT) - i32(row * BLOCKS)), i32(0)), i32(BLOCKS))

    @jit
    def prefetch(x_gmem):
        if thread_number() == 0:
            prefetch_map(x_gmem)

    @jit
    def expect(ring, turn, row, rows):
        full = ring + BARRIERS + 8 * (u32(turn) % u32(STAGES))
        expect_bytes(full, u32(TOKENS) + u32(present(row, rows)) * u32(WEIGHTS))

    @jit
    def load_tokens(ring, turn, x_gmem, token, step):
        slot = u32(turn) % u32(STAGES)
        full, to = ring + BARRIERS + 8 * slot, ring + slot * u32(SLOT)
        for j in range(STEP):
            load(to + j * TILE_T * 128, x_gmem, (step * STEP + j) * BLOCK, token * TILE_T, full)

    def load_block(i):
        @jit
        def part(to, at, row_bytes, full, number):
            if i < number:
                bulk(u32(to + u32(i * WEIGHTS)), at + u64(i) * row_bytes, WEIGHTS, full)

        return part

    load_blocks = sequence([load_block(i) for i in range(BLOCKS)])

    @jit
    def load_weights(ring, turn, w_gmem, row, step, rows, k_blocks):
        slot = u32(turn) % u32(STAGES)
        full, to = ring + BARRIERS + 8 * slot, ring + slot * u32(SLOT) + TOKENS
        # What does not depend on the step is worked out once a tile: the thread that fills the ring has little time.
        row_bytes = u64(u32(k_blocks)) * u64(BLOCK_BYTES)
        at = w_gmem + u64(u32(row * BLOCKS)) * row_bytes + u64(u32(step)) * u64(STEP * BLOCK_BYTES)
        load_blocks(u32(to), at, row_bytes, u32(full), present(row, rows))

    return {"prefetch": prefetch, "expect": expect, "load_tokens": load_tokens, "load_weights": load_weights}


def consumer_words(cfg: Any) -> dict[str, Callable[..., Any]]:
    wait_0, wait_1 = callable_of(wgmma.wait(0)), callable_of(wgmma.wait(1))

    @jit
    def wait_wgmma():
        wait_0()

    @jit
    def wait_wgmma_but_one():
        wait_1()

    return {
        "accumulator": registers(cfg.sums),
        "wgmma_sp": sparse_product(cfg, cfg.tile_t),
        "wait_wgmma": wait_wgmma,
        "wait_wgmma_but_one": wait_wgmma_but_one,
    }


def sparse_product(cfg: Any, tokens: int) -> Callable[..., Any]:
    """``wgmma.sp`` of a slot with its first ``tokens`` tokens, into the first sums."""
    STAGES, SLOT, STEP = cfg.stages, cfg.slot_bytes, cfg.tile_k // BLOCK
    TILE_T, TOKENS, WEIGHTS, BLOCKS = cfg.tile_t, cfg.token_bytes, cfg.weight_bytes, cfg.blocks
    A_DESCRIPTOR = u64(descriptor(leading=128, stride=512))
    B_DESCRIPTOR = u64(descriptor(leading=16, stride=1024, swizzle=1))
    multiplies = [callable_of(wgmma.wgmma_sp(tokens, cfg.dtype), first=i * TILE_T // 2) for i in range(BLOCKS)]
    fence, commit = callable_of(wgmma.fence), callable_of(wgmma.commit)
    metadata = callable_of(memory.load("shared", "u32", 2))

    meta_registers, odd_registers = (registers(2 * STEP * BLOCKS, "u32") for _ in range(2))

    def load_meta(i, j):
        @jit
        def part(meta, at):
            n = 2 * (j * BLOCKS + i)
            meta[n], meta[n + 1] = metadata(at + u32(i * WEIGHTS + j * BLOCK_BYTES))

        return part

    def step_of(i, j):
        """Columns 64j..64j+63 of the slot times rows 64i..64i+63 of the warpgroup: two k32 instructions."""
        multiply, n, block = multiplies[i], 2 * (j * BLOCKS + i), i * WEIGHTS + j * BLOCK_BYTES
        A, B = u64(block // 16), u64(j * TILE_T * 8)

        @jit
        def part(acc, meta, a, b, keep):
            multiply(acc, a + A, b + B, meta[n], u32(keep) if j == 0 else u32(1))
            multiply(acc, a + A + u64(256 // 16), b + B + u64(64 // 16), meta[n + 1], 1)

        return part

    # Metadata first: a load between two products of a group would make ptxas wait for the first of them.
    load_all = sequence([load_meta(i, j) for j in range(STEP) for i in range(BLOCKS)])
    multiply_all = sequence([step_of(i, j) for j in range(STEP) for i in range(BLOCKS)])

    @jit
    def product(acc, meta, ring, turn, keep):
        slot = ring + (u32(turn) % u32(STAGES)) * u32(SLOT)
        weights = slot + TOKENS + (thread_number() // u32(128) - u32(1)) * u32(BLOCKS * WEIGHTS)
        word = (warp_number() % u32(4) * u32(16) + lane_number() // u32(4) * u32(2) + lane_number() % u32(2)) * u32(8)
        # In a cluster, a shared address of a CTA of rank ≥ 1 has high bits that a descriptor has no room for.
        a = u64((weights & u32(0x3FFFF)) >> u32(4)) | A_DESCRIPTOR
        b = u64((slot & u32(0x3FFFF)) >> u32(4)) | B_DESCRIPTOR
        load_all(meta, u32(weights + u32(VALUE_BYTES) + word))
        fence()
        multiply_all(acc, meta, a, b, keep)
        commit()

    @jit
    def one_by_one(acc, ring, turn, before):
        product(acc, meta_registers(), ring, turn, before > 0)

    @jit
    def two_under_way(acc, ring, turn, before):
        # wgmma reads its metadata when it runs, not when it is issued: while it may run, its registers are left alone.
        if before % 2 == 0:
            product(acc, meta_registers(), ring, turn, before > 0)
        else:
            product(acc, odd_registers(), ring, turn, True)

    return one_by_one if cfg.pairs else two_under_way
