"""Who a thread is, on Numba CUDA: numbers of 32 bits without a sign.

Numba gives the thread's number as a signed one, and the compiler, which does not know that it is never negative,
divides it as Python does: fifteen instructions of 64 bits where a shift would do.
"""

from __future__ import annotations

from numba import cuda
from numba.cuda import types

from ...ptx import memory
from ...ptx.numba_glue import callable_of

__all__ = [
    "cta_count",
    "cta_number",
    "lane_number",
    "read_consumer",
    "read_thread",
    "row_of",
    "thread_number",
    "warp_number",
]

u32 = types.uint32

jit = cuda.jit(device=True, forceinline=True)

_read_thread = callable_of(memory.read_again("tid.x"))


@jit
def thread_number():
    """Number of the thread in its CTA."""
    return u32(cuda.threadIdx.x)


@jit
def lane_number():
    """Number of the thread in its warp."""
    return u32(u32(cuda.threadIdx.x) % u32(32))


@jit
def warp_number():
    """Number of the warp in its CTA."""
    return u32(u32(cuda.threadIdx.x) // u32(32))


@jit
def cta_number():
    """Number of the CTA."""
    return u32(cuda.blockIdx.x)


@jit
def cta_count():
    """How many CTAs there are."""
    return u32(cuda.gridDim.x)


@jit
def read_thread():
    """Number of the thread, read anew: what hangs on it takes no registers during the products."""
    return u32(_read_thread() & u32(1023))


@jit
def read_consumer():
    """The thread's warpgroup, of which the consumers' begin at 1, and its number there, read anew."""
    number = read_thread()
    return u32(number // u32(128)), u32(number % u32(128))


@jit
def row_of(thread):
    """The first of the two rows, of 64 for each warpgroup, whose sums ``thread`` holds; the other is 8 further."""
    return u32(thread // u32(32) * u32(16) + thread % u32(32) // u32(4))
