"""The last step of a sparse MoE layer: each token gathers and adds the rows that its experts made of it."""

from __future__ import annotations

from typing import Any

__all__ = ["make_combine"]


def make_combine(tile: Any, cfg: Any) -> Any:
    """``y[t] = Σ_j weights[t, j] · d[slots[t, j]] + base[t]`` for every token, slots below 0 left out.

    fp32 sums in the order of j, ``base`` last, rounded once. ``d``, ``base`` and ``y`` are f16 or bf16, rows at their
    pitches. A thread has a piece of eight columns of one token, and a batch of its rows under way at a time.
    """
    TOP_K, BATCH, BASE = cfg.top_k, cfg.batch, cfg.base

    def combine(
        d_gmem, slots_gmem, weights_gmem, base_gmem, y_gmem,
        tokens, columns, pieces, d_pitch, base_pitch, y_pitch,
    ):  # fmt: skip
        token, piece, exists = tile.place(tokens, pieces)
        column, left = piece * 8, columns - piece * 8
        sums = tile.zeros()
        tile.await_previous()
        tile.begin_next()
        for first in range(0, TOP_K, BATCH):
            slots = tile.load_slots(slots_gmem, token, first)
            weights = tile.load_weights(weights_gmem, token, first, slots)
            rows = tile.load_rows(d_gmem, slots, d_pitch, column, left)
            sums = tile.add_rows(sums, weights, rows)
        if BASE:
            sums = tile.add(sums, tile.load_row(base_gmem, token, base_pitch, column, left))
        tile.store_row(y_gmem, token, y_pitch, column, tile.round(sums), tile.choose(exists, left, 0))

    return combine
