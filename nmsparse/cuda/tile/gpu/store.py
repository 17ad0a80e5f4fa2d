"""The words that leave the registers, on Numba CUDA: partial sums between CTAs, and the epilogue.

Token t of the output is a row of memory, but a thread's sums lie along tokens. ``stmatrix.trans`` turns 8×8 pieces
through shared memory, after which 8 threads hold 64 consecutive outputs of a token and write a 128-byte line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from ...layout import BLOCK
from ...ptx import barrier, matrix, memory
from ...ptx.numba_glue import callable_of

u16, u32, u64, i32, f32 = types.uint16, types.uint32, types.uint64, types.int32, types.float32

jit = cuda.jit(device=True, forceinline=True)


def sequence(parts: list[Callable[..., None]]) -> Callable[..., None]:
    """One device function that runs ``parts`` in order.

    Unrolls while building, so that a part can index registers with its own constants: a loop that the compiler does
    not unroll would move them to local memory.
    """
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    first, second = sequence(parts[:half]), sequence(parts[half:])

    @jit
    def both(*args):
        first(*args)
        second(*args)

    return both


_write_16, _write_2 = callable_of(memory.store("global", "u32", 4)), callable_of(memory.store("global", "u16"))


@jit
def _write_pair(at, pair, row, rows):
    if row < rows:
        _write_2(at, u16(pair & u32(0xFFFF)))
    if row + 1 < rows:
        _write_2(at + u64(2), u16(pair >> u32(16)))


@jit
def write_line(at, a, b, c, d, row, rows):
    """Outputs ``row`` to ``row + 7`` of a token, those below ``rows``; at once where the address allows it."""
    if row + 8 <= rows and at % u64(16) == 0:
        _write_16(at, a, b, c, d)
    else:
        _write_pair(at, a, row, rows)
        _write_pair(at + u64(4), b, row + 2, rows)
        _write_pair(at + u64(8), c, row + 4, rows)
        _write_pair(at + u64(12), d, row + 6, rows)


def make_store(cfg: Any) -> dict[str, Callable[..., Any]]:
    """``store_partial``, ``add_partials`` and ``store`` for ``cfg``."""
    return {**_partial_words(cfg), **_epilogue_words(cfg)}


def _partial_words(cfg: Any) -> dict[str, Callable[..., Any]]:
    WARPGROUPS, CLUSTER, QUADS = cfg.warpgroups, cfg.cluster, cfg.sums // 4
    sync = callable_of(barrier.named_barrier(128))
    put, get = callable_of(memory.store("global", "f32", 4)), callable_of(memory.load("global", "f32", 4))
    acquire, release = callable_of(memory.load_acquire), callable_of(memory.store_release)

    def put_quad(i):
        @jit
        def part(acc, at):
            put(at + u64(i * 2048), acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3])

        return part

    def add_quad(i):
        @jit
        def part(acc, at):
            a, b, c, d = get(at + u64(i * 2048))
            acc[4 * i] += a
            acc[4 * i + 1] += b
            acc[4 * i + 2] += c
            acc[4 * i + 3] += d

        return part

    put_all, add_all = sequence([put_quad(i) for i in range(QUADS)]), sequence([add_quad(i) for i in range(QUADS)])

    @jit
    def slot_of(block):
        """Number of this warpgroup's partial sums in CTA ``block``."""
        return block * WARPGROUPS + (cuda.threadIdx.x // 128 - 1)

    @jit
    def address(partial_gmem, slot):
        return partial_gmem + u64(slot) * u64(QUADS * 2048) + u64(cuda.threadIdx.x % 128 * 16)

    @jit
    def store_partial(acc, partial_gmem, flag_gmem):
        slot = slot_of(cuda.blockIdx.x)
        put_all(acc, address(partial_gmem, slot))
        sync(cuda.threadIdx.x // 128)  # what the others wrote is released with the flag
        if cuda.threadIdx.x % 128 == 0:
            release(flag_gmem + u64(slot * 4), 1)

    @jit
    def add_partials(acc, partial_gmem, flag_gmem, split, parts):
        # Each thread waits for the flag of one peer, so the waits overlap; the sums are added in the order of k.
        for part in range(1 + cuda.threadIdx.x % 128, parts, 128):
            flag = flag_gmem + u64(slot_of(cuda.blockIdx.x + part * split * CLUSTER) * 4)
            while acquire(flag) == 0:
                pass
            release(flag, 0)
        sync(cuda.threadIdx.x // 128)
        for part in range(1, parts):
            add_all(acc, address(partial_gmem, slot_of(cuda.blockIdx.x + part * split * CLUSTER)))

    return {"store_partial": store_partial, "add_partials": add_partials}


def _epilogue_words(cfg: Any) -> dict[str, Callable[..., Any]]:
    TILE_M, TILE_T, CHUNK, BLOCKS, BIAS = cfg.tile_m, cfg.tile_t, cfg.chunk, cfg.blocks, cfg.bias
    STAGING, STAGING_BYTES = cfg.staging_offset, cfg.staging_bytes
    LINES = CHUNK * 8  # 16-byte pieces of a chunk
    sync, pack = callable_of(barrier.named_barrier(128)), callable_of(memory.pack(cfg.dtype))
    unpack, get_bias = callable_of(memory.unpack(cfg.dtype)), callable_of(memory.load("global", "u16"))
    st_2, st_4 = (callable_of(matrix.stmatrix(count, trans=True)) for count in (2, 4))
    read = callable_of(memory.load("shared", "u32", 4))

    @jit
    def piece(token, chunk):
        """Offset of 16-byte piece ``chunk`` of a staged token, spread over the banks."""
        return token * 128 + (chunk ^ token % 8) * 16

    def store_chunk(block, number):
        BASE = block * TILE_T // 2 + number * CHUNK // 2  # first register

        @jit
        def part(acc, staging, y_gmem, low, high, row, token, rows, tokens, pitch):
            thread, lane = cuda.threadIdx.x % 128, cuda.threadIdx.x % 32
            group, warp, line = cuda.threadIdx.x // 128, thread // 32, lane % 8
            sync(group)
            if CHUNK == 8:
                at = staging + piece(line, warp * 2 + lane // 8 % 2)
                st_2(at, pack(acc[BASE] + low, acc[BASE + 1] + low), pack(acc[BASE + 2] + high, acc[BASE + 3] + high))
            else:
                for j in range(CHUNK // 16):
                    at = staging + piece(16 * j + lane // 16 * 8 + line, warp * 2 + lane // 8 % 2)
                    i = BASE + 8 * j
                    st_4(
                        at,
                        pack(acc[i] + low, acc[i + 1] + low),
                        pack(acc[i + 2] + high, acc[i + 3] + high),
                        pack(acc[i + 4] + low, acc[i + 5] + low),
                        pack(acc[i + 6] + high, acc[i + 7] + high),
                    )
            sync(group)
            for n in range((LINES + 127) // 128):
                index = thread + 128 * n
                t, m = token + number * CHUNK + index // 8, row + index % 8 * 8
                if index < LINES and t < tokens and m < rows:
                    a, b, c, d = read(staging + piece(index // 8, index % 8))
                    write_line(y_gmem + (u64(t) * u64(pitch) + u64(m)) * u64(2), a, b, c, d, m, rows)

        return part

    @jit
    def bias_of(bias_gmem, row, rows):
        if BIAS and row < rows:
            return unpack(u32(get_bias(bias_gmem + u64(row * 2))))
        return f32(0)

    def store_block(block):
        chunks = sequence([store_chunk(block, i) for i in range(TILE_T // CHUNK)])

        @jit
        def part(acc, staging, y_gmem, bias_gmem, row, token, rows, tokens, pitch):
            first = row + block * BLOCK
            mine = first + cuda.threadIdx.x % 128 // 32 * 16 + cuda.threadIdx.x % 32 // 4
            low, high = bias_of(bias_gmem, mine, rows), bias_of(bias_gmem, mine + 8, rows)
            chunks(acc, staging, y_gmem, low, high, first, token, rows, tokens, pitch)

        return part

    store_blocks = sequence([store_block(i) for i in range(BLOCKS)])

    @jit
    def store(acc, ring, y_gmem, bias_gmem, row, token, rows, tokens, pitch):
        warpgroup = cuda.threadIdx.x // 128 - 1
        staging = ring + STAGING + warpgroup * STAGING_BYTES
        first = row * TILE_M + warpgroup * BLOCKS * BLOCK
        store_blocks(acc, staging, y_gmem, bias_gmem, first, token * TILE_T, rows, tokens, pitch)

    return {"store": store}
