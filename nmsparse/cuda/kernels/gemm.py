"""The 2:4 product on Hopper: ``wgmma.sp``, warp-specialised, persistent."""

from __future__ import annotations

from typing import Any

__all__ = ["make_gemm"]


def make_gemm(tile: Any, cfg: Any) -> Any:
    """``Y[t, m] = Σ_k X[t, k] · W[m, k] + bias[m]``, W packed 2:4 blocks, in the vocabulary ``tile`` for ``cfg``.

    In NumPy, with the blocks decoded: ``Y = X @ W.T + bias``.

    One warpgroup produces: it keeps a ring of shared-memory slots filled by the copy engine, a step of k in each. The
    others consume: each multiplies its rows of W with the slot's tokens and holds the sums in registers. A slot is
    *full* when its bytes have arrived and *empty* when all consumers are done with it. Persistent CTAs walk through
    the pieces of :mod:`~nmsparse.cuda.schedule`; while sums are stored, the ring already fills for the next piece. With
    few tokens a cluster of CTAs shares a tile: each takes a part of its steps, then adds up and stores some rows.

    Products of two steps are under way. ``wgmma`` reads its metadata when it runs, so those of even and of odd steps
    are in registers of their own; that is why a round of the loop is two steps.
    """

    def gemm(w_gmem, x_gmem, y_gmem, bias_gmem, partial_gmem, flag_gmem, rows, tokens, pitch, k_blocks, split, parts):
        tile.prefetch(x_gmem)
        ring = tile.ring()
        row_tiles, token_tiles, steps = tile.grid(rows, tokens, k_blocks)
        tiles = row_tiles * token_tiles
        pieces, cluster = tile.pieces(tiles, split, parts), tile.cluster(split, parts)
        role = tile.role()
        turn = 0
        if role == tile.PRODUCER:
            tile.give_registers()
            if tile.elect():
                for index in range(pieces):
                    number, first, last = tile.piece(index, tiles, split, parts, steps)
                    row, token = tile.place(number, row_tiles, token_tiles)
                    for step in range(first, last):
                        tile.wait_empty(ring, turn)
                        tile.expect(ring, turn, row, rows)
                        tile.load_tokens(ring, turn, x_gmem, token, step)
                        tile.load_weights(ring, turn, w_gmem, row, step, rows, k_blocks)
                        turn += 1
        else:
            tile.take_registers()
            acc = tile.accumulator()
            for index in range(pieces):
                number, first, last = tile.piece(index, tiles, split, parts, steps)
                row, token = tile.place(number, row_tiles, token_tiles)
                for step in range(0, last - first, 2):
                    tile.wait_full(ring, turn)
                    tile.wgmma_sp(acc, ring, turn, step)
                    if step > 0:
                        tile.wait_wgmma_but_one()
                        tile.release(ring, turn - 1)
                    turn += 1
                    if step + 1 < last - first:
                        tile.wait_full(ring, turn)
                        tile.wgmma_sp(acc, ring, turn, step + 1)
                        tile.wait_wgmma_but_one()
                        tile.release(ring, turn - 1)
                        turn += 1
                tile.wait_wgmma()
                tile.release(ring, turn - 1)
                if cluster == 1 and first > 0:
                    tile.store_partial(acc, partial_gmem, flag_gmem)
                else:
                    if cluster > 1:
                        tile.reduce_scatter(acc, ring, cluster)
                    elif last < steps:
                        tile.add_partials(acc, partial_gmem, flag_gmem, split, parts)
                    tile.store(acc, ring, y_gmem, bias_gmem, row, token, rows, tokens, pitch, cluster)

    return gemm
