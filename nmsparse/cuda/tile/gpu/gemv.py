"""The words of :mod:`nmsparse.cuda.kernels.gemv` on Numba CUDA."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from numba import cuda
from numba.cuda import types

from ...layout import BLOCK, BLOCK_BYTES, EMPTY, VALUE_BYTES
from ...ptx import barrier, memory, mma
from ...ptx.numba_glue import address_of, callable_of, registers
from .store import sequence

u16, u32, u64, f32 = types.uint16, types.uint32, types.uint64, types.float32

jit = cuda.jit(device=True, forceinline=True)


def make(cfg: Any) -> ModuleType:
    """The words for ``cfg``, a :class:`~nmsparse.cuda.config.GemvConfig`."""
    tile = ModuleType("tile")
    tile.BLOCKS_A_ROUND = cfg.warps * cfg.batch
    for word, function in {**_load_words(cfg), **_sum_words(cfg)}.items():
        setattr(tile, word, function)
    return tile


def _load_words(cfg: Any) -> dict[str, Callable[..., Any]]:
    BATCH, GROUPS = cfg.batch, cfg.tile_t // 8
    NO_META = u32(EMPTY * 0x10001)
    read = callable_of(memory.load("global", "u32", hint="L1::no_allocate"))
    read_meta = callable_of(memory.load("global", "u32", 2, hint="L1::no_allocate"))
    read_token = callable_of(memory.load("global", "u32"))

    @jit
    def first_block():
        return cuda.threadIdx.x // 32 * BATCH

    def load_block(i):
        @jit
        def part(a, e, w_gmem, block, k_blocks):
            lane, slice_ = cuda.threadIdx.x % 32, cuda.blockIdx.x % 4
            if block + i < k_blocks:
                down = cuda.blockIdx.x // 4
                base = w_gmem + (u64(down) * u64(k_blocks) + u64(block + i)) * u64(BLOCK_BYTES)
                values = base + u64(slice_ * 1024 + lane * 4)
                for step in range(2):
                    for register in range(4):
                        core = (2 * step + register // 2) * 128 + register % 2 * 512
                        a[8 * i + 4 * step + register] = read(values + u64(core))
                word = (slice_ * 16 + lane // 4 * 2 + lane % 2) * 8
                e[2 * i], e[2 * i + 1] = read_meta(base + u64(VALUE_BYTES + word))
            else:
                for register in range(8):
                    a[8 * i + register] = u32(0)
                e[2 * i], e[2 * i + 1] = NO_META, NO_META

        return part

    def load_columns(i, group):
        @jit
        def part(b, x_gmem, block, tokens, columns, x_pitch):
            token, column = group * 8 + cuda.threadIdx.x % 32 // 4, (block + i) * BLOCK + cuda.threadIdx.x % 4 * 2
            row = x_gmem + (u64(token) * u64(x_pitch) + u64(column)) * u64(2)
            for register in range(8):
                value = u32(0)
                if token < tokens and column + 8 * register < columns:
                    value = read_token(row + u64(16 * register))
                b[(i * GROUPS + group) * 8 + register] = value

        return part

    return {
        "first_block": first_block,
        "load_weights": sequence([load_block(i) for i in range(BATCH)]),
        "load_tokens": sequence([load_columns(i, group) for i in range(BATCH) for group in range(GROUPS)]),
        "weight_registers": registers(8 * BATCH, "u32"),
        "meta_registers": registers(2 * BATCH, "u32"),
        "token_registers": registers(8 * BATCH * GROUPS, "u32"),
    }


def _sum_words(cfg: Any) -> dict[str, Callable[..., Any]]:
    BATCH, GROUPS, WARPS, THREADS, BIAS = cfg.batch, cfg.tile_t // 8, cfg.warps, cfg.threads, cfg.bias
    SUMS, OUTPUTS = 4 * GROUPS, 16 * cfg.tile_t
    multiplies = [callable_of(mma.mma_sp(cfg.dtype), first=4 * group) for group in range(GROUPS)]
    block_barrier, to_shared = callable_of(barrier.block_barrier), callable_of(memory.cvta_shared)
    put, get = callable_of(memory.store("shared", "f32")), callable_of(memory.load("shared", "f32"))
    pack, unpack = callable_of(memory.pack(cfg.dtype)), callable_of(memory.unpack(cfg.dtype))
    get_bias, write = callable_of(memory.load("global", "u16")), callable_of(memory.store("global", "u16"))

    @jit
    def zero(acc):
        for i in range(SUMS):
            acc[i] = f32(0)

    def step_of(i, step, group):
        multiply, A, B = multiplies[group], 8 * i + 4 * step, (i * GROUPS + group) * 8 + 4 * step

        @jit
        def part(acc, a, e, b):
            multiply(acc, a[A], a[A + 1], a[A + 2], a[A + 3], b[B], b[B + 1], b[B + 2], b[B + 3], e[2 * i + step])

        return part

    @jit
    def sums():
        return to_shared(address_of(cuda.shared.array(0, f32)))

    @jit
    def share(acc):
        """D[row, token] of this warp to ``[warp][token][row]``."""
        warp, lane = cuda.threadIdx.x // 32, cuda.threadIdx.x % 32
        base = sums() + u32(warp * OUTPUTS * 4)
        for i in range(SUMS):
            row, token = lane // 4 + i % 4 // 2 * 8, i // 4 * 8 + lane % 4 * 2 + i % 2
            put(base + u32((token * 16 + row) * 4), acc[i])

    @jit
    def barrier_():
        block_barrier()

    @jit
    def store(y_gmem, bias_gmem, rows, tokens, y_pitch):
        for output in range(cuda.threadIdx.x, OUTPUTS, THREADS):
            token, row = output // 16, cuda.blockIdx.x * 16 + output % 16
            if token < tokens and row < rows:
                total = f32(0)
                for warp in range(WARPS):
                    total += get(sums() + u32((warp * OUTPUTS + output) * 4))
                if BIAS:
                    total += unpack(u32(get_bias(bias_gmem + u64(row * 2))))
                write(y_gmem + (u64(token) * u64(y_pitch) + u64(row)) * u64(2), u16(pack(total, f32(0)) & u32(0xFFFF)))

    steps = [step_of(i, step, group) for i in range(BATCH) for step in range(2) for group in range(GROUPS)]
    return {
        "accumulator": registers(SUMS),
        "zero": zero,
        "mma_sp": sequence(steps),
        "share": share,
        "barrier": barrier_,
        "store": store,
    }
