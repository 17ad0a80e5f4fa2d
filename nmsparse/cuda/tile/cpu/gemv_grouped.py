"""The words of :mod:`nmsparse.cuda.kernels.gemv_grouped` on NumPy; those it shares are in :mod:`.gemv`."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np

from .... import reference
from ... import schedule
from . import gemv
from .crew import KernelError
from .gemv import (
    Words,
    check_pitch,
    copy_tokens,
    nothing,
    outputs_of,
    slab_picks,
    sum_words,
    total,
    wait_tokens,
    weight_words,
)
from .overlap import overlapping
from .plan import ends_of

__all__ = ["launch", "make", "plan_words"]


def make(cfg: Any) -> SimpleNamespace:
    """The words for ``cfg``, a :class:`~nmsparse.cuda.config_grouped.GroupedGemvConfig`."""
    words = (
        plan_words(cfg),
        _expert_words(cfg),
        weight_words(cfg),
        _token_words(cfg),
        sum_words(cfg),
        _store_words(cfg),
    )
    tile = {word: function for part in words for word, function in part.items()}
    return overlapping(SimpleNamespace(BLOCKS_A_ROUND=cfg.warps * cfg.batch, **tile))


launch = functools.partial(gemv.launch, make=make)


def plan_words(cfg: Any) -> Words:
    """Tiles of tokens as the plan says, experts side by side."""

    def tiles(plan_gmem: np.ndarray, experts: int, row_tiles: int) -> int:
        return ends_of(cfg, plan_gmem, experts)[1][-1] * row_tiles

    def place(number: int, row_tiles: int, plan_gmem: np.ndarray, experts: int) -> tuple[int, int, int, int]:
        ends, tile_ends = ends_of(cfg, plan_gmem, experts)
        expert = sum(end * row_tiles <= number for end in tile_ends[1:])  # how many have all their tiles before it
        before, after = tile_ends[expert : expert + 2]
        row, token = schedule.place(number - before * row_tiles, row_tiles, after - before, cfg.group)
        return expert, row, ends[expert] + token * cfg.tile_t, ends[expert + 1]

    return {"tiles": tiles, "place": place}


def _expert_words(cfg: Any) -> Words:
    def weights_of(w_gmem: np.ndarray, expert: int, row_blocks: int, k_blocks: int) -> np.ndarray:
        if w_gmem.shape[1:3] != (row_blocks, k_blocks):
            raise KernelError(f"weights_of: blocks are {w_gmem.shape[1:3]}, the kernel says {(row_blocks, k_blocks)}")
        return w_gmem[expert]

    def picks(picks_gmem: np.ndarray, expert: int, slab: int, rows: int, runs: int) -> Any:
        return slab_picks(picks_gmem[expert], slab, rows, runs, cfg.gated)

    return {"number": gemv.number, "weights_of": weights_of, "picks": picks if cfg.pairs else nothing}


def _token_words(cfg: Any) -> Words:
    def sources(rows_gmem: Any, first: int, end: int, x_pitch: int) -> np.ndarray:
        tokens = np.arange(first, min(first + cfg.tile_t, end))
        return (rows_gmem[tokens].astype(np.int64) if cfg.gather else tokens) * x_pitch

    def load_tokens(x_gmem: np.ndarray, sources: np.ndarray, block: int, columns: int) -> None:
        copy_tokens(cfg, x_gmem.reshape(-1)[sources[:, None] + np.arange(columns)], block)

    return {"sources": sources, "load_tokens": load_tokens, "wait_tokens": wait_tokens}


def _store_words(cfg: Any) -> Words:
    act = reference.ACTIVATIONS[cfg.activation]

    def store(y_gmem: np.ndarray, slab: int, first: int, end: int, outputs: int, y_pitch: int) -> None:
        check_pitch(y_gmem, y_pitch)
        for token, output in outputs_of(cfg):
            row, half = divmod(output, cfg.sets)
            if first + token < end and slab * cfg.outputs + output < outputs:
                value = act(total(half, token, row))
                if cfg.gated:
                    value = value * total(half, token, row + 8)
                y_gmem[first + token, slab * cfg.outputs + output] = value

    return {"store": store}
