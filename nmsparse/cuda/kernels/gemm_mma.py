"""The product on Ampere and later: ``mma.sp``, a ring of ``cp.async`` copies, tiles or pieces of tiles."""

from __future__ import annotations

from typing import Any

__all__ = ["make_gemm_mma"]


def make_gemm_mma(tile: Any, cfg: Any) -> Any:
    """``Y[t, m] = Σ_k X[t, k] · W[m, k] + bias[m]``, W 2:4, V:N:M or Samoyeds, in the vocabulary ``tile`` for ``cfg``.

    In NumPy, with the blocks decoded: ``Y = X @ W.T + bias``. With ``cfg.gather = (v, m)`` the blocks hold the
    condensed columns of V:N:M, and X[t, k] stands for ``X[t, m·g + index[row // v, g, j]]`` with k = 4g + j. With
    ``cfg.pairs`` they hold the sub-rows of Samoyeds, and the sums of a run go to row ``2r + index[r, run]``, as in
    :mod:`~nmsparse.cuda.kernels.samoyeds`; other weights have a single run.

    All warps load and all multiply. Slot ``step % stages`` of the ring holds a step of k; ``stages - 1`` steps are
    under way at a time, each a group of copies, which may be empty so that the groups count the steps. The pieces of
    work are those of :mod:`~nmsparse.cuda.schedule`.
    """
    AHEAD = cfg.stages - 1
    load_tokens = tile.load_tokens_gathered if cfg.gather else tile.load_tokens

    def gemm_mma(
        w_gmem, x_gmem, index_gmem, y_gmem, bias_gmem, partial_gmem, flag_gmem,
        rows, tokens, columns, k_blocks, x_pitch, y_pitch, split, parts, run_steps, runs,
    ):  # fmt: skip
        ring, acc = tile.ring(), tile.accumulator()
        row_tiles, token_tiles, steps = tile.grid(rows, tokens, k_blocks)
        tiles = row_tiles * token_tiles
        for index in range(tile.pieces(tiles, split, parts)):
            number, first, last = tile.piece(index, tiles, split, parts, steps)
            row, token = tile.place(number, row_tiles, token_tiles)
            tile.zero(acc)
            picks = tile.picks(index_gmem, row, rows, runs)
            run, left = tile.run_of(first, run_steps)
            for step in range(first, first + AHEAD):
                if step < last:
                    tile.load_weights(ring, step, w_gmem, row, rows, k_blocks)
                    load_tokens(ring, step, x_gmem, index_gmem, row, token, tokens, columns, x_pitch)
                tile.commit()
            for step in range(first, last):
                odd = tile.pick(picks, min(run, runs - 1))  # padding may go beyond the last
                tile.wait()
                if step + AHEAD < last:
                    tile.load_weights(ring, step + AHEAD, w_gmem, row, rows, k_blocks)
                    load_tokens(ring, step + AHEAD, x_gmem, index_gmem, row, token, tokens, columns, x_pitch)
                tile.commit()
                tile.mma_sp(acc, ring, step)
                left -= 1
                if left == 0 or step == last - 1:
                    tile.add_run(acc, odd)
                    run += 1
                    left = run_steps
            if first > 0:
                tile.store_partial(acc, partial_gmem, flag_gmem)
            else:
                if last < steps:
                    tile.add_partials(acc, partial_gmem, flag_gmem, split, parts)
                tile.store(acc, ring, y_gmem, bias_gmem, row, token, rows, tokens, y_pitch)

    return gemm_mma
