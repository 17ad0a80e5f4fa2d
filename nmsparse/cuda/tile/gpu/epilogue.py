"""The epilogue of :mod:`nmsparse.cuda.kernels.gemm` on Numba CUDA.

Token t of the output is a row of memory, but a thread's sums lie along tokens. ``stmatrix.trans`` turns 8×8 pieces
through shared memory, after which 8 threads hold 64 consecutive outputs of a token and write a 128-byte line. A buffer
for whole tiles, from which the copy engine stores, would cost a slot of the ring; that is worth more here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from ...layout import BLOCK
from ...ptx import barrier, matrix, memory
from ...ptx.numba_glue import callable_of
from .store import make_bias, sequence, write_line

__all__ = ["store_words"]

u64 = types.uint64

jit = cuda.jit(device=True, forceinline=True)


def store_words(cfg: Any) -> dict[str, Callable[..., Any]]:
    """``store`` for ``cfg``."""
    TILE_M, TILE_T, CHUNK, BLOCKS = cfg.tile_m, cfg.tile_t, cfg.chunk, cfg.blocks
    STAGING, STAGING_BYTES, BUFFERS = cfg.staging_offset, cfg.staging_bytes, cfg.buffers
    LINES = CHUNK * 8  # 16-byte pieces of a chunk
    sync, pack = callable_of(barrier.named_barrier(128)), callable_of(memory.pack(cfg.dtype))
    bias_of = make_bias(cfg)
    st_2, st_4 = (callable_of(matrix.stmatrix(count, trans=True)) for count in (2, 4))
    read = callable_of(memory.load("shared", "u32", 4))

    @jit
    def piece(token, chunk):
        """Offset of 16-byte piece ``chunk`` of a staged token, spread over the banks."""
        return token * 128 + (chunk ^ token % 8) * 16

    def store_chunk(block, number):
        BASE = block * TILE_T // 2 + number * CHUNK // 2  # first register
        INDEX = block * (TILE_T // CHUNK) + number
        BUFFER = INDEX % BUFFERS * (STAGING_BYTES // BUFFERS)
        OCCUPIED = BUFFERS == 1 or INDEX == 0  # others may still read what was staged last

        @jit
        def part(acc, staging, y_gmem, low, high, row, token, rows, tokens, pitch):
            thread, lane = cuda.threadIdx.x % 128, cuda.threadIdx.x % 32
            group, warp, line = cuda.threadIdx.x // 128, thread // 32, lane % 8
            staging += BUFFER
            if OCCUPIED:
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
