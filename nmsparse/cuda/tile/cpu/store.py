"""The words that leave the registers, on NumPy: partial sums between CTAs, and the epilogue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ....formats.fragments import WARPGROUP
from ...layout import BLOCK
from .machine import Accumulator, Ring, Role
from .multiply import of_registers
from .words import check_settled

__all__ = ["store_words"]


def store_words(cfg: Any) -> dict[str, Callable[..., Any]]:
    """``store_partial``, ``add_partials`` and ``store`` for ``cfg``."""

    def partial(role: Role, partial_gmem: np.ndarray, cta: int) -> tuple[int, np.ndarray]:
        """Number of this consumer's partial sums of ``cta``, and the sums, as quads of each thread."""
        slot, sums = cta * cfg.warpgroups + role.number, partial_gmem.reshape(-1, cfg.sums // 4, WARPGROUP, 4)
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
            slot, sums = partial(role, partial_gmem, role.cta.number + part * split * cfg.cluster)
            what = f"partial sums {slot}, part {part} of {parts}"
            role.cta.machine.crew.pause(str(role), lambda slot=slot: bool(flag_gmem[slot]), lambda what=what: what)
            flag_gmem[slot] = 0
            quads(acc)[:] += sums
            sums[:] = np.nan

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
    ) -> None:
        check_settled(role, acc, "store")
        y, t = y_gmem.reshape(-1), token * cfg.tile_t + np.arange(cfg.tile_t)
        for block in range(cfg.blocks):
            d = of_registers(acc.sums[:, block * cfg.tile_t // 2 : (block + 1) * cfg.tile_t // 2])
            m = row * cfg.tile_m + (role.number * cfg.blocks + block) * BLOCK + np.arange(BLOCK)
            inside = np.ix_(m < rows, t < tokens)
            d, m = d[inside], m[m < rows]
            if cfg.bias:
                d += bias_gmem[m, None].astype(np.float32)  # type: ignore[index]
            at = t[t < tokens] * pitch + m[:, None]
            again = role.cta.machine.stored.intersection(at.ravel().tolist())
            where = f"y_gmem[{min(again, default=0) // pitch}, {min(again, default=0) % pitch}]"
            role.require(not again, f"store writes {where} again: every element belongs to one tile")
            role.cta.machine.stored.update(at.ravel().tolist())
            with np.errstate(over="ignore", invalid="ignore"):
                y[at] = d.astype(y.dtype)

    return {"store_partial": store_partial, "add_partials": add_partials, "store": store}
