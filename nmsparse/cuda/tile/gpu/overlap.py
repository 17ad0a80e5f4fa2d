"""Launches that overlap, on Numba CUDA: a kernel may begin while the one before it still runs, but waits for its end.

``await_previous()``
    Until the launch before this one is complete: what it wrote can be read, what it read may be overwritten. Every
    thread says so before it reads or writes global memory.
``begin_next()``
    The next launch may begin, once all CTAs have said so. After ``await_previous``: then no more than two overlap.

Both mean nothing unless ``cfg.overlaps``. What the previous launch may have written must not be read as ``.nc``, which
promises that nobody writes it while the kernel lives (PTX ISA, "ld"). Why a chain of such launches is in order, says
:func:`nmsparse.cuda.launch.overlaps`; the twin is :mod:`~nmsparse.cuda.tile.cpu.overlap`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda

from ...ptx import barrier
from ...ptx.numba_glue import callable_of

__all__ = ["overlap_words"]

jit = cuda.jit(device=True, forceinline=True)


def overlap_words(cfg: Any) -> dict[str, Callable[..., Any]]:
    """``await_previous`` and ``begin_next`` for ``cfg``."""
    OVERLAPS = cfg.overlaps
    wait, launch = callable_of(barrier.grid_wait), callable_of(barrier.grid_launch)

    @jit
    def await_previous():
        if OVERLAPS:
            wait()

    @jit
    def begin_next():
        if OVERLAPS:
            launch()

    return {"await_previous": await_previous, "begin_next": begin_next}
