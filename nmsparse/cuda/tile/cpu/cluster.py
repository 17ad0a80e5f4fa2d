"""``reduce_scatter`` on NumPy: the CTAs of a cluster add up their sums through each other's shared memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ....formats.fragments import LANES, WARPGROUP
from ... import schedule
from .machine import Accumulator, Ring, Role
from .words import check_settled

__all__ = ["cluster_words", "owned_warps"]

WARPS = WARPGROUP // LANES


def owner_of(cfg: Any, role: Role, warp: int, cluster: int) -> int:
    """Rank of the CTA that stores what warp ``warp`` of ``role`` holds."""
    return schedule.owner_of(role.number * WARPS + warp, cluster, WARPS * cfg.warpgroups)


def owned_warps(cfg: Any, role: Role, cluster: int) -> slice:
    """Those of the consumer's four warps whose outputs its CTA stores."""
    if cluster == 1:
        return slice(0, WARPS)
    owned = [warp for warp in range(WARPS) if owner_of(cfg, role, warp, cluster) == role.cta.rank]
    return slice(owned[0], owned[-1] + 1) if owned else slice(0, 0)


def cluster_words(cfg: Any) -> dict[str, Callable[..., Any]]:
    """``reduce_scatter`` for ``cfg``."""

    def reduce_scatter(role: Role, acc: Accumulator, ring: Ring, cluster: int) -> None:
        check_settled(role, acc, "reduce_scatter")
        cta, sums = role.cta, acc.sums.reshape(WARPS, LANES, -1)
        role.require(
            cluster == len(cta.cluster), f"expected clusters of {len(cta.cluster)} CTAs, as launched, came {cluster}"
        )
        role.meet_cluster()
        for warp in range(WARPS):
            owner = cta.cluster[owner_of(cfg, role, warp, cluster)]
            if owner is not cta:
                owner.receive(role, (role.number, warp, cta.rank), sums[warp].copy())
                sums[warp] = np.nan
        for warp in range(WARPS)[owned_warps(cfg, role, cluster)]:
            awaited = [(role.number, warp, (cta.rank + peer) % cluster) for peer in range(1, cluster)]
            cta.machine.crew.pause(
                str(role), lambda awaited=awaited: cta.received.keys() >= {*awaited}, lambda: "sums from its cluster"
            )
            for what in awaited:
                sums[warp] += cta.received.pop(what)

    return {"reduce_scatter": reduce_scatter}
