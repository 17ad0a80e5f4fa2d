"""The routing of a sparse MoE layer on a GPU, in one launch: from router logits or given ids to the plan of a product.

What a grouped product needs is written to memory that is sized for the worst case, so that the host never waits and a
CUDA graph serves every routing. The kernels are in :mod:`nmsparse.cuda.kernels.route`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from ..errors import NMSparseError
from . import launch
from .config_route import EXPERT_BITS, FEW_THREADS, EndsConfig

__all__ = ["Copy", "Dispatch", "Route", "Sorted", "counters", "plan_of_ends"]

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


class Sorted(NamedTuple):
    """Addresses of what a launch writes when it sorts; of S = tokens·k slots, and of the counters it needs.

    ============  ==================  ==============================================================================
    ``slots``     int32 (tokens, k)   position of each slot in the order by expert
    ``rows``      int32 (S,)          token of each position
    ``plan``      int32 (2, E)        cumulative ends of the experts' positions, and of their tiles of ``tile_t``
    ``counters``  int32               as many zeros as :func:`counters` says, for launches that follow each other
    ``order``     int32 (E,)          with ``config.kept``, which is read: experts as the plan has them, dropped ones
                                      last; the plan is then (kept + 1, 2), see :mod:`nmsparse.cuda.kernels.route`
    ============  ==================  ==============================================================================

    Positions within an expert may come in another order in every run.
    """

    slots: int
    rows: int
    plan: int
    counters: int
    order: int = 0


class Copy(NamedTuple):
    """With ``config.copies``: rows of ``x``, ``x_pitch`` elements of 2 bytes apart, go to ``x_sorted (S, 8·pieces)`` in
    the order of the positions."""

    x: int = 0
    x_sorted: int = 0
    x_pitch: int = 0
    pieces: int = 0


NO_COPY = Copy()


class _Launch:
    """A config on a device; its kernels are loaded when a number of tokens first asks for one."""

    def __init__(self, config: Any, device: int):
        if problems := config.problems():
            raise NMSparseError(f"{config}: {'; '.join(problems)}")
        self.config, self.device, self.sms = config, device, launch.model_of(device).sms
        self._kernels: dict[int, tuple[Any, int]] = {}

    def _run(
        self,
        stream: int,
        work: int,
        head: tuple[int, ...],
        to: Sorted,
        tokens: int,
        tile_t: int,
        copy: Copy,
        *last: int,
    ) -> None:
        """Launch for ``work`` warps' worth of tokens; ``head`` and ``last`` are arguments that only one kind has."""
        slots = tokens * self.config.top_k
        if tokens >= MAX_TOKENS or slots >= 1 << 30:
            raise NMSparseError(f"route: expected fewer than {MAX_TOKENS} tokens and 2**30 slots, got {tokens} tokens")
        threads = FEW_THREADS if 32 * work <= FEW_THREADS else self.config.most_threads
        if threads not in self._kernels:
            config = replace(self.config, threads=threads, overlaps=launch.overlaps(self.device))
            self._kernels[threads] = launch.kernel_of(config, self.device), config.chunk
        kernel, chunk = self._kernels[threads]
        alone = work <= TOKENS_OF_A_WARP * threads // 32 and not self.config.copies
        grid = 1 if alone else max(1, min(self.sms, -(-slots // chunk)))
        kernel(grid, stream, *head, *to, copy.x, copy.x_sorted, tokens, tile_t, copy.x_pitch, copy.pieces, *last)


class Route(_Launch):
    """Routes tokens from their logits and sorts them by expert: ``Route(config, device)(stream, …)``, one launch.

    Reads ``logits (tokens, E)`` of ``config.dtype``, rows ``pitch`` elements apart, and with ``config.bias`` a float32
    ``bias (E,)``; all are addresses. Writes ``ids`` int32 and ``weights`` float32 ``(tokens, k)``: the experts of each
    token by descending weight and these weights, as :func:`nmsparse.moe.route` says, to a few ulp.

    Does not allocate and does not wait; up to one CTA an SM, all at the same time. A NaN among the logits of a token
    makes its weights NaN, and its experts arbitrary.
    """

    def __call__(
        self,
        stream: int,
        logits: int,
        pitch: int,
        bias: int,
        ids: int,
        weights: int,
        to: Sorted,
        tokens: int,
        tile_t: int,
        copy: Copy = NO_COPY,
    ) -> None:
        self._run(stream, tokens, (logits, bias, ids, weights), to, tokens, tile_t, copy, pitch)


class Dispatch(_Launch):
    """Sorts a given routing by expert: ``Dispatch(config, device)(stream, …)``, one launch.

    Reads ``ids (tokens, k)`` and, unless they are float32 already, ``given (tokens, k)``, the weights, of which it then
    writes ``weights`` in float32. An id outside of 0..E-1 is dropped: its slot is -1, and fewer rows are written.
    """

    def __call__(
        self,
        stream: int,
        ids: int,
        given: int,
        weights: int,
        to: Sorted,
        tokens: int,
        tile_t: int,
        copy: Copy = NO_COPY,
    ) -> None:
        work = -(-tokens * self.config.top_k // 32)
        self._run(stream, work, (ids, given, weights), to, tokens, tile_t, copy)
