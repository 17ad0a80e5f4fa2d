"""The words of :mod:`nmsparse.cuda.kernels.route` that sort, on Numba CUDA: each by a CTA unless it says more.

``turns(slots)``, ``slot(turn)``, ``token_of(slot)``
    A thread visits slots of the tokens of its CTA, in so many turns; ``slot // k``. A slot may not exist.
``clear()``
    ``counts[:] = 0``, in shared memory.
``load_id(ids_gmem, slot, inside)``
    ``ids[slot]`` if that is an expert and ``inside`` holds, else -1. ``load_weight``: the weight as fp32.
``count(expert, inside)``
    ``counts[expert]++`` where inside; what it was before, the *rank* of the slot.
``park(slots_gmem, slot, expert, rank, inside)``, ``recall(slots_gmem, slot, inside) -> expert, rank``
    Keeps both at the place of the slot until its position is known. An expert of -1 comes back as such.
``reserve(counter_gmem)``
    ``start[e] = counter[e]; counter[e] += counts[e]``, at once for each e; 0 in the only CTA.
``meet(counter_gmem)``
    Warp 0 waits until all CTAs are here, if there are several: these have to run at the same time.
``plan(plan_gmem, counter_gmem, order_gmem, tile_t)``
    Warp 0 makes ``start[e] += sum(total[:e])``, where ``total`` are the counters, or ``counts`` of the only CTA. In the
    first CTA also ``plan[e] = sum(total[:e+1])`` and ``plan[E+e] = sum(⌈total[:e+1] / tile_t⌉)``.
    With ``cfg.kept`` sums are in the order ``order``, ``plan[2i+2], plan[2i+3]`` are those up to its place i, after two
    zeros, and the ``start`` of experts from place ``kept`` on is far below 0.
``plan_of_ends(ends_gmem, plan_gmem, tile_t)``
    ``plan[e] = ends[e]`` and ``plan[E+e] = sum(⌈(ends[i] - ends[i-1]) / tile_t⌉ for i <= e)``, by a single warp.
``position(expert, rank)``
    ``start[expert] + rank``, -1 where the expert is, or is dropped.
``leave(counter_gmem)``
    The last CTA to say so makes the counters zero.
``barrier()``
    Of the CTA's threads.
``store_int(gmem, index, value, inside)``, ``store_float``
    ``gmem[index] = value`` where inside.
``copy_tokens(x_gmem, sorted_gmem, token, position, x_pitch, pieces)``
    ``sorted[position] = x[token]``, rows of 8·pieces columns, by a warp for each of its lanes that has a position.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from ...config_route import EXPERT_BITS
from ...ptx import barrier, memory, warp
from ...ptx.numba_glue import address_of, callable_of, registers
from .store import collect, sequence

__all__ = ["Words", "count_words", "ends_words", "given_words", "jit", "lane", "slot_words"]

u32, u64, i32, f32 = types.uint32, types.uint64, types.int32, types.float32

FAR_BELOW = -(1 << 30)  # a position that stays below 0 whatever rank is added
UNDER_WAY = 8  # pieces of a token that a lane loads before it stores any

Words = dict[str, Callable[..., Any]]
jit = cuda.jit(device=True, forceinline=True)

divide = callable_of(memory.divide)
from_lane, up = callable_of(warp.shuffle("idx", "u32")), callable_of(warp.shuffle("up", "s32"))


@jit
def lane():
    return i32(cuda.threadIdx.x & 31)


@jit
def sum_up_to(x):
    """Sum of the lanes up to this one."""
    for distance in (1, 2, 4, 8, 16):
        below = up(x, u32(distance))
        x = i32(x + (below if lane() >= distance else i32(0)))
    return x


def given_words(cfg: Any) -> Words:
    """What reads a routing that is given."""
    EXPERTS, WIDE, KIND = cfg.experts, cfg.ids == "s64", cfg.weights
    get_id = callable_of(memory.load("global", "s32", 2 if WIDE else 1))
    get_weight = callable_of(memory.load("global", "u16"))
    unpack = callable_of(memory.unpack("f16" if KIND == "f32" else KIND))

    @jit
    def load_id(ids_gmem, slot, inside):
        expert = i32(-1)
        if inside:
            if WIDE:
                low, high = get_id(ids_gmem + u64(slot) * u64(8))
                expert = low if high == 0 else i32(-1)
            else:
                expert = get_id(ids_gmem + u64(slot) * u64(4))
        return i32(expert if u32(expert) < u32(EXPERTS) else i32(-1))

    @jit
    def load_weight(given_gmem, slot, inside):
        weight = f32(0)
        if inside:
            weight = unpack(u32(get_weight(given_gmem + u64(slot) * u64(2))))
        return weight

    return {"load_id": load_id, "load_weight": load_weight}


def ends_words(cfg: Any) -> Words:
    """What plans rows that are sorted already."""
    EXPERTS, NUMBERS, STRIDE = cfg.experts, cfg.numbers, 8 if cfg.ids == "s64" else 4
    get, put = callable_of(memory.load("global", "s32", hint="nc")), callable_of(memory.store("global", "s32"))

    @jit
    def end_of(ends_gmem, expert):
        end = i32(0)
        if expert >= 0:
            end = get(ends_gmem + u64(expert) * u64(STRIDE))  # the low half of 64 bits
        return end

    @jit
    def tiles_of(ends_gmem, expert, tile_t):
        count = i32(end_of(ends_gmem, expert) - end_of(ends_gmem, expert - 1))
        return i32(divide(u32(count + tile_t - 1), u32(tile_t)))

    @jit
    def plan_of_ends(ends_gmem, plan_gmem, tile_t):
        tiles = i32(0)
        for i in range(NUMBERS):
            if NUMBERS * lane() + i < EXPERTS:
                tiles += tiles_of(ends_gmem, NUMBERS * lane() + i, tile_t)
        tiles = i32(sum_up_to(i32(tiles)) - tiles)
        for i in range(NUMBERS):
            expert = NUMBERS * lane() + i
            if expert < EXPERTS:
                tiles += tiles_of(ends_gmem, expert, tile_t)
                put(plan_gmem + u64(expert) * u64(4), end_of(ends_gmem, expert))
                put(plan_gmem + u64(EXPERTS + expert) * u64(4), i32(tiles))

    return {"plan_of_ends": plan_of_ends}


def slot_words(cfg: Any) -> Words:
    """What threads do with slots."""
    THREADS, WARPS, CHUNK, TOP_K, COPIES = cfg.threads, cfg.threads // 32, cfg.chunk, cfg.top_k, cfg.copies
    STARTS, DROPS = 4 * cfg.experts, cfg.kept is not None
    get, put = callable_of(memory.load("global", "u32")), callable_of(memory.store("global", "u32"))
    put_float, get_shared = callable_of(memory.store("global", "f32")), callable_of(memory.load("shared", "s32"))
    block_barrier, to_shared = callable_of(barrier.block_barrier), callable_of(memory.cvta_shared)

    @jit
    def turns(slots):
        chunks = u32(u32(slots + (CHUNK - 1)) // u32(CHUNK))
        mine = divide(u32(chunks + cuda.gridDim.x - 1 - cuda.blockIdx.x), u32(cuda.gridDim.x))
        return i32(u32(mine * u32(CHUNK) + u32(THREADS - 1)) // u32(THREADS))

    @jit
    def thread():
        if COPIES:  # slots spread over all warps, since each warp copies the tokens of its own
            return u32(cuda.threadIdx.x % 32 * WARPS + cuda.threadIdx.x // 32)
        return u32(cuda.threadIdx.x)

    @jit
    def slot(turn):
        number = u32(u32(turn) * u32(THREADS) + thread())  # among the slots of this CTA
        chunk = u32(number // u32(CHUNK))
        first = u32(chunk * u32(cuda.gridDim.x) + u32(cuda.blockIdx.x)) * u32(CHUNK)
        return i32(first + number - chunk * u32(CHUNK))

    @jit
    def token_of(slot):
        return i32(u32(slot) // u32(TOP_K))

    @jit
    def park(slots_gmem, slot, expert, rank, inside):
        if inside:
            put(
                slots_gmem + u64(slot) * u64(4),
                u32(0xFFFFFFFF) if expert < 0 else u32(u32(rank) << EXPERT_BITS | u32(expert)),
            )

    @jit
    def recall(slots_gmem, slot, inside):
        parked = u32(0xFFFFFFFF)
        if inside:
            parked = get(slots_gmem + u64(slot) * u64(4))
        return i32(-1 if parked == u32(0xFFFFFFFF) else parked & u32((1 << EXPERT_BITS) - 1)), i32(
            parked >> EXPERT_BITS
        )

    @jit
    def position(expert, rank):
        at = i32(-1)
        if expert >= 0:
            shared = to_shared(address_of(cuda.shared.array(0, types.int32)))
            at = i32(get_shared(u32(shared + STARTS + 4 * expert)) + rank)
            if DROPS:
                at = i32(max(at, i32(-1)))
        return at

    @jit
    def store_int(gmem, index, value, inside):
        if inside:
            put(gmem + u64(index) * u64(4), u32(value))

    @jit
    def store_float(gmem, index, value, inside):
        if inside:
            put_float(gmem + u64(index) * u64(4), value)

    @jit
    def barrier_():
        block_barrier()

    get_16, put_16 = callable_of(memory.load_where("u32", 4)), callable_of(memory.store("global", "u32", 4))

    def load_piece(n):
        @jit
        def part(source, first, pieces):
            piece = i32(first + 32 * n)
            return (get_16(source + u64(piece) * u64(16), u32(piece < pieces)),)

        return part

    def store_piece(n):
        @jit
        def part(to, first, pieces, values):
            piece, value = i32(first + 32 * n), values[n]
            if piece < pieces:
                put_16(to + u64(piece) * u64(16), value[0], value[1], value[2], value[3])

        return part

    load_all = collect([load_piece(n) for n in range(UNDER_WAY)])
    store_all = sequence([store_piece(n) for n in range(UNDER_WAY)])

    @jit
    def copy_tokens(x_gmem, sorted_gmem, token, position, x_pitch, pieces):
        for other in range(32):
            row, at = i32(from_lane(u32(token), u32(other))), i32(from_lane(u32(position), u32(other)))
            if at >= 0:
                source, to = x_gmem + u64(row) * u64(x_pitch) * u64(2), sorted_gmem + u64(at) * u64(pieces) * u64(16)
                for first in range(lane(), pieces, 32 * UNDER_WAY):
                    store_all(to, first, pieces, load_all(source, first, pieces))

    words = turns, slot, token_of, park, recall, position, store_int, store_float, copy_tokens
    return {"barrier": barrier_, **{word.__name__: word for word in words}}


def count_words(cfg: Any) -> Words:
    """What CTAs do with counts."""
    THREADS, EXPERTS, NUMBERS = cfg.threads, cfg.experts, cfg.numbers
    PASSES = -(-EXPERTS // THREADS)
    STARTS, ARRIVED, LEFT = 4 * EXPERTS, 4 * EXPERTS, 4 * EXPERTS + 4
    ORDERED, KEPT = cfg.kept is not None, EXPERTS if cfg.kept is None else cfg.kept
    # Where the ends of the positions and of the tiles of the first expert are in the plan, and how far the next ones.
    ENDS, TILES, APART = (8, 12, 8) if ORDERED else (0, 4 * EXPERTS, 4)
    get_shared, put_shared = callable_of(memory.load("shared", "s32")), callable_of(memory.store("shared", "s32"))
    get, put = callable_of(memory.load("global", "s32", hint="cg")), callable_of(memory.store("global", "s32"))
    add, add_shared = callable_of(memory.add_global_s32), callable_of(memory.add_shared_s32)
    fence, acquire = callable_of(memory.fence_gpu), callable_of(memory.load_acquire)
    warp_barrier, to_shared = callable_of(barrier.warp_barrier), callable_of(memory.cvta_shared)
    counts_of = registers(NUMBERS, "s32")

    @jit
    def counts():
        return to_shared(address_of(cuda.shared.array(0, types.int32)))

    @jit
    def clear():
        for i in range(PASSES):
            expert = i * THREADS + cuda.threadIdx.x
            if expert < EXPERTS:
                put_shared(u32(counts() + 4 * expert), 0)

    @jit
    def count(expert, inside):
        before = i32(0)
        if inside:
            before = add_shared(u32(counts() + 4 * expert), 1)
        return before

    @jit
    def reserve(counter_gmem):
        for i in range(PASSES):
            expert = i * THREADS + cuda.threadIdx.x
            if expert < EXPERTS:
                before = i32(0)
                if cuda.gridDim.x > 1:
                    mine = get_shared(u32(counts() + 4 * expert))
                    if mine > 0:
                        before = add(counter_gmem + u64(4 * expert), mine)
                put_shared(u32(counts() + STARTS + 4 * expert), before)

    @jit
    def meet(counter_gmem):
        if cuda.gridDim.x > 1 and cuda.threadIdx.x < 32:
            if cuda.threadIdx.x == 0:
                fence()
                add(counter_gmem + u64(ARRIVED), 1)
                while acquire(counter_gmem + u64(ARRIVED)) < cuda.gridDim.x:
                    pass
            warp_barrier()

    @jit
    def expert_at(order_gmem, place):
        return get(order_gmem + u64(place) * u64(4)) if ORDERED else place

    @jit
    def plan(plan_gmem, counter_gmem, order_gmem, tile_t):
        if cuda.threadIdx.x < 32:
            totals = counts_of()
            end, tiles = i32(0), i32(0)
            for i in range(NUMBERS):
                place = NUMBERS * lane() + i
                totals[i] = 0
                if place < KEPT:
                    several, expert = cuda.gridDim.x > 1, expert_at(order_gmem, place)
                    totals[i] = (
                        get(counter_gmem + u64(4 * expert)) if several else get_shared(u32(counts() + 4 * expert))
                    )
                end += totals[i]
                tiles += i32(divide(u32(totals[i] + tile_t - 1), u32(tile_t)))
            end, tiles = i32(sum_up_to(i32(end)) - end), i32(sum_up_to(i32(tiles)) - tiles)
            for i in range(NUMBERS):
                place = NUMBERS * lane() + i
                if place < KEPT:
                    start = u32(counts() + STARTS + 4 * expert_at(order_gmem, place))
                    put_shared(start, i32(get_shared(start) + end))
                    end += totals[i]
                    tiles += i32(divide(u32(totals[i] + tile_t - 1), u32(tile_t)))
                    if cuda.blockIdx.x == 0:
                        put(plan_gmem + u64(ENDS + APART * place), i32(end))
                        put(plan_gmem + u64(TILES + APART * place), i32(tiles))
            if ORDERED:
                for place in range(KEPT + lane(), EXPERTS, 32):
                    put_shared(u32(counts() + STARTS + 4 * expert_at(order_gmem, place)), FAR_BELOW)
                if cuda.blockIdx.x == 0 and lane() < 2:
                    put(plan_gmem + u64(4 * lane()), 0)

    @jit
    def leave(counter_gmem):
        if cuda.gridDim.x > 1 and cuda.threadIdx.x < 32:
            before = i32(0)
            if cuda.threadIdx.x == 0:
                fence()
                before = add(counter_gmem + u64(LEFT), 1)
                fence()
            before = i32(from_lane(u32(before), u32(0)))
            warp_barrier()
            if before == cuda.gridDim.x - 1:
                for i in range(NUMBERS + 1):
                    if 32 * i + lane() < EXPERTS + 2:
                        put(counter_gmem + u64(4 * (32 * i + lane())), 0)

    words = clear, count, reserve, meet, plan, leave
    return {word.__name__: word for word in words}
