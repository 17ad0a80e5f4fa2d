"""The grouped product on Hopper: all experts of an MoE projection in one launch, each on the tokens routed to it."""

from __future__ import annotations

from typing import Any

__all__ = ["make_grouped"]


def make_grouped(tile: Any, cfg: Any) -> Any:
    """``Y[s] = act(W[e] · X[rows[s]])`` for the positions s of every expert e; W 2:4, Samoyeds 1:2 or dense.

    In NumPy: ``for e: s = slice(ends[e - 1], ends[e]); Y[s] = act(X[rows[s]] @ W[e].T)``, where act of gated weights
    is ``act(gate) * up``.

    ``plan_gmem`` (:mod:`~nmsparse.cuda.kernels.route`) holds the ends of the experts' positions and of their tiles of
    tokens: the schedule is known to the device only. The producer brings an expert's weights by the copy engine and
    its tokens from wherever they are. What a run is, :mod:`~.samoyeds` says; other weights have a single one. A tile
    with few tokens, as the last one of an expert often is, gets instructions for as few.
    """
    if cfg.pairs:
        whole, few = _runs(tile, tile.multiply), _runs(tile, tile.multiply_few)
    else:
        whole, few = _sum(tile, tile.multiply), _sum(tile, tile.multiply_few)
    FEW = cfg.few if cfg.few < cfg.tile_t else 0

    def grouped(
        w_gmem, picks_gmem, x_gmem, rows_gmem, y_gmem, plan_gmem,
        experts, rows, row_blocks, k_blocks, columns, x_pitch, outputs, y_pitch, run_steps, runs,
    ):  # fmt: skip
        ring = tile.ring()
        tile.await_previous()
        tile.begin_next()
        row_tiles, steps = tile.grid(row_blocks, k_blocks)
        tiles = tile.tiles(plan_gmem, experts, row_tiles)
        role = tile.role()
        turn = 0
        if role == tile.PRODUCER:
            tile.give_registers()
            if tile.elect():
                tokens = tile.token_registers()
                for index in range(tile.share(tiles)):
                    expert, row, first, end = tile.place(tile.nth(index), row_tiles, plan_gmem, experts)
                    tile.find_tokens(tokens, rows_gmem, first, end, x_pitch)
                    for step in range(steps):
                        tile.wait_empty(ring, turn)
                        tile.load_weights(ring, turn, w_gmem, expert, row, step, row_blocks, k_blocks)
                        tile.load_tokens(ring, turn, x_gmem, tokens, step, columns)
                        turn += 1
        else:
            tile.take_registers()
            acc = tile.accumulator()
            for index in range(tile.share(tiles)):
                expert, row, first, end = tile.place(tile.nth(index), row_tiles, plan_gmem, experts)
                picks = tile.picks(picks_gmem, expert, row, rows, runs)
                tile.zero(acc)
                if FEW and end - first <= FEW:
                    turn = few(acc, ring, turn, picks, steps, run_steps, runs)
                else:
                    turn = whole(acc, ring, turn, picks, steps, run_steps, runs)
                tile.store(acc, ring, y_gmem, row, first, end, outputs, y_pitch)

    return grouped


def _runs(tile: Any, multiply: Any) -> Any:
    """The sums of a tile of Samoyeds, run by run, by ``multiply``; returns the turn after its last."""

    @tile.inline
    def products(acc, ring, turn, picks, steps, run_steps, runs):
        run, left = 0, run_steps
        odd = tile.pick(picks, 0)
        for step in range(steps):
            tile.wait_full(ring, turn)
            multiply(acc, ring, turn, step)
            following = tile.pick(picks, min(run + 1, runs - 1))  # arrives while the products run
            tile.wait_wgmma()
            tile.release(ring, turn)
            turn += 1
            left -= 1
            if left == 0 and step < steps - 1:
                tile.end_run(acc, odd, following)
                odd, run, left = following, run + 1, run_steps
        tile.end_runs(acc, odd)
        return turn

    return products


def _sum(tile: Any, multiply: Any) -> Any:
    """The sums of a tile of other weights by ``multiply``, the products of two steps under way, which have registers of
    their own for metadata; returns the turn after its last."""

    @tile.inline
    def products(acc, ring, turn, picks, steps, run_steps, runs):
        for step in range(0, steps, 2):
            tile.wait_full(ring, turn)
            multiply(acc, ring, turn, step)
            if step > 0:
                tile.wait_wgmma_but_one()
                tile.release(ring, turn - 1)
            turn += 1
            if step + 1 < steps:
                tile.wait_full(ring, turn)
                multiply(acc, ring, turn, step + 1)
                tile.wait_wgmma_but_one()
                tile.release(ring, turn - 1)
                turn += 1
        tile.wait_wgmma()
        tile.release(ring, turn - 1)
        return turn

    return products
