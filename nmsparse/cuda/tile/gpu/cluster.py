"""``reduce_scatter`` on Numba CUDA: the CTAs of a cluster add up their sums through each other's shared memory.

A warp's sums are added by the CTA that owns the warp, and stored by it. They come into the ring, which nobody needs any
more: for each warp of the owner's the sums of its ``cluster - 1`` peers, in the order of their ranks from the owner's
on; a barrier counts their bytes. Source: PTX ISA, "mapa", "st.async", "barrier.cluster".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from ... import schedule
from ...ptx import barrier, memory
from ...ptx.numba_glue import callable_of
from .numbers import read_thread
from .store import make_add, sequence

__all__ = ["cluster_words", "make_owns"]

u32, i32 = types.uint32, types.int32

jit = cuda.jit(device=True, forceinline=True)

owner_of, first_warp = schedule.owner_of, schedule.first_warp
_rank = callable_of(memory.cluster_rank)


def make_owns(cfg: Any) -> Callable[..., Any]:
    """``owns(warp, cluster)``: whether this CTA stores the outputs of consumer warp ``warp``."""
    SHARES, WARPS = bool(cfg.clusters), 4 * cfg.warpgroups

    @jit
    def owns(warp, cluster):
        return not SHARES or cluster == 1 or u32(owner_of(warp, u32(cluster), u32(WARPS))) == _rank()

    return owns


def cluster_words(cfg: Any) -> dict[str, Callable[..., Any]]:
    """``reduce_scatter`` for ``cfg``."""
    WARPS, QUADS, ARRIVED = 4 * cfg.warpgroups, cfg.sums // 4, cfg.sums_barrier
    SUMS_BYTES = QUADS * 512  # of a warp
    arrive, wait = callable_of(barrier.cluster_arrive_relaxed), callable_of(barrier.cluster_wait)
    expect_bytes, wait_bytes = callable_of(barrier.expect_bytes), callable_of(barrier.wait)
    map_shared, send = callable_of(memory.map_shared), callable_of(memory.store_async)
    get = callable_of(memory.load("shared", "f32", 4))

    def send_quad(i):
        @jit
        def part(acc, at, arrived):
            send(u32(at + u32(i * 512)), acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3], arrived)

        return part

    send_all, add_all = sequence([send_quad(i) for i in range(QUADS)]), make_add(QUADS, get, 512, u32)

    @jit
    def warps_before(rank, cluster):
        return u32(first_warp(u32(rank), u32(cluster), u32(WARPS)))

    @jit
    def reduce_scatter(acc, ring, cluster):
        thread, mine, arrived = read_thread(), _rank(), u32(ring + u32(ARRIVED))
        warp, peers = u32(thread // u32(32) - u32(4)), u32(u32(cluster) - u32(1))
        owner = u32(owner_of(warp, u32(cluster), u32(WARPS)))
        at = u32(warp - warps_before(owner, cluster)) * peers * u32(SUMS_BYTES)
        at = u32(ring + at + thread % u32(32) * u32(16))
        if thread == u32(128):
            warps = u32(warps_before(mine + u32(1), cluster) - warps_before(mine, cluster))
            expect_bytes(arrived, u32(warps * peers * u32(SUMS_BYTES)))
        arrive()
        wait()  # no CTA of the cluster needs its ring any more
        if mine != owner:
            before = u32(mine - owner) if mine > owner else u32(mine + u32(cluster) - owner)
            to = u32(at + u32(before - u32(1)) * u32(SUMS_BYTES))
            send_all(acc, map_shared(to, owner), map_shared(arrived, owner))
        else:
            wait_bytes(arrived, u32(0))  # acquires for the CTA; loads of shared memory need no more
            for peer in range(i32(0), i32(peers)):
                add_all(acc, u32(at + u32(peer) * u32(SUMS_BYTES)))

    return {"reduce_scatter": reduce_scatter}
