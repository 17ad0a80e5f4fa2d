"""The Samoyeds product on Hopper: ``wgmma.sp`` on sub-rows, two outputs told apart at the ends of runs."""

from __future__ import annotations

from typing import Any

__all__ = ["make_samoyeds"]


def make_samoyeds(tile: Any, cfg: Any) -> Any:
    """``Y[t, m] = Σ_k X[t, k] · W[m, k] + bias[m]``, W in Samoyeds format 1:2 with runs of V columns.

    In NumPy: ``Y = X @ W.todense().T + bias``.

    A packed row r is the sub-row of output rows 2r and 2r + 1: in each run of V columns it belongs to one of them, as
    ``picks_gmem[r, run]`` says. ``wgmma`` adds up all columns, and never starts anew. What of that belongs to the even
    row follows by *summation by parts*: with S[j] the sum up to the end of run j, and odd[j] 0 or 1,

        even = Σ_j (1 - odd[j]) · (S[j] - S[j - 1]) = Σ_j (odd[j + 1] - odd[j]) · S[j],  odd = 1 after the last run,

    one multiply-add of a thread for each of its sums at the end of a run, into one more set of registers; the odd row
    is the rest, S - even. (Samoyeds, EuroSys 2025, exchanges two sets of accumulators there.) While one consumer adds,
    the tensor cores work for the other. Rounding errors of a row are relative to the pair's sums, and where one row is
    not finite neither is the other. All else is :mod:`~nmsparse.cuda.kernels.gemm`.
    """

    def samoyeds(
        w_gmem, picks_gmem, x_gmem, y_gmem, bias_gmem, partial_gmem, flag_gmem,
        rows, tokens, pitch, k_blocks, split, parts, run_steps, runs,
    ):  # fmt: skip
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
                tile.zero(acc)
                picks = tile.picks(picks_gmem, row, rows, runs)
                run, left = tile.run_of(first, run_steps)
                odd = tile.pick(picks, min(run, runs - 1))  # padding may go beyond the last
                for step in range(first, last):
                    tile.wait_full(ring, turn)
                    tile.wgmma_sp(acc, ring, turn, step - first)
                    following = tile.pick(picks, min(run + 1, runs - 1))  # arrives while the products run
                    tile.wait_wgmma()
                    tile.release(ring, turn)
                    turn += 1
                    left -= 1
                    if left == 0 and step < last - 1:
                        tile.end_run(acc, odd, following)
                        odd, run, left = following, run + 1, run_steps
                tile.end_runs(acc, odd)
                if cluster == 1 and first > 0:
                    tile.store_partial(acc, partial_gmem, flag_gmem)
                else:
                    if cluster > 1:
                        tile.reduce_scatter(acc, ring, cluster)
                    elif last < steps:
                        tile.add_partials(acc, partial_gmem, flag_gmem, split, parts)
                    tile.store(acc, ring, y_gmem, bias_gmem, row, token, rows, tokens, pitch, cluster)

    return samoyeds
