"""The grouped product with few tokens: each expert that has any is read once, for all of them."""

from __future__ import annotations

from typing import Any

__all__ = ["make_gemv_grouped"]


def make_gemv_grouped(tile: Any, cfg: Any) -> Any:
    """``Y[s] = act(W[e] · X[rows[s]])`` for the positions s of every expert e; W 2:4 or Samoyeds 1:2.

    In NumPy: ``for e: s = slice(ends[e - 1], ends[e]); Y[s] = act(X[rows[s]] @ W[e].T)``.

    A CTA owns 16 packed rows of one expert and up to ``cfg.tile_t`` of its tokens; else it is
    :mod:`~nmsparse.cuda.kernels.gemv`. Experts without tokens are not in the plan; CTAs beyond its end do nothing.
    """

    def gemv_grouped(
        w_gmem, picks_gmem, x_gmem, rows_gmem, y_gmem, plan_gmem,
        experts, rows, row_blocks, k_blocks, columns, x_pitch, outputs, y_pitch, run_blocks, runs,
    ):  # fmt: skip
        slabs = row_blocks * 4
        tile.await_previous()
        tile.begin_next()
        if tile.number() < tile.tiles(plan_gmem, experts, slabs):
            expert, slab, first, end = tile.place(tile.number(), slabs, plan_gmem, experts)
            weights = tile.weights_of(w_gmem, expert, row_blocks, k_blocks)
            picks = tile.picks(picks_gmem, expert, slab, rows, runs)
            acc, a, e = tile.accumulator(), tile.weight_registers(), tile.meta_registers()
            odd = tile.pick_registers()
            sources = tile.sources(rows_gmem, first, end, x_pitch)
            tile.zero(acc)
            for block in range(tile.first_block(), k_blocks, tile.BLOCKS_A_ROUND):
                tile.load_weights(a, e, weights, slab, block, k_blocks)
                tile.load_picks(odd, picks, block, run_blocks, runs)
                tile.load_tokens(x_gmem, sources, block, columns)
                tile.wait_tokens()
                tile.mma_sp(acc, a, e, odd)
            tile.share(acc)
            tile.barrier()
            tile.store(y_gmem, slab, first, end, outputs, y_pitch)

    return gemv_grouped
