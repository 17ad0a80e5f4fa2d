"""The words that leave the registers, on NumPy: partial sums between CTAs, and the epilogue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ....formats.fragments import WARPGROUP
from ...layout import BLOCK
from .cluster import cluster_words, owned_warps
from .machine import Accumulator, Ring, Role
from .multiply import of_registers
from .words import check_settled

__all__ = ["claim", "partial_words", "store_outputs", "store_words"]


def claim(role: Role, t: np.ndarray, m: np.ndarray, pitch: int) -> np.ndarray:
    """Where outputs ``m`` of tokens ``t`` go, ``(tokens, outputs)``; no other store may go there."""
    at = t[:, None] * pitch + m
    places, stored = set(at.ravel().tolist()), role.cta.machine.stored
    again = min(places & stored, default=0)
    role.require(
        stored.isdisjoint(places),
        f"store writes y_gmem[{again // pitch}, {again % pitch}] again: every element belongs to one tile",
    )
    stored.update(places)
    return at


def store_outputs(
    role: Role, outputs: np.ndarray, y_gmem: np.ndarray, first: int, token: int, end: int, rows: int, pitch: int
) -> None:
    """``y[token + t, first + i] = outputs[t, i]``, only before ``end`` and ``rows``."""
    t, m = np.arange(token, min(token + len(outputs), end)), np.arange(first, min(first + outputs.shape[1], rows))
    y = y_gmem.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        y[claim(role, t, m, pitch)] = outputs[: len(t), : len(m)].astype(y.dtype)


def store_words(cfg: Any) -> dict[str, Callable[..., Any]]:
    """``store_partial``, ``add_partials``, ``reduce_scatter`` and ``store`` for ``cfg``."""
    return {**partial_words(cfg), **cluster_words(cfg), **_epilogue_words(cfg)}


def partial_words(cfg: Any) -> dict[str, Callable[..., Any]]:
    """What goes from one CTA to another: all accumulators."""

    def partial(role: Role, partial_gmem: np.ndarray, cta: int) -> tuple[int, np.ndarray]:
        """Number of this consumer's partial sums of ``cta``, and the sums, as quads of each thread."""
        slot, sums = (
            cta * cfg.warpgroups + role.number,
            partial_gmem.reshape(-1, cfg.partial_slots[1] // 4 // WARPGROUP, WARPGROUP, 4),
        )
        role.require(slot < len(sums), f"expected partial sums of a CTA of this launch, came CTA {cta}")
        return slot, sums[slot]

    def quads(acc: Accumulator) -> np.ndarray:
        return acc.sums.reshape(WARPGROUP, -1, 4).swapaxes(0, 1)

    def store_partial(role: Role, acc: Accumulator, partial_gmem: np.ndarray, flag_gmem: np.ndarray) -> None:
        check_settled(role, acc, "store_partial")
        slot, sums = partial(role, partial_gmem, role.cta.number)
        role.require(not flag_gmem[slot], f"store_partial overwrites partial sums {slot} that nobody has added yet")
        sums[:] = quads(acc)
        flag_gmem[slot] = 1

    def add_partials(
        role: Role, acc: Accumulator, partial_gmem: np.ndarray, flag_gmem: np.ndarray, split: int, parts: int
    ) -> None:
        check_settled(role, acc, "add_partials")
        for part in range(1, parts):
            slot, sums = partial(role, partial_gmem, role.cta.number + part * split)
            what = f"partial sums {slot}, part {part} of {parts}"
            role.cta.machine.crew.pause(str(role), lambda slot=slot: bool(flag_gmem[slot]), lambda what=what: what)
            flag_gmem[slot] = 0
            quads(acc)[:] += sums
            sums[:] = np.nan

    return {"store_partial": store_partial, "add_partials": add_partials}


def _epilogue_words(cfg: Any) -> dict[str, Callable[..., Any]]:
    def store(
        role: Role,
        acc: Accumulator,
        ring: Ring,
        y_gmem: np.ndarray,
        bias_gmem: np.ndarray | None,
        row: int,
        token: int,
        rows: int,
        tokens: int,
        pitch: int,
        cluster: int,
    ) -> None:
        check_settled(role, acc, "store")
        y, t = y_gmem.reshape(-1), token * cfg.tile_t + np.arange(cfg.tile_t)
        owned = owned_warps(cfg, role, cluster)
        for block in range(cfg.blocks):
            d = of_registers(acc.sums[:, block * cfg.tile_t // 2 : (block + 1) * cfg.tile_t // 2])
            m = row * cfg.tile_m + (role.number * cfg.blocks + block) * BLOCK + np.arange(BLOCK)
            d, m = (a[slice(16 * owned.start, 16 * owned.stop)] for a in (d, m))
            d = d[np.ix_(m < rows, t < tokens)].T
            m = m[m < rows]
            if cfg.bias:
                d = d + bias_gmem[m].astype(np.float32)  # type: ignore[index]
            at = claim(role, t[t < tokens], m, pitch)
            with np.errstate(over="ignore", invalid="ignore"):
                y[at] = d.astype(y.dtype)

    return {"store": store}
