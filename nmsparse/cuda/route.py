"""The routing of a sparse MoE layer on a GPU, in one launch: from router logits or given ids to the plan of a product.

What a grouped product needs is written to memory that is sized for the worst case, so that the host never waits and a
CUDA graph serves every routing. The kernels are in :mod:`nmsparse.cuda.kernels.route`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..errors import NMSparseError
from . import launch
from .config_route import EXPERT_BITS, FEW_THREADS, EndsConfig

__all__ = ["Dispatch", "Route", "counters", "plan_of_ends"]

MAX_TOKENS = 1 << 32 - EXPERT_BITS
TOKENS_OF_A_WARP = 2  # as many as one CTA takes before there are others: meeting them costs as much


def plan_of_ends(experts: int, ids: str, device: int, stream: int, ends: int, plan: int, tile_t: int) -> None:
    """The plan of ``ends (E,)`` of ``ids`` on the device: ``[ends, cumulative tiles of tile_t]``, int32 ``(2, E)``."""
    launch.kernel_of(EndsConfig(experts, ids), device)(1, stream, ends, plan, tile_t)


def counters(experts: int) -> int:
    """How many int32 counters a launch needs: zero before it, zero again after it, and its stream's alone.

    >>> counters(64)
    66
    """
    return experts + 2  # how many CTAs have arrived, and left


class _Launch:
    """A config on a device; its kernels are loaded when a number of tokens first asks for one."""

    def __init__(self, config: Any, device: int):
        if problems := config.problems():
            raise NMSparseError(f"{config}: {'; '.join(problems)}")
        self.config, self.device, self.sms = config, device, launch.model_of(device).sms
        self._kernels: dict[int, Any] = {}

    def _kernel(self, tokens: int, work: int) -> tuple[Any, int]:
        """The kernel and the number of CTAs for ``work`` warps' worth of tokens."""
        if tokens >= MAX_TOKENS or tokens * self.config.top_k >= 1 << 30:
            raise NMSparseError(f"route: expected fewer than {MAX_TOKENS} tokens and 2**30 slots, got {tokens} tokens")
        threads = FEW_THREADS if 32 * work <= FEW_THREADS else self.config.most_threads
        kernel = self._kernels.get(threads)
        if kernel is None:
            kernel = self._kernels[threads] = launch.kernel_of(replace(self.config, threads=threads), self.device)
        warps = threads // 32
        return kernel, 1 if work <= TOKENS_OF_A_WARP * warps else min(self.sms, -(-work // warps))


class Route(_Launch):
    """Routes tokens from their logits and sorts them by expert: ``Route(config, device)(stream, …)``, one launch.

    Reads ``logits (tokens, E)`` of ``config.dtype``, rows ``pitch`` elements apart, and with ``config.bias`` a float32
    ``bias (E,)``; all are addresses. Writes, with S = tokens·k slots:

    =============  ==================  =============================================================================
    ``ids``        int32 (tokens, k)   the experts of each token, by descending weight
    ``weights``    float32 (tokens,k)  theirs, as :func:`nmsparse.moe.route` says, to a few ulp
    ``slots``      int32 (tokens, k)   position of each slot in the order by expert
    ``rows``       int32 (S,)          token of each position
    ``plan``       int32 (2, E)        cumulative ends of the experts' positions, and of their tiles of ``tile_t``
    =============  ==================  =============================================================================

    ``counters`` are :func:`counters` int32 zeros, for launches that follow each other. Positions within an expert may
    come in another order in every run. Does not allocate and does not wait; up to one CTA an SM, all at the same time.
    A NaN among the logits of a token makes its weights NaN, and its experts arbitrary.
    """

    def __call__(
        self,
        stream: int,
        logits: int,
        pitch: int,
        bias: int,
        ids: int,
        weights: int,
        slots: int,
        rows: int,
        plan: int,
        counters: int,
        tokens: int,
        tile_t: int,
    ) -> None:
        kernel, grid = self._kernel(tokens, tokens)
        kernel(grid, stream, logits, bias, ids, weights, slots, rows, plan, counters, tokens, tile_t, pitch)


class Dispatch(_Launch):
    """Sorts a given routing by expert: ``Dispatch(config, device)(stream, …)``, one launch.

    Reads ``ids (tokens, k)`` and, unless they are float32 already, ``given (tokens, k)``, the weights, of which it then
    writes ``weights`` in float32. The other outputs are those of :class:`Route`, but an id outside of 0..E-1 is
    dropped: its slot is -1, and fewer rows are written. With ``config.copies`` the rows of ``x``, ``x_pitch`` elements
    apart, go to ``x_sorted (S, 8·pieces)`` in the order of the positions, 16 bytes at a time.
    """

    def __call__(
        self,
        stream: int,
        ids: int,
        given: int,
        weights: int,
        slots: int,
        rows: int,
        plan: int,
        counters: int,
        tokens: int,
        tile_t: int,
        x: int = 0,
        x_sorted: int = 0,
        x_pitch: int = 0,
        pieces: int = 0,
    ) -> None:
        number = tokens * self.config.top_k
        kernel, grid = self._kernel(tokens, -(-number // 32))
        if self.config.copies:
            grid = max(1, min(self.sms, -(-number // self.config.chunk)))
        sizes = tokens, tile_t, x_pitch, pieces
        kernel(grid, stream, ids, given, weights, slots, rows, plan, counters, x, x_sorted, *sizes)
