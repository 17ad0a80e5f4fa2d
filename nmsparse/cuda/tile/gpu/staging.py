"""From registers to Y by a buffer in shared memory, on Numba CUDA: so that whole lines are written.

Token t of the output is a row of memory, but a thread's sums lie along tokens. A staged token has 16 bytes of padding,
so that the tokens of a warp fall on different banks. Threads store: the copy engine would take a row at a time, for
each of which a warp needs some twenty instructions (benchmarks/LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from numba import cuda
from numba.cuda import types

from ...ptx import barrier, matrix, memory
from ...ptx.numba_glue import callable_of
from .cluster import make_owns
from .store import sequence, write_line

__all__ = ["make_stage_pairs", "make_stage_rows", "make_store"]

u32, u64, i32 = types.uint32, types.uint64, types.int32

jit = cuda.jit(device=True, forceinline=True)

_sync = callable_of(barrier.named_barrier(128))
_read, _write = callable_of(memory.load("shared", "u32", 4)), callable_of(memory.store("global", "u32", 4))


def make_store(cfg: Any, outputs: int, stage_of: Callable[[int], Callable[..., None]]) -> Callable[..., None]:
    """``y[token + t, first + m]`` of a warpgroup, ``outputs`` of each token, only before ``end`` and ``rows``.

    ``stage_of(t)(acc, at, thread, extra)`` puts the outputs of the tokens from t on, ``cfg.chunk`` of them, into a
    buffer, where token 0 begins at ``at`` or would. ``cfg.staged_tokens`` have room in each of ``cfg.buffers``; of two,
    one is written while the other is read. CTAs of a cluster store the outputs of their own warps.
    """
    STAGING, STAGING_BYTES, STAGED = cfg.staging_offset, cfg.staging_bytes, cfg.staged_tokens
    PITCH, BUFFERS, PIECES = cfg.staged_token_bytes, cfg.buffers, outputs // 8
    owns = make_owns(cfg)

    def stage_chunk(t):
        stage = stage_of(t)

        @jit
        def part(acc, staging, thread, extra, left):
            if t < left:
                stage(acc, staging, thread, extra)

        return part

    def store_staged(number):
        t = number * STAGED
        tokens, buffer = min(STAGED, cfg.tile_t - t), number % BUFFERS * STAGED * PITCH
        stage_all = sequence([stage_chunk(t + i) for i in range(0, tokens, cfg.chunk)])
        send = _make_send(tokens, outputs, PITCH)
        OCCUPIED = BUFFERS == 1 or number == 0  # others may still read what was staged last

        @jit
        def part(acc, staging, thread, group, extra, y_gmem, first, rows, token, left, pitch):
            if t < left:
                if OCCUPIED:
                    _sync(group)
                stage_all(acc, u32(staging + u32(buffer) - u32(t * PITCH)), thread, extra, left)
                _sync(group)
                send(u32(staging + u32(buffer)), thread, y_gmem, first, rows, i32(token + t), i32(left - t), pitch)

        return part

    store_all = sequence([store_staged(i) for i in range(-(-cfg.tile_t // STAGED))])

    @jit
    def store(acc, ring, thread, group, extra, y_gmem, first, rows, token, end, pitch, cluster):
        if not owns(u32(u32(group - u32(1)) * u32(4) + thread % u32(PIECES) // u32(PIECES // 4)), cluster):
            rows = i32(0)  # what this thread would send is of another CTA's warps
        staging = u32(ring + u32(STAGING) + u32(group - u32(1)) * u32(STAGING_BYTES))
        store_all(acc, staging, thread, group, extra, y_gmem, first, rows, token, i32(end - token), pitch)

    return store


def _make_send(tokens: int, outputs: int, pitch_bytes: int) -> Callable[..., None]:
    """``y[token + t, first + m] = staged[t, m]`` for t before ``left``: 16 bytes a thread where they lie at multiples
    of 16, else less.
    """
    PIECES = outputs // 8  # of a token
    LINES = 128 // PIECES  # tokens at a time

    def send_lines(i):
        @jit
        def part(at, to, left, row_bytes):
            if i < left:
                a, b, c, d = _read(u32(at + u32(i * pitch_bytes)))
                _write(to + u64(i) * row_bytes, a, b, c, d)

        return part

    send_all = sequence([send_lines(i) for i in range(0, tokens, LINES)])

    @jit
    def send(staging, thread, y_gmem, first, rows, token, left, pitch):
        line, piece = u32(thread // u32(PIECES)), u32(thread % u32(PIECES))
        m = i32(first + i32(piece * u32(8)))
        left = i32(min(left, i32(tokens)) - i32(line))
        if m < rows and left > 0:
            at = u32(staging + line * u32(pitch_bytes) + piece * u32(16))
            row_bytes = u64(u32(pitch)) * u64(2)
            to = y_gmem + u64(u32(token + i32(line))) * row_bytes + u64(u32(m)) * u64(2)
            if (rows | pitch) % 8 == 0 and y_gmem % u64(16) == 0:
                send_all(at, to, left, row_bytes)
            else:
                for i in range(i32(0), left, i32(LINES)):
                    a, b, c, d = _read(u32(at + u32(i) * u32(pitch_bytes)))
                    write_line(to + u64(u32(i)) * row_bytes, a, b, c, d, m, rows)

    return send


def make_stage_pairs(cfg: Any, words: Sequence[Callable[..., Any]]) -> Callable[[int], Callable[..., None]]:
    """``stage_of`` for one or two sub-rows of a thread, each with two neighbouring outputs of every token.

    ``words[h](acc, i, extra)`` are those two, packed, of the token whose sum in the lower sub-row has number ``i``.
    """
    PITCH, SLAB, EIGHTS = cfg.staged_token_bytes, 8 * len(words), cfg.chunk // 8
    put = callable_of(memory.store("shared", "u32"))

    def put_word(number, column, half):
        """A word of one of the two tokens of every eight that a thread holds; the upper sub-row is 8 pairs further."""
        FIRST, OFFSET, word = 4 * number + column, (8 * number + column) * PITCH + 32 * half, words[half]

        @jit
        def part(acc, at, extra):
            put(u32(at + u32(OFFSET)), word(acc, FIRST, extra))

        return part

    def stage_of(first):
        eights = range(first // 8, first // 8 + EIGHTS)
        all_words = sequence([put_word(i, c, half) for i in eights for c in range(2) for half in range(len(words))])

        @jit
        def stage(acc, staging, thread, extra):
            warp, lane = u32(thread // u32(32)), u32(thread % u32(32))
            pair = u32(warp * u32(SLAB) + lane // u32(4))
            all_words(acc, u32(staging + lane % u32(4) * u32(2 * PITCH) + pair * u32(4)), extra)

        return stage

    return stage_of


def make_stage_rows(
    cfg: Any, words: Sequence[Callable[..., Any]], block: int = 0
) -> Callable[[int], Callable[..., None]]:
    """``stage_of`` for one or two rows of a thread, each with two neighbouring tokens in every eight.

    ``words[h](acc, i, extra)`` are those two, packed, of the sums from ``i`` on. ``stmatrix.trans`` turns 8×8 pieces;
    the rows of a warpgroup's ``block`` become ``8 * len(words)`` outputs of each of its warps.
    """
    PITCH, CHUNK, HALVES = cfg.staged_token_bytes, cfg.chunk, len(words)
    lower, upper = words[0], words[-1]
    STEP = min(CHUNK, 32 // HALVES)  # tokens that are turned at a time
    COUNT = STEP // 8 * HALVES
    put_1, put_2, put_4 = (callable_of(matrix.stmatrix(count, trans=True)) for count in (1, 2, 4))
    SUMS, ACROSS, EACH = block * cfg.tile_t // 2, block * 64 * HALVES, 4 // HALVES

    @jit
    def word(acc, i, extra):
        return lower(acc, i, extra) if i % 4 == 0 else upper(acc, i, extra)

    def turn(first):
        FIRST = SUMS + first // 2

        @jit
        def part(acc, at, extra):
            to = u32(at + u32(first * PITCH))
            if COUNT == 1:
                put_1(to, word(acc, FIRST, extra))
            elif COUNT == 2:
                put_2(to, word(acc, FIRST, extra), word(acc, FIRST + EACH, extra))
            else:
                put_4(
                    to,
                    word(acc, FIRST, extra),
                    word(acc, FIRST + EACH, extra),
                    word(acc, FIRST + 2 * EACH, extra),
                    word(acc, FIRST + 3 * EACH, extra),
                )

        return part

    def stage_of(first):
        turn_all = sequence([turn(first + i) for i in range(0, CHUNK, STEP)])

        @jit
        def stage(acc, staging, thread, extra):
            # Matrices of a warp: rows 0-7 (and 8-15) of tokens 0-7, then of tokens 8-15, and so on.
            warp, line, number = u32(thread // u32(32)), u32(thread % u32(8)), u32(thread % u32(32) // u32(8))
            token, slab = u32(number // u32(HALVES) * u32(8) + line), u32(warp * u32(HALVES) + number % u32(HALVES))
            turn_all(acc, u32(staging + token * u32(PITCH) + slab * u32(16) + u32(ACROSS)), extra)

        return stage

    return stage_of
