"""The words of :mod:`nmsparse.cuda.kernels.samoyeds` on NumPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from ....formats.fragments import LANES, WARPGROUP
from ... import schedule
from . import vocabulary
from .cluster import cluster_words, owned_warps
from .machine import Accumulator, Ring, Role
from .multiply import of_registers
from .store import partial_words, store_outputs
from .words import check_settled, consumer_words, place_words, producer_words, ring_words

__all__ = ["Picks", "make", "of_pairs", "run_words"]

Words = dict[str, Callable[..., Any]]
THREAD = np.arange(WARPGROUP)
LOWER = THREAD // LANES * 16 + THREAD % LANES // 4  # the first of a thread's two rows of 64; the second is 8 further


def make(cfg: Any) -> SimpleNamespace:
    """The words for ``cfg``, as the namespace that a kernel text receives."""
    consumers = consumer_words(cfg)
    del consumers["wait_wgmma_but_one"]
    for part in (_picks_words, run_words, partial_words, cluster_words, _store_words):
        consumers |= part(cfg)
    everyone = {**place_words(cfg), **ring_words(cfg)}
    everyone["run_of"] = lambda role, step, run_steps: schedule.run_of(step, run_steps)
    return vocabulary(everyone, producer_words(cfg), consumers)


@dataclass(frozen=True)
class Picks:
    """Where the choices of each thread's two sub-rows are: rows of ``gmem`` ``(sub-rows, runs)``."""

    gmem: np.ndarray
    rows: tuple[np.ndarray, np.ndarray]

    def check(self, role: Role) -> Picks:
        """This, if the rows exist."""
        last, rows = max(rows.max() for rows in self.rows), len(self.gmem)
        role.require(last < rows, f"picks of sub-row {last}: there are {rows}")
        return self


def _picks_words(cfg: Any) -> Words:
    def picks(role: Role, picks_gmem: np.ndarray, row: int, rows: int, runs: int) -> Picks:
        mine, last = row * (cfg.tile_m // 2) + role.number * 64 + LOWER, (rows + 1) // 2 - 1
        return Picks(picks_gmem.reshape(-1, runs), (np.minimum(mine, last), np.minimum(mine + 8, last))).check(role)

    return {"picks": picks}


def run_words(cfg: Any) -> Words:
    """The sums of all runs so far, and what of them belongs to the even rows."""
    sums = cfg.run_sums
    upper = np.arange(sums) // 2 % 2 == 1  # registers of a thread's second row

    def zero(role: Role, acc: Accumulator) -> None:
        check_settled(role, acc, "zero")
        acc.sums[:, sums:] = 0

    def pick(role: Role, picks: Picks, run: int) -> tuple[np.ndarray, np.ndarray]:
        runs = picks.gmem.shape[1]
        role.require(0 <= run < runs, f"reads the picks of run {run}: expected one of {runs} runs")
        low, high = (picks.gmem[rows, run] != 0 for rows in picks.rows)
        return low, high

    def of_sums(odd: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        return np.where(upper, odd[1][:, None], odd[0][:, None]).astype(np.float32)

    def add(role: Role, acc: Accumulator, change: np.ndarray, word: str) -> None:
        check_settled(role, acc, word)
        with np.errstate(invalid="ignore"):
            acc.sums[:, sums:] += change * acc.sums[:, :sums]

    def end_run(
        role: Role, acc: Accumulator, odd: tuple[np.ndarray, np.ndarray], following: tuple[np.ndarray, np.ndarray]
    ) -> None:
        add(role, acc, of_sums(following) - of_sums(odd), "end_run")

    def end_runs(role: Role, acc: Accumulator, odd: tuple[np.ndarray, np.ndarray]) -> None:
        add(role, acc, 1 - of_sums(odd), "end_runs")

    return {"zero": zero, "pick": pick, "end_run": end_run, "end_runs": end_runs}


def of_pairs(cfg: Any, acc: Accumulator) -> np.ndarray:
    """Sums of the output rows of 64 sub-rows, ``(64, 2, tokens)``: of the even one, of the odd one."""
    both, even = of_registers(acc.sums[:, : cfg.run_sums]), of_registers(acc.sums[:, cfg.run_sums :])
    return np.stack([even, both - even], axis=1)


def _store_words(cfg: Any) -> Words:
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
        outputs = of_pairs(cfg, acc).reshape(cfg.height, -1).T
        first = row * cfg.tile_m + role.number * cfg.height
        if cfg.bias:
            bias = np.zeros(cfg.height, np.float32)
            mine = bias_gmem[first : first + cfg.height]  # type: ignore[index]
            bias[: len(mine)] = mine
            outputs = outputs + bias
        owned = owned_warps(cfg, role, cluster)
        outputs, first = outputs[:, 32 * owned.start : 32 * owned.stop], first + 32 * owned.start
        store_outputs(role, outputs, y_gmem, first, token * cfg.tile_t, tokens, rows, pitch)

    return {"store": store}
