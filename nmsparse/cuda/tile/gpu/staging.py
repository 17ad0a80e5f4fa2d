"""From registers to Y by a buffer in shared memory, on Numba CUDA: so that whole lines are written.

A staged token has 16 bytes of padding, so that the tokens of a warp fall on different banks. Threads store: the copy
engine would take a row at a time, for each of which a warp needs some twenty instructions (benchmarks/LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from ...ptx import barrier, memory
from ...ptx.numba_glue import callable_of
from .store import sequence, write_line

__all__ = ["make_store", "read_thread"]

u32, u64, i32 = types.uint32, types.uint64, types.int32

jit = cuda.jit(device=True, forceinline=True)

_sync = callable_of(barrier.named_barrier(128))
_read, _write = callable_of(memory.load("shared", "u32", 4)), callable_of(memory.store("global", "u32", 4))
_read_thread = callable_of(memory.read_again("tid.x"))


@jit
def read_thread():
    """Number of the thread, read anew: what hangs on it takes no registers during the products."""
    return i32(_read_thread())


def make_store(cfg: Any, outputs: int, stage_of: Callable[[int], Callable[..., None]]) -> Callable[..., None]:
    """``y[token + t, first + m]`` of a warpgroup, ``outputs`` of each token, only before ``end`` and ``rows``.

    ``stage_of(t)(acc, at, thread, extra)`` puts the outputs of the tokens from t on, ``cfg.chunk`` of them, into the
    buffer, where token 0 begins at ``at`` or would. ``cfg.staged_tokens`` have room at a time.
    """
    STAGING, STAGING_BYTES, STAGED = cfg.staging_offset, cfg.staging_bytes, cfg.staged_tokens
    PITCH = cfg.staged_token_bytes

    def stage_chunk(t):
        stage = stage_of(t)

        @jit
        def part(acc, staging, thread, extra, left):
            if t < left:
                stage(acc, staging, thread, extra)

        return part

    def store_staged(t):
        tokens = min(STAGED, cfg.tile_t - t)
        stage_all = sequence([stage_chunk(t + i) for i in range(0, tokens, cfg.chunk)])
        send = _make_send(tokens, outputs, PITCH)

        @jit
        def part(acc, staging, thread, group, extra, y_gmem, first, rows, token, end, pitch):
            if t < end - token:
                _sync(u32(group))  # the buffer has been read
                stage_all(acc, staging - u32(t * PITCH), thread, extra, end - token)
                _sync(u32(group))
                send(staging, thread, y_gmem, first, rows, token + t, end, pitch)

        return part

    store_all = sequence([store_staged(t) for t in range(0, cfg.tile_t, STAGED)])

    @jit
    def store(acc, ring, thread, group, extra, y_gmem, first, rows, token, end, pitch):
        staging = ring + u32(STAGING + (group - 1) * STAGING_BYTES)
        store_all(acc, staging, thread, group, extra, y_gmem, first, rows, token, end, pitch)

    return store


def _make_send(tokens: int, outputs: int, pitch_bytes: int) -> Callable[..., None]:
    """``y[token + t, first + m] = staged[t, m]``: 16 bytes a thread where they lie at multiples of 16, else less."""
    PIECES = outputs // 8  # of a token
    LINES = 128 // PIECES  # tokens at a time

    def send_lines(i):
        @jit
        def part(at, to, left, pitch):
            if i < left:
                a, b, c, d = _read(at + u32(i * pitch_bytes))
                _write(to + u64(i) * u64(pitch * 2), a, b, c, d)

        return part

    send_all = sequence([send_lines(i) for i in range(0, tokens, LINES)])

    @jit
    def send(staging, thread, y_gmem, first, rows, token, end, pitch):
        line, m = thread // PIECES, first + thread % PIECES * 8
        left = min(end - token, tokens) - line
        if m < rows:
            at = staging + u32(line * pitch_bytes + thread % PIECES * 16)
            to = y_gmem + (u64(token + line) * u64(pitch) + u64(m)) * u64(2)
            if (rows | pitch) % 8 == 0 and y_gmem % u64(16) == 0:
                send_all(at, to, left, pitch)
            else:
                for i in range(0, left, LINES):
                    a, b, c, d = _read(at + u32(i * pitch_bytes))
                    write_line(to + u64(i) * u64(pitch * 2), a, b, c, d, m, rows)

    return send
