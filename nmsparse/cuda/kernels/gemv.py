"""The product with few tokens: weights straight from memory into registers, ``mma.sp``, one barrier."""

from __future__ import annotations

from typing import Any

__all__ = ["make_gemv"]


def make_gemv(tile: Any, cfg: Any) -> Any:
    """``Y[t, m] = Σ_k X[t, k] · W[m, k] + bias[m]`` for few tokens, W 2:4 or Samoyeds 1:2.

    In NumPy, with the packed blocks decoded: ``Y = X @ W.T + bias``.

    A CTA owns 16 packed rows of W and ``cfg.tile_t`` tokens. It deals k to its warps, a batch of blocks each, all loads
    of a batch under way before its first product: a product this small is over before a pipeline would fill. Tokens
    pass through shared memory, since a lane needs pieces of 4 bytes, of which loads would fetch eight rows at a time.
    The warps' sums are added in the order of the warps. Of Samoyeds, the sums of a block go to the even or the odd row
    of a pair, as ``picks_gmem`` says: a block of 64 columns lies within one run.
    """

    def gemv(
        w_gmem, picks_gmem, x_gmem, y_gmem, bias_gmem,
        rows, tokens, columns, x_pitch, y_pitch, k_blocks, run_blocks, runs,
    ):  # fmt: skip
        acc, a, e = tile.accumulator(), tile.weight_registers(), tile.meta_registers()
        (slab, token), odd = tile.place(tokens), tile.pick_registers()
        picks = tile.picks(picks_gmem, slab, rows, runs)
        tile.zero(acc)
        for block in range(tile.first_block(), k_blocks, tile.BLOCKS_A_ROUND):
            tile.load_weights(a, e, w_gmem, slab, block, k_blocks)
            tile.load_picks(odd, picks, block, run_blocks, runs)
            tile.load_tokens(x_gmem, token, block, tokens, columns, x_pitch)
            tile.wait_tokens()
            tile.mma_sp(acc, a, e, odd)
        tile.share(acc)
        tile.barrier()
        tile.store(y_gmem, bias_gmem, slab, token, rows, tokens, y_pitch)

    return gemv
