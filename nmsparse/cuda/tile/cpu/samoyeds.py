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
from .machine import Accumulator, Ring, Role
from .multiply import of_registers
from .store import partial_words, store_outputs
from .words import check_settled, consumer_words, place_words, producer_words, ring_words

__all__ = ["Picks", "make", "of_pairs", "run_words", "turn_words"]

Words = dict[str, Callable[..., Any]]
THREAD = np.arange(WARPGROUP)
LOWER = THREAD // LANES * 16 + THREAD % LANES // 4  # the first of a thread's two rows of 64; the second is 8 further


def make(cfg: Any) -> SimpleNamespace:
    """The words for ``cfg``, as the namespace that a kernel text receives."""
    consumers = consumer_words(cfg)
    del consumers["wait_wgmma_but_one"]
    for part in (_picks_words, run_words, turn_words, partial_words, _store_words):
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
    """Sums of a run, and what becomes of them."""
    sums, kept = cfg.run_sums, slice(*cfg.kept)
    upper = np.arange(sums) // 2 % 2 == 1  # registers of a thread's second row

    def zero(role: Role, acc: Accumulator) -> None:
        check_settled(role, acc, "zero")
        acc.sums[:, kept] = 0

    def pick(role: Role, picks: Picks, run: int) -> tuple[np.ndarray, np.ndarray]:
        runs = picks.gmem.shape[1]
        role.require(0 <= run < runs, f"reads the picks of run {run}: expected one of {runs} runs")
        low, high = (picks.gmem[rows, run] != 0 for rows in picks.rows)
        return low, high

    def add_run(role: Role, acc: Accumulator, odd: tuple[np.ndarray, np.ndarray]) -> None:
        check_settled(role, acc, "add_run")
        of_odd = np.where(upper, odd[1][:, None], odd[0][:, None])
        for number, mine in ((1, ~of_odd), (2, of_odd)):
            acc.sums[:, number * sums : (number + 1) * sums][mine] += acc.sums[:, :sums][mine]

    return {"zero": zero, "pick": pick, "add_run": add_run}


def turn_words(cfg: Any) -> Words:
    """Consumers that multiply by turns."""
    ordered = cfg.ordered and cfg.warpgroups == 2

    def hand(role: Role, number: int) -> None:
        other = role.cta.roles[1 + number]
        role.require(not other.handed, f"hands {other} its turn, which it has already")
        other.handed += 1

    def take_turns(role: Role) -> None:
        if ordered:
            role.may_multiply = False
            if role.number == 1:
                hand(role, 0)

    def await_turn(role: Role) -> None:
        if ordered:
            role.cta.machine.crew.pause(str(role), lambda: role.handed > 0, lambda: "its turn at the tensor cores")
            role.handed -= 1
            role.may_multiply = True

    def pass_turn(role: Role) -> None:
        if ordered:
            role.require(role.may_multiply, "passes on a turn that it does not have")
            role.finish_groups(but=1)
            role.may_multiply = False
            hand(role, 1 - role.number)

    return {"take_turns": take_turns, "await_turn": await_turn, "pass_turn": pass_turn}


def of_pairs(cfg: Any, acc: Accumulator) -> np.ndarray:
    """Sums of the output rows of 64 sub-rows, ``(64, 2, tokens)``: of the even one, of the odd one."""
    even, odd = (of_registers(acc.sums[:, n * cfg.run_sums : (n + 1) * cfg.run_sums]) for n in (1, 2))
    return np.stack([even, odd], axis=1)


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
    ) -> None:
        check_settled(role, acc, "store")
        outputs = of_pairs(cfg, acc).reshape(cfg.height, -1).T
        first = row * cfg.tile_m + role.number * cfg.height
        if cfg.bias:
            bias = np.zeros(cfg.height, np.float32)
            mine = bias_gmem[first : first + cfg.height]  # type: ignore[index]
            bias[: len(mine)] = mine
            outputs = outputs + bias
        store_outputs(role, outputs, y_gmem, first, token * cfg.tile_t, tokens, rows, pitch)

    return {"store": store}
