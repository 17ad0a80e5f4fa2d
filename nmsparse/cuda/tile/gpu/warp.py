"""The vocabulary of the ``mma.sp`` kernel on Numba CUDA: each word a device function that the compiler inlines."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from numba import cuda
from numba.cuda import types

from ... import config_mma, schedule
from ...layout import BLOCK, BLOCK_BYTES
from ...ptx import barrier, copy, matrix, memory, mma
from ...ptx.numba_glue import address_of, callable_of, registers
from . import jit  # and that module's divide for the schedule
from .store import collect, make_add, make_bias, make_put, sequence, write_line
from .warp_samoyeds import run_words, stage_pairs

__all__ = ["make"]

u16, u32, u64, i32, f32 = types.uint16, types.uint32, types.uint64, types.int32, types.float32

Words = dict[str, Callable[..., Any]]

token_place, value_row, metadata_word = map(
    jit, (config_mma.token_place, config_mma.value_row, config_mma.metadata_word)
)
weights_place, metadata_place = map(jit, (config_mma.weights_place, config_mma.metadata_place))


def make(cfg: Any) -> ModuleType:
    """The words for ``cfg``, as a module that a kernel text receives."""
    tile = ModuleType("tile")
    for part in (_place_words, _weight_words, _token_words, _product_words, run_words, _partial_words, _store_words):
        for word, function in part(cfg).items():
            setattr(tile, word, function)
    return tile


def _place_words(cfg: Any) -> Words:
    TILE_M, TILE_T, STEP, GROUP = cfg.tile_m, cfg.tile_t, cfg.tile_k // BLOCK, cfg.group
    pieces_of, piece_of, place_of, run_at = schedule.pieces, schedule.piece, schedule.banded, schedule.run_of
    to_shared, worker = callable_of(memory.cvta_shared), callable_of(memory.read_again("ctaid.x"))

    @jit
    def ring():
        return to_shared(address_of(cuda.shared.array(0, types.uint8, alignment=128)))

    @jit
    def grid(rows, tokens, k_blocks):
        return i32((rows + TILE_M - 1) // TILE_M), i32((tokens + TILE_T - 1) // TILE_T), i32(k_blocks // STEP)

    @jit
    def pieces(tiles, split, parts):
        return i32(pieces_of(i32(worker()), cuda.gridDim.x, tiles, split, parts))

    @jit
    def piece(index, tiles, split, parts, steps):
        number, first, last = piece_of(index, i32(worker()), cuda.gridDim.x, tiles, split, parts, steps)
        return i32(number), i32(first), i32(last)

    @jit
    def place(number, row_tiles, token_tiles):
        row, token = place_of(number, row_tiles, token_tiles, GROUP)
        return i32(row), i32(token)

    @jit
    def run_of(step, run_steps):
        run, left = run_at(step, run_steps)
        return i32(run), i32(left)

    return {"ring": ring, "grid": grid, "pieces": pieces, "piece": piece, "place": place, "run_of": run_of}


def _weight_words(cfg: Any) -> Words:
    STAGES, SLOT, TOKENS, WEIGHTS = cfg.stages, cfg.slot_bytes, cfg.token_bytes, cfg.weight_bytes
    BLOCKS, HEIGHT = cfg.tile_rows // BLOCK, cfg.height
    LOADERS = cfg.threads // BLOCKS  # threads that load one row of blocks
    PASSES = -(-WEIGHTS // (16 * LOADERS))
    cp_async, commit_group = callable_of(copy.cp_async(16)), callable_of(copy.commit)
    wait_group, meet = callable_of(copy.wait(STAGES - 2)), callable_of(barrier.block_barrier)

    @jit
    def load_weights(ring, step, w_gmem, row, rows, k_blocks):
        thread = u32(cuda.threadIdx.x)
        mine, at = thread // u32(LOADERS), thread % u32(LOADERS) * 16
        # A block beyond the last row is the last block once more: valid metadata, and rows that are not stored.
        line = min(i32(row * BLOCKS + mine), i32((rows - 1) // HEIGHT))
        first = w_gmem + u64(line) * u64(k_blocks) * u64(BLOCK_BYTES) + u64(at)
        source = first + u64(u32(step)) * u64(WEIGHTS)
        target = u32(ring + u32(step) % u32(STAGES) * u32(SLOT) + TOKENS + mine * WEIGHTS + at)
        for n in range(PASSES):
            if at + n * 16 * LOADERS < WEIGHTS:
                cp_async(target + n * 16 * LOADERS, source + u64(n * 16 * LOADERS), 16)

    @jit
    def commit():
        commit_group()

    @jit
    def wait():
        wait_group()
        meet()

    return {"load_weights": load_weights, "commit": commit, "wait": wait}


def _token_words(cfg: Any) -> Words:
    STAGES, SLOT, TILE_M, TILE_T, TILE_K = cfg.stages, cfg.slot_bytes, cfg.tile_m, cfg.tile_t, cfg.tile_k
    CHUNKS = TILE_K // 8  # pieces of 16 bytes that a token has
    AT_ONCE = cfg.threads // CHUNKS  # tokens that all threads together load in a pass
    PASSES = -(-TILE_T // AT_ONCE)
    V, M = cfg.gather or (0, 0)
    cp_async, get_if = callable_of(copy.cp_async(16)), callable_of(memory.load_if)
    get_word, put = callable_of(memory.load("global", "u32")), callable_of(memory.store("shared", "u32", 4))
    thread_again = callable_of(memory.read_again("tid.x"))

    @jit
    def share(ring, step, token, tokens):
        """What this thread loads: chunk ``chunk`` of token ``first``, to ``target``, and of each AT_ONCE-th after it
        that comes before ``present``. The swizzle repeats after 8 tokens.
        """
        thread = thread_again()
        chunk, mine = u32(thread % u32(CHUNKS)), u32(thread // u32(CHUNKS))
        target = u32(ring + u32(step) % u32(STAGES) * u32(SLOT) + token_place(mine, chunk, TILE_T))
        first = i32(token * TILE_T + mine)
        return target, first, chunk, min(i32(tokens - first), i32(TILE_T - mine))

    @jit
    def copy_tokens(target, source, present, line, size):
        for n in range(PASSES):
            # What stands for a token beyond the last does not matter: its sums are not stored.
            if n * AT_ONCE < present:
                cp_async(u32(target + n * AT_ONCE * 128), source + u64(n * AT_ONCE) * line, size)

    @jit
    def load_vectors(ring, step, x_gmem, index_gmem, row, token, tokens, columns, pitch):
        target, first, chunk, present = share(ring, step, token, tokens)
        line, column = u64(u32(pitch * 2)), i32(u32(step) * u32(TILE_K) + chunk * u32(8))
        source = x_gmem + u64(u32(first)) * line + u64(u32(column)) * u64(2)
        if i32((u32(step) + u32(1)) * u32(TILE_K)) <= columns:
            copy_tokens(target, source, present, line, 16)
        else:  # cp.async writes zeros for the columns that do not exist
            copy_tokens(target, source, present, line, min(max(i32(columns - column), i32(0)), i32(8)) * 2)

    @jit
    def adjacent(index_gmem, tile_row, group, columns):
        """The four columns of a group where nothing is gathered."""
        return u32(group * 4), u32(group * 4 + 1), u32(group * 4 + 2), u32(group * 4 + 3)

    @jit
    def gathered(index_gmem, tile_row, group, columns):
        """The four kept columns of a group of V:N:M; beyond the last group, columns that do not exist."""
        groups = ((columns + M - 1) // M + 3) // 4 * 4
        word, first = u32(0), u32(group * M)
        if group < groups:
            word = u32(get_word(index_gmem + u64((tile_row * TILE_M // V * groups + group) * 4)))
        return (
            u32(first + (word & u32(255))),
            u32(first + (word >> u32(8) & u32(255))),
            u32(first + (word >> u32(16) & u32(255))),
            u32(first + (word >> u32(24))),
        )

    def fetch(n):
        """Eight elements of the n-th of this thread's tokens."""

        @jit
        def part(source, line, present, columns, eight):
            x_token = source + u64(n * AT_ONCE) * line
            end = u32(columns) if n * AT_ONCE < present else u32(0)
            a, b, c, d, e, f, g, h = eight
            return (
                get_if(x_token + u64(a) * u64(2), a < end),
                get_if(x_token + u64(b) * u64(2), b < end),
                get_if(x_token + u64(c) * u64(2), c < end),
                get_if(x_token + u64(d) * u64(2), d < end),
                get_if(x_token + u64(e) * u64(2), e < end),
                get_if(x_token + u64(f) * u64(2), f < end),
                get_if(x_token + u64(g) * u64(2), g < end),
                get_if(x_token + u64(h) * u64(2), h < end),
            )

        return part

    def put_chunk(n):
        A, B, C, D, E, F, G, H = range(8 * n, 8 * n + 8)

        @jit
        def part(target, present, x):
            if n * AT_ONCE < present:
                at = u32(target + n * AT_ONCE * 128)
                put(at, pair(x[A], x[B]), pair(x[C], x[D]), pair(x[E], x[F]), pair(x[G], x[H]))

        return part

    @jit
    def pair(low, high):
        return u32(low) | u32(high) << u32(16)

    fetch_all = collect([fetch(n) for n in range(PASSES)])  # all loads are under way before the first is waited for
    put_all = sequence([put_chunk(n) for n in range(PASSES)])

    def load_elements(columns_of):
        """Tokens in loads of 2 bytes: eight of them and a store to shared memory in place of one copy."""

        @jit
        def load(ring, step, x_gmem, index_gmem, row, token, tokens, columns, pitch):
            target, first, chunk, present = share(ring, step, token, tokens)
            group, line = i32(u32(step) * u32(TILE_K // 4) + chunk * u32(2)), u64(u32(pitch * 2))
            eight = columns_of(index_gmem, row, group, columns) + columns_of(index_gmem, row, i32(group + 1), columns)
            put_all(target, present, fetch_all(x_gmem + u64(u32(first)) * line, line, present, columns, eight))

        return load

    if cfg.gather:
        return {"load_tokens_gathered": load_elements(gathered)}
    return {"load_tokens": load_vectors if cfg.vector else load_elements(adjacent)}


def _product_words(cfg: Any) -> Words:
    STAGES, SLOT, TOKENS, WEIGHTS = cfg.stages, cfg.slot_bytes, cfg.token_bytes, cfg.weight_bytes
    (HIGH, WIDE), SUMS, TILE_T, WARPS_T = cfg.atoms, cfg.sums, cfg.tile_t, cfg.warps_t
    ldmatrix, get = callable_of(matrix.ldmatrix(4)), callable_of(memory.load("shared", "u32"))
    multiply_first, multiply_second = (
        callable_of(mma.mma_sp_tile(cfg.dtype, HIGH, WIDE, selector)) for selector in (0, 1)
    )

    @jit
    def zero(acc):
        for i in range(SUMS):
            acc[i] = f32(0)

    def values_of(i, offset):
        AT = config_mma.weights_place(16 * i, WEIGHTS) + offset

        @jit
        def part(values, words, tokens):
            return ldmatrix(u32(values + AT))

        return part

    def tokens_of(j, offset):
        AT = j * 1024 + offset

        @jit
        def part(values, words, tokens):
            return ldmatrix(u32(tokens + AT))

        return part

    def words_of(i, offset):
        AT = config_mma.metadata_place(16 * i, WEIGHTS) - config_mma.metadata_place(0, WEIGHTS) + offset

        @jit
        def part(values, words, tokens):
            return (get(u32(words + AT)),)

        return part

    def block_of(number):
        """Block ``number`` of the slot along k: two instructions deep, for which the lanes hold one metadata word."""
        block, slab = number * BLOCK_BYTES, number * TILE_T * 128
        tokens_of_block = [tokens_of(j, slab) for j in range(WIDE)]
        first = collect([values_of(i, block) for i in range(HIGH)] + tokens_of_block)
        second = collect([values_of(i, block + 256) for i in range(HIGH)] + tokens_of_block)
        metadata = collect([words_of(i, block) for i in range(HIGH)])

        @jit
        def part(acc, values, words, tokens, second_tokens):
            meta = metadata(values, words, tokens)
            operands = first(values, words, tokens) + meta
            multiply_first(acc, *operands)
            operands = second(values, words, second_tokens) + meta
            multiply_second(acc, *operands)

        return part

    blocks = sequence([block_of(number) for number in range(cfg.tile_k // BLOCK)])

    @jit
    def mma_sp(acc, ring, step):
        lane, warp = u32(cuda.threadIdx.x) % u32(32), u32(cuda.threadIdx.x) // u32(32)
        row, token = warp // u32(WARPS_T) * u32(16 * HIGH), warp % u32(WARPS_T) * u32(8 * WIDE) + lane % u32(8)
        slot = u32(ring + u32(step) % u32(STAGES) * u32(SLOT))
        values = u32(slot + TOKENS + weights_place(row, WEIGHTS) + value_row(lane))
        words = u32(slot + TOKENS + metadata_place(row, WEIGHTS) + metadata_word(lane))
        chunk = lane // u32(8)
        first, second = token_place(token, chunk, TILE_T), token_place(token, chunk + u32(4), TILE_T)
        blocks(acc, values, words, u32(slot + first), u32(slot + second))

    return {"accumulator": registers(SUMS), "zero": zero, "mma_sp": mma_sp}


def _partial_words(cfg: Any) -> Words:
    (FIRST, LAST), THREADS, thread_again = cfg.kept, cfg.threads, callable_of(memory.read_again("tid.x"))
    QUADS = (LAST - FIRST) // 4
    meet = callable_of(barrier.block_barrier)
    put, get = callable_of(memory.store("global", "f32", 4)), callable_of(memory.load("global", "f32", 4))
    acquire, release = callable_of(memory.load_acquire), callable_of(memory.store_release)

    put_all, add_all = make_put(QUADS, put, 16 * THREADS, FIRST), make_add(QUADS, get, 16 * THREADS, first=FIRST)

    @jit
    def address(partial_gmem, worker):
        return partial_gmem + (u64(worker) * u64(QUADS * THREADS) + u64(thread_again())) * u64(16)

    @jit
    def store_partial(acc, partial_gmem, flag_gmem):
        put_all(acc, address(partial_gmem, cuda.blockIdx.x))
        meet()  # what the others wrote is released with the flag
        if thread_again() == 0:
            release(flag_gmem + u64(cuda.blockIdx.x * 4), 1)

    @jit
    def add_partials(acc, partial_gmem, flag_gmem, split, parts):
        # Each thread waits for the flag of one peer, so the waits overlap; the sums are added in the order of k.
        for part in range(1 + i32(thread_again()), parts, THREADS):
            flag = flag_gmem + u64((cuda.blockIdx.x + part * split) * 4)
            while acquire(flag) == 0:
                pass
            release(flag, 0)  # for the next launch
        meet()
        for part in range(1, parts):
            add_all(acc, address(partial_gmem, cuda.blockIdx.x + part * split))

    return {"store_partial": store_partial, "add_partials": add_partials}


def _store_words(cfg: Any) -> Words:
    """The epilogue: outputs are staged in shared memory, a token after the other, from where threads write 16 bytes
    each of consecutive ones.
    """
    (HIGH, WIDE), WARPS_T, TILE_M, TILE_T = cfg.atoms, cfg.warps_t, cfg.tile_m, cfg.tile_t
    STAGED, THREADS, thread_again = cfg.staged_bytes, cfg.threads, callable_of(memory.read_again("tid.x"))
    LINE = TILE_M // 8  # pieces of 16 bytes that a token has
    stage = stage_pairs(cfg) if cfg.pairs else _stage_rows(cfg)
    meet, read = callable_of(barrier.block_barrier), callable_of(memory.load("shared", "u32", 4))

    @jit
    def store(acc, ring, y_gmem, bias_gmem, row, token, rows, tokens, pitch):
        thread = i32(thread_again())
        lane, warp = thread % 32, thread // 32
        meet()  # all warps are done with the ring
        m, t = warp // WARPS_T * (16 * HIGH), warp % WARPS_T * (8 * WIDE)
        stage(acc, ring, lane, m, t, bias_gmem, row * TILE_M, rows)
        meet()
        for piece in range(thread, TILE_T * LINE, THREADS):
            number, first = token * TILE_T + piece // LINE, row * TILE_M + piece % LINE * 8
            if number < tokens and first < rows:
                a, b, c, d = read(u32(ring + piece // LINE * STAGED + piece % LINE * 16))
                write_line(y_gmem + (u64(number) * u64(pitch) + u64(first)) * u64(2), a, b, c, d, first, rows)
        meet()  # the ring fills again

    return {"store": store}


def _stage_rows(cfg: Any) -> Callable[..., Any]:
    """A thread's sums lie along tokens, a token of the output along rows: 8×8 pieces are turned in registers."""
    (HIGH, WIDE), STAGED = cfg.atoms, cfg.staged_bytes
    bias_of, pack = make_bias(cfg), callable_of(memory.pack(cfg.dtype))
    turn, put = callable_of(matrix.movmatrix_trans), callable_of(memory.store("shared", "u32"))

    def stage_atom(i, j):
        A, B, C, D = range(4 * (i * WIDE + j), 4 * (i * WIDE + j) + 4)
        AT = 8 * j * STAGED + 32 * i

        @jit
        def part(acc, at, low, high):
            put(u32(at + AT), turn(pack(acc[A] + low, acc[B] + low)))
            put(u32(at + AT + 16), turn(pack(acc[C] + high, acc[D] + high)))

        return part

    def stage_row(i):
        atoms = sequence([stage_atom(i, j) for j in range(WIDE)])

        @jit
        def part(acc, at, bias_gmem, row, rows):
            atoms(acc, at, bias_of(bias_gmem, row + 16 * i, rows), bias_of(bias_gmem, row + 16 * i + 8, rows))

        return part

    stage_all = sequence([stage_row(i) for i in range(HIGH)])

    @jit
    def stage(acc, ring, lane, m, t, bias_gmem, first, rows):
        at = ring + (t + lane // 4) * STAGED + (m + lane % 4 * 2) * 2
        stage_all(acc, at, bias_gmem, first + m + lane // 4, rows)

    return stage
