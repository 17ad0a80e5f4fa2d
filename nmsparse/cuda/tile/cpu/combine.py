"""The words of :mod:`nmsparse.cuda.kernels.combine` on NumPy, all threads at once, with those of ``elements``.

Memory is checked as there: an access outside its array, an address that is not a multiple of its size, and a place
that is stored twice raise.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from . import elements
from .overlap import overlapping

__all__ = ["make", "run"]


def run(make_kernel: Any, cfg: Any, grid: int, *arguments: Any) -> None:
    """Launch a kernel text on ``grid`` blocks; arrays among the arguments are its memory."""
    elements.run(make_kernel, cfg, grid, *arguments, words=make)


def make(cfg: Any, grid: int) -> SimpleNamespace:
    """The words for ``cfg`` and a launch of ``grid`` blocks."""
    tile = elements.make(cfg, grid)
    thread = np.arange(grid * cfg.threads)
    everyone, dtype = np.ones(thread.size, bool), elements.DTYPES[cfg.dtype]

    def numbers(piece):
        """``(threads, 8)`` numbers of four registers."""
        return np.stack(piece, axis=1).view(dtype).astype(np.float64)

    def place(tokens, pieces):
        return np.minimum(thread // pieces, tokens - 1), thread % pieces, thread // pieces < tokens

    def load_slots(gmem, token, first):
        inside = [everyone & (first + i < cfg.top_k) for i in range(cfg.batch)]
        loads = [gmem.load((token * cfg.top_k + first + i) * 4, 4, inside[i]) for i in range(cfg.batch)]
        return tuple(np.where(c, slot.view(np.int32)[:, 0], -1) for c, slot in zip(inside, loads, strict=True))

    def load_weights(gmem, token, first, slots):
        places = [(token * cfg.top_k + first + i) * 4 for i in range(cfg.batch)]
        return tuple(gmem.load(at, 4, slot >= 0).view(np.float32)[:, 0] for at, slot in zip(places, slots, strict=True))

    def load_row(gmem, row, pitch, column, left):
        return tile.load_columns(gmem, row.astype(np.int64) * pitch + column, left)

    def load_rows(gmem, rows, pitch, column, left):
        return tuple(load_row(gmem, row, pitch, column, np.where(row >= 0, left, 0)) for row in rows)

    def store_row(gmem, row, pitch, column, piece, left):
        tile.store_columns(gmem, row.astype(np.int64) * pitch + column, piece, left)

    def zeros():
        return np.zeros((thread.size, 8), np.float32)

    def add(sums, piece):
        return (sums + numbers(piece)).astype(np.float32)

    def add_rows(sums, weights, rows):
        for weight, row in zip(weights, rows, strict=True):
            sums = (sums + weight.astype(np.float64)[:, None] * numbers(row)).astype(np.float32)
        return sums

    def round_(sums):
        with np.errstate(over="ignore"):
            return tuple(sums.astype(dtype).view(np.uint32).T)

    words = place, load_slots, load_weights, load_row, load_rows, store_row, zeros, add, add_rows
    return overlapping(SimpleNamespace(**vars(tile) | {word.__name__: word for word in words} | {"round": round_}))
