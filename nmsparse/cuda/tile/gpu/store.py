"""The words that leave the registers, on Numba CUDA: partial sums between CTAs, and what all epilogues share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from ...ptx import barrier, memory
from ...ptx.numba_glue import callable_of
from .numbers import cta_number, read_thread

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


def collect(parts: list[Callable[..., Any]]) -> Callable[..., Any]:
    """One device function that returns the tuples of ``parts`` as one tuple."""
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    first, second = collect(parts[:half]), collect(parts[half:])

    @jit
    def both(*args):
        return first(*args) + second(*args)

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


def make_put(quads: int, put: Callable[..., None], pitch: int, first: int = 0) -> Callable[..., None]:
    """``put(at + i·pitch, acc[4i : 4i + 4])`` for ``quads`` quads of the sums from ``first`` on."""

    def put_quad(i):
        A, B, C, D = range(first + 4 * i, first + 4 * i + 4)

        @jit
        def part(acc, at):
            put(at + u64(i * pitch), acc[A], acc[B], acc[C], acc[D])

        return part

    return sequence([put_quad(i) for i in range(quads)])


def make_add(
    quads: int, get: Callable[..., Any], pitch: int, address: Any = u64, first: int = 0
) -> Callable[..., None]:
    """``acc[4i : 4i + 4] += get(at + i·pitch)`` for ``quads`` quads of the sums from ``first`` on, at addresses of type
    ``address``."""

    def add_quad(i):
        A, B, C, D = range(first + 4 * i, first + 4 * i + 4)

        @jit
        def part(acc, at):
            a, b, c, d = get(address(at + address(i * pitch)))
            acc[A] += a
            acc[B] += b
            acc[C] += c
            acc[D] += d

        return part

    return sequence([add_quad(i) for i in range(quads)])


def partial_words(cfg: Any) -> dict[str, Callable[..., Any]]:
    WARPGROUPS, QUADS = cfg.warpgroups, cfg.sums // 4
    sync = callable_of(barrier.named_barrier(128))
    put, get = callable_of(memory.store("global", "f32", 4)), callable_of(memory.load("global", "f32", 4))
    acquire, release = callable_of(memory.load_acquire), callable_of(memory.store_release)

    put_all, add_all = make_put(QUADS, put, 2048), make_add(QUADS, get, 2048)

    # The number of the thread is read anew: nothing that hangs on it takes registers during the products.
    @jit
    def slot_of(block, thread):
        """Number of this warpgroup's partial sums in CTA ``block``."""
        return u32(block * u32(WARPGROUPS) + thread // u32(128) - u32(1))

    @jit
    def address(partial_gmem, slot, thread):
        return partial_gmem + u64(slot) * u64(QUADS * 2048) + u64(u32(thread % u32(128) * u32(16)))

    @jit
    def store_partial(acc, partial_gmem, flag_gmem):
        thread = read_thread()
        slot = slot_of(cta_number(), thread)
        put_all(acc, address(partial_gmem, slot, thread))
        sync(u32(thread // u32(128)))  # what the others wrote is released with the flag
        if thread % u32(128) == 0:
            release(flag_gmem + u64(slot) * u64(4), 1)

    @jit
    def add_partials(acc, partial_gmem, flag_gmem, split, parts):
        # Each thread waits for the flag of one peer, so the waits overlap; the sums are added in the order of k.
        thread, block = read_thread(), cta_number()
        for part in range(i32(1) + i32(thread % u32(128)), i32(parts), i32(128)):
            flag = flag_gmem + u64(slot_of(u32(block + u32(part * split)), thread)) * u64(4)
            while acquire(flag) == 0:
                pass
            release(flag, 0)
        sync(u32(thread // u32(128)))
        for part in range(i32(1), i32(parts)):
            add_all(acc, address(partial_gmem, slot_of(u32(block + u32(part * split)), thread), thread))

    return {"store_partial": store_partial, "add_partials": add_partials}


def make_bias(cfg: Any) -> Callable[..., Any]:
    """The bias of a row as fp32, 0 if there is none."""
    BIAS, unpack, get = cfg.bias, callable_of(memory.unpack(cfg.dtype)), callable_of(memory.load("global", "u16"))

    @jit
    def bias_of(bias_gmem, row, rows):
        if BIAS and row < rows:
            return unpack(u32(get(bias_gmem + u64(u32(row)) * u64(2))))
        return f32(0)

    return bias_of
