"""The vocabulary of passes over memory, on Numba CUDA. :mod:`~nmsparse.cuda.tile.cpu.elements` is its NumPy twin.

A *piece* is 16 bytes, eight numbers of 16 bits in four registers. Offsets are in bytes, indices in elements.

===================================  ==================================================================================
``place() -> b, s, g, p``            this thread: block number, 16-row slab, row g < 8 of the slab (and g + 8), piece p
``unravel(b, down, along)``          expert, row of blocks, block of the row, of a block number
``load_16(gmem, at, inside)``        a piece; zeros where not ``inside``
``load_2(gmem, at, inside, other)``  a 16-bit word; ``other`` where not ``inside``
``store_16/4/2(gmem, at, v, in)``    nothing where not inside
``load_columns(gmem, index, left)``  eight numbers, of which the first ``left`` exist and the others are zeros
``store_columns(gmem, i, v, left)``  the first ``left`` of eight numbers
``keep_two(low, high) -> v, p``      the two largest of four numbers, in order, and their positions, two bits each
``spread(v, word, g) -> low, high``  the inverse, for group g of a metadata word
``word(p, q, r, s)``                 four groups' positions as a metadata word; ``halves(p, q)``: two words as one
``choose(c, a, b)``                  ``a if c else b``
``inline``                           makes a helper of the text callable
===================================  ==================================================================================
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from numba import cuda
from numba.cuda import libdevice, types

from ... import layout
from ...ptx import memory
from ...ptx.numba_glue import callable_of, teach

__all__ = ["make"]

u16, u32, u64, i32, i64 = types.uint16, types.uint32, types.uint64, types.int32, types.int64

jit = cuda.jit(device=True, forceinline=True)

teach(layout.value_offset)
teach(layout.meta_offset)
INFINITY = {"f16": 0x7C00, "bf16": 0x7F80}


def make(cfg: Any) -> ModuleType:
    """The words for ``cfg``, a :class:`~nmsparse.cuda.pack.PackConfig`, as a module that a kernel text receives."""
    tile = ModuleType("elements")
    for part in (_place_words, _memory_words, _column_words, _bit_words):
        for word, function in part(cfg).items():
            setattr(tile, word, function)
    tile.inline = jit
    return tile


def _place_words(cfg: Any) -> dict[str, Any]:
    THREADS = cfg.threads
    divide = callable_of(memory.divide)

    @jit
    def place():
        thread = u32(cuda.blockIdx.x) * u32(THREADS) + u32(cuda.threadIdx.x)
        slab, group, piece = thread >> u32(5) & u32(3), thread >> u32(2) & u32(7), thread & u32(3)
        return i32(thread >> u32(7)), i32(slab), i32(group), i32(piece)

    @jit
    def unravel(block, row_blocks, k_blocks):
        stripe = i32(divide(block, k_blocks))
        expert = i32(divide(stripe, row_blocks))
        return expert, stripe - expert * row_blocks, block - stripe * k_blocks

    @jit
    def choose(condition, a, b):
        return a if condition else b

    return {"place": place, "unravel": unravel, "choose": choose}


def _memory_words(cfg: Any) -> dict[str, Any]:
    get_16 = callable_of(memory.load("global", "u32", 4, hint="nc"))
    get_2 = callable_of(memory.load("global", "u16", hint="nc"))
    put_16, put_4 = callable_of(memory.store("global", "u32", 4)), callable_of(memory.store("global", "u32"))
    put_2 = callable_of(memory.store("global", "u16"))

    # What is not inside is read at the start of the array instead: a select, where a branch would hold up later loads.
    @jit
    def load_16(gmem, at, inside):
        a, b, c, d = get_16(gmem + u64(at if inside else 0))
        zero = u32(0)
        return a if inside else zero, b if inside else zero, c if inside else zero, d if inside else zero

    @jit
    def load_2(gmem, at, inside, otherwise):
        return u32(get_2(gmem + u64(at if inside else 0)) if inside else otherwise)

    @jit
    def store_16(gmem, at, piece, inside):
        if inside:
            put_16(gmem + u64(at), piece[0], piece[1], piece[2], piece[3])

    @jit
    def store_4(gmem, at, word, inside):
        if inside:
            put_4(gmem + u64(at), word)

    @jit
    def store_2(gmem, at, word, inside):
        if inside:
            put_2(gmem + u64(at), u16(word))

    return {"load_16": load_16, "load_2": load_2, "store_16": store_16, "store_4": store_4, "store_2": store_2}


def _column_words(cfg: Any) -> dict[str, Any]:
    words = _memory_words(cfg)
    load_16, load_2, store_16, store_2 = (words[name] for name in ("load_16", "load_2", "store_16", "store_2"))

    if cfg.aligned:  # rows start at multiples of 16 bytes, so a piece exists as a whole or not at all

        @jit
        def load_columns(gmem, index, left):
            return load_16(gmem, i64(index) * 2, left >= 8)

        @jit
        def store_columns(gmem, index, piece, left):
            store_16(gmem, i64(index) * 2, piece, left >= 8)

    else:

        @jit
        def load_pair(gmem, index, left):
            low = load_2(gmem, i64(index) * 2, left >= 1, 0)
            return u32(low | load_2(gmem, i64(index) * 2 + 2, left >= 2, 0) << u32(16))

        @jit
        def load_columns(gmem, index, left):
            a, b = load_pair(gmem, index, left), load_pair(gmem, index + 2, left - 2)
            return a, b, load_pair(gmem, index + 4, left - 4), load_pair(gmem, index + 6, left - 6)

        @jit
        def store_pair(gmem, index, pair, left):
            store_2(gmem, i64(index) * 2, pair & u32(0xFFFF), left >= 1)
            store_2(gmem, i64(index) * 2 + 2, pair >> u32(16), left >= 2)

        @jit
        def store_columns(gmem, index, piece, left):
            store_pair(gmem, index, piece[0], left)
            store_pair(gmem, index + 2, piece[1], left - 2)
            store_pair(gmem, index + 4, piece[2], left - 4)
            store_pair(gmem, index + 6, piece[3], left - 6)

    return {"load_columns": load_columns, "store_columns": store_columns}


def _bit_words(cfg: Any) -> dict[str, Any]:
    LARGEST = INFINITY[cfg.dtype]

    @jit
    def rank(bits, position):
        """Orders numbers by magnitude, a NaN like infinity, equal ones by position: no two ranks are equal."""
        return u32(min(u32(bits & u32(0x7FFF)), u32(LARGEST)) << u32(2) | u32(3 - position))

    @jit
    def keep_two(low, high):
        a, b, c, d = rank(low, 0), rank(low >> u32(16), 1), rank(high, 2), rank(high >> u32(16), 3)
        left, right = max(a, b), max(c, d)
        best = max(left, right)
        second = max(min(left, right), max(min(a, b), min(c, d)))
        i, j = u32(3) - u32(best & u32(3)), u32(3) - u32(second & u32(3))
        first, last = u32(min(i, j)), u32(max(i, j))
        # Bytes 2p and 2p + 1 of the eight, for both positions.
        kept = libdevice.byte_perm(i32(low), i32(high), i32(0x1010 + first * u32(0x22) + last * u32(0x2200)))
        return u32(kept), u32(first | last << u32(2))

    @jit
    def spread(pair, word, group):
        positions = u32(word) >> u32(4 * group)
        first, last = positions & u32(3), positions >> u32(2) & u32(3)
        wide = u64(pair & u32(0xFFFF)) << u64(16 * first) | u64(pair >> u32(16)) << u64(16 * last)
        return u32(wide & u64(0xFFFFFFFF)), u32(wide >> u64(32))

    @jit
    def word(p, q, r, s):
        return u32(p | q << u32(4) | r << u32(8) | s << u32(12))

    @jit
    def halves(p, q):
        return u32(p | q << u32(16))

    return {"keep_two": keep_two, "spread": spread, "word": word, "halves": halves}
