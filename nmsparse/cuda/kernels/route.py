"""From router logits, or from a routing that is given, to the plan of a grouped product: one launch, no host.

A *slot* is one (token, choice) of the routing ``(T, k)``, numbered ``t·k + j``. Sorted by expert, the slots have
*positions*: those of expert e end before ``plan[e]``. A counting sort in three steps: each CTA counts the experts of
its slots in shared memory, and the count so far is the rank of a slot in its CTA; one addition a CTA and expert to a
counter in global memory tells the CTA what the others have reserved; when all have done so, every CTA adds up the
counters for itself and writes its slots to their places. Positions within an expert are in no particular order.

With ``cfg.kept`` the experts have an order of their own, ``order (E,)``, in which those of one kind stand together;
from place ``kept`` on they are dropped: their slots get position -1. The plan is then ``(kept + 1, 2)``, a row of zeros
and for each expert in this order the ends of its positions and of its tiles, so that ``plan[a:b+1]`` is the plan of the
experts from place a to b - 1, a *part*: what is in its first row is where the part begins.
"""

from __future__ import annotations

from typing import Any

__all__ = ["make_dispatch", "make_ends", "make_route"]


def make_route(tile: Any, cfg: Any) -> Any:
    """Route T tokens from their ``logits (T, E)``, and sort.

    In NumPy: ``ids, weights = moe.route(logits, …)``; ``order = argsort(ids.ravel())``; ``slots[order] = arange(T·k)``;
    ``rows = order // k``; ``plan = cumsum([counts, ⌈counts / tile_t⌉])`` along the experts. With ``cfg.copies`` also
    ``sorted = x[rows]``, of 8·pieces columns. A warp routes a token.
    """
    SOFTMAX, BIAS, GROUPS, TOP_K = cfg.scoring == "softmax", cfg.bias, cfg.limits_groups, cfg.top_k
    sort = _sort(tile, cfg)

    def route(
        logits_gmem, bias_gmem, ids_gmem, weights_gmem,
        slots_gmem, rows_gmem, plan_gmem, counter_gmem, order_gmem, x_gmem, sorted_gmem,
        tokens, tile_t, x_pitch, pieces, pitch,
    ):  # fmt: skip
        scores, ranks = tile.scores(), tile.ranks()
        tile.clear()
        tile.barrier()
        tile.await_previous()
        tile.begin_next()
        token = tile.first_token()
        while token < tokens:
            tile.load_logits(scores, logits_gmem, token, pitch)
            if SOFTMAX:
                tile.softmax(scores)
            else:
                tile.sigmoid(scores)
            tile.rank(ranks, scores, bias_gmem)
            if GROUPS:
                tile.drop_groups(ranks)
            expert, score = tile.best(ranks, scores)
            place = tile.by_weight(expert, score) if BIAS else tile.lane()
            chosen = tile.lane() < TOP_K
            slot = token * TOP_K + place
            tile.store_int(ids_gmem, slot, expert, chosen)
            tile.store_float(weights_gmem, slot, tile.weigh(score), chosen)
            tile.park(slots_gmem, slot, expert, tile.count(expert, chosen), chosen)
            token += tile.tokens_a_round()
        sort(
            slots_gmem, rows_gmem, plan_gmem, counter_gmem, order_gmem, tokens * TOP_K, tile_t,
            x_gmem, sorted_gmem, x_pitch, pieces,
        )  # fmt: skip

    return route


def make_dispatch(tile: Any, cfg: Any) -> Any:
    """Sort a routing that is given, ``ids (T, k)``, and with ``cfg.converts`` its weights to float32.

    As :func:`make_route`, but for the choice. Slots whose id is not in 0..E-1 get position -1 and no row.
    """
    CONVERTS, TOP_K = cfg.converts, cfg.top_k
    sort = _sort(tile, cfg)

    def dispatch(
        ids_gmem, given_gmem, weights_gmem,
        slots_gmem, rows_gmem, plan_gmem, counter_gmem, order_gmem, x_gmem, sorted_gmem,
        tokens, tile_t, x_pitch, pieces,
    ):  # fmt: skip
        slots = tokens * TOP_K
        tile.clear()
        tile.barrier()
        tile.await_previous()
        tile.begin_next()
        for turn in range(tile.turns(slots)):
            slot = tile.slot(turn)
            exists = slot < slots
            expert = tile.load_id(ids_gmem, slot, exists)
            tile.park(slots_gmem, slot, expert, tile.count(expert, expert >= 0), exists)
            if CONVERTS:
                tile.store_float(weights_gmem, slot, tile.load_weight(given_gmem, slot, exists), exists)
        sort(
            slots_gmem, rows_gmem, plan_gmem, counter_gmem, order_gmem, slots, tile_t,
            x_gmem, sorted_gmem, x_pitch, pieces,
        )  # fmt: skip

    return dispatch


def make_ends(tile: Any, cfg: Any) -> Any:
    """The plan of rows that are sorted already: their cumulative ``ends (E,)``, by one warp.

    In NumPy: ``plan = [ends, cumsum(⌈diff(ends, prepend=0) / tile_t⌉)]``.
    """

    def ends(ends_gmem, plan_gmem, tile_t):
        tile.plan_of_ends(ends_gmem, plan_gmem, tile_t)

    return ends


def _sort(tile: Any, cfg: Any) -> Any:
    """What follows the count: each slot to its position, the token of each position, and the plan."""
    COPIES = cfg.copies

    @tile.inline
    def sort(
        slots_gmem, rows_gmem, plan_gmem, counter_gmem, order_gmem, slots, tile_t,
        x_gmem, sorted_gmem, x_pitch, pieces,
    ):  # fmt: skip
        tile.barrier()
        tile.reserve(counter_gmem)
        tile.barrier()
        tile.meet(counter_gmem)
        tile.plan(plan_gmem, counter_gmem, order_gmem, tile_t)
        tile.barrier()
        for turn in range(tile.turns(slots)):
            slot = tile.slot(turn)
            exists = slot < slots
            expert, rank = tile.recall(slots_gmem, slot, exists)
            position = tile.position(expert, rank)
            tile.store_int(slots_gmem, slot, position, exists)
            tile.store_int(rows_gmem, position, tile.token_of(slot), position >= 0)
            if COPIES:
                tile.copy_tokens(x_gmem, sorted_gmem, tile.token_of(slot), position, x_pitch, pieces)
        tile.leave(counter_gmem)

    return sort
