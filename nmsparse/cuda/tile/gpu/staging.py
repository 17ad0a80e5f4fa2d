"""From staging buffers in shared memory to Y on Numba CUDA: the copy engine stores while the next tile is multiplied.

A staged token has 16 bytes of padding, so that the tokens of a warp fall on different banks.
"""

from __future__ import annotations

from collections.abc import Callable

from numba import cuda
from numba.cuda import types

from ...ptx import barrier, copy, memory
from ...ptx.numba_glue import callable_of
from .store import write_line

__all__ = ["begin_staging", "finish_stores", "make_send", "read_thread"]

u32, u64, i32 = types.uint32, types.uint64, types.int32

jit = cuda.jit(device=True, forceinline=True)

_sync, _wait_read = callable_of(barrier.named_barrier(128)), callable_of(copy.bulk_wait_read)
_fence, _send, _commit = (
    callable_of(memory.fence_proxy_async),
    callable_of(copy.bulk_store),
    callable_of(copy.bulk_commit),
)
_read = callable_of(memory.load("shared", "u32", 4))
_read_thread = callable_of(memory.read_again("tid.x"))


@jit
def read_thread():
    """Number of the thread, read anew: what hangs on it takes no registers during the products."""
    return i32(_read_thread())


@jit
def finish_stores():
    _wait_read()


@jit
def begin_staging(group):
    """Until what the warpgroup staged before has left the buffer."""
    _wait_read()
    _sync(u32(group))


def make_send(tokens: int, outputs: int, pitch_bytes: int) -> Callable[..., None]:
    """``y[token + t, first + m] = staged[t, m]`` for ``t < tokens`` and ``m < outputs``, before ``end`` and ``rows``.

    By whole rows where they lie at multiples of 16 bytes, else by elements.
    """
    PIECES = outputs // 8

    @jit
    def send(staging, thread, group, y_gmem, first, rows, token, end, pitch):
        _fence()
        _sync(u32(group))
        if first < rows:
            if (rows | pitch) % 8 == 0 and y_gmem % u64(16) == 0:
                size = u32(min(outputs, rows - first) * 2)
                for t in range(thread, min(tokens, end - token), 128):
                    to = y_gmem + (u64(token + t) * u64(pitch) + u64(first)) * u64(2)
                    _send(to, staging + u32(t * pitch_bytes), size)
                _commit()
            else:
                for piece in range(thread, tokens * PIECES, 128):
                    t, m = token + piece // PIECES, first + piece % PIECES * 8
                    if t < end and m < rows:
                        a, b, c, d = _read(staging + u32(piece // PIECES * pitch_bytes + piece % PIECES * 16))
                        write_line(y_gmem + (u64(t) * u64(pitch) + u64(m)) * u64(2), a, b, c, d, m, rows)

    return send
