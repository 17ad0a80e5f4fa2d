"""The words of :mod:`nmsparse.cuda.kernels.route` on NumPy: each warp a thread, its 32 lanes an axis of every register.

All CTAs run at once, warps take turns in an order drawn from a seed. An access outside its array, a result that is
stored twice, a read of what nobody has stored, and two accesses that no barrier orders raise
(:mod:`~nmsparse.cuda.tile.cpu.race`); so do counters that are not zero in the end.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from ...config_route import EXPERT_BITS, TINY
from .crew import Crew, KernelError
from .overlap import overlapping
from .race import Cells, Clocks, Signal

__all__ = ["launch", "make_dispatch", "make_route"]

LANE = np.arange(32)
NOBODY = np.int32(-1)
FAR_BELOW = -(1 << 30)  # where slots of dropped experts begin: no rank takes them up to 0
_here = threading.local()  # .warp: who the running thread is


class _Cta:
    """A CTA: its number, its shared memory, and its barrier."""

    def __init__(self, machine: _Machine, number: int):
        experts = machine.cfg.experts
        self.number, self.machine, self.phases = number, machine, [Signal()]
        self.counts, self.start = (
            Cells(f"{name} of CTA {number}", np.zeros(experts, np.int32), machine.clocks, known=False)
            for name in ("counts", "start")
        )
        self.arrived = 0


class _Machine:
    """A launch: its CTAs, who has seen what, and what the counters hand on."""

    def __init__(self, cfg: Any, grid: int, crew: Crew):
        self.cfg, self.grid, self.crew = cfg, grid, crew
        self.clocks = Clocks(grid * cfg.warps)
        self.met, self.left = Signal(), Signal()
        self.ctas = [_Cta(self, number) for number in range(grid)]


class _Warp:
    """One warp of a CTA."""

    def __init__(self, cta: _Cta, warp: int):
        self.cta, self.machine, self.warp = cta, cta.machine, warp
        self.number = cta.number * cta.machine.cfg.warps + warp  # in the launch
        self.thread = 32 * warp + LANE
        self.phase = 0

    def __str__(self) -> str:
        return f"warp {self.warp} of CTA {self.cta.number}"

    def wait(self, ready: Callable[[], bool] = lambda: True, what: str = "its turn") -> None:
        """Let others go on, until ``ready``."""
        self.machine.crew.pause(str(self), ready, lambda: what)

    def barrier(self) -> None:
        cta, clocks = self.cta, self.machine.clocks
        signal, self.phase = cta.phases[self.phase], self.phase + 1
        if len(cta.phases) == self.phase:
            cta.phases.append(Signal())
        clocks.release(self.number, signal)
        cta.arrived += 1
        phase = self.phase
        self.wait(lambda: cta.arrived >= phase * self.machine.cfg.warps, "the block's barrier")
        clocks.acquire(self.number, signal)


def make_route(cfg: Any) -> SimpleNamespace:
    """The words for ``cfg``, a :class:`~nmsparse.cuda.config_route.RouteConfig`."""
    words = _token_words(cfg) | _choice_words(cfg) | _slot_words(cfg) | _count_words(cfg)
    return overlapping(SimpleNamespace(**words))


def make_dispatch(cfg: Any) -> SimpleNamespace:
    """The words for ``cfg``, a :class:`~nmsparse.cuda.config_route.DispatchConfig`."""
    return overlapping(SimpleNamespace(**_given_words(cfg), **_slot_words(cfg), **_count_words(cfg)))


def make_ends(cfg: Any) -> SimpleNamespace:
    """The words for ``cfg``, a :class:`~nmsparse.cuda.config_route.EndsConfig`."""

    def plan_of_ends(ends_gmem, plan_gmem, tile_t):
        expert = np.arange(cfg.experts)
        ends = ends_gmem.read(_here.warp.number, expert)
        plan_gmem.store(_here.warp.number, expert, ends)
        tiles = np.cumsum(-(-np.diff(ends, prepend=0) // tile_t))
        plan_gmem.store(_here.warp.number, cfg.experts + expert, tiles)

    return SimpleNamespace(**_named(plan_of_ends), inline=lambda function: function, lane=lambda: LANE)


def _named(*words: Callable[..., Any]) -> dict[str, Any]:
    return {word.__name__.rstrip("_"): word for word in words}


def _token_words(cfg: Any) -> dict[str, Any]:
    def first_token():
        return _here.warp.number

    def tokens_a_round():
        return _here.warp.machine.grid * cfg.warps

    def load_logits(scores, logits_gmem, token, pitch):
        scores[:] = -np.inf
        line = logits_gmem.read(_here.warp.number, token * pitch + np.arange(cfg.experts))
        _line(scores)[: cfg.experts] = line.astype(np.float32)

    return _named(first_token, tokens_a_round, load_logits)


def _line(registers: np.ndarray) -> np.ndarray:
    """Registers ``(numbers, 32)`` of a warp as a line, expert ``32·i + lane`` at that place."""
    return registers.reshape(-1)


def _choice_words(cfg: Any) -> dict[str, Any]:
    experts, top_k = cfg.experts, cfg.top_k

    def scores():
        return np.full((cfg.numbers, 32), np.nan, np.float32)

    def ranks():
        return np.full((cfg.numbers, 32), 0xFFFFFFFF, np.uint32)

    def softmax(scores):
        x = _line(scores)
        powers = np.exp(x[:experts] - x[:experts].max())
        x[:experts], x[experts:] = powers / powers.sum(), 0

    def sigmoid(scores):
        power = np.exp(-np.abs(scores))
        scores[:] = np.where(scores >= 0, 1, power) / (1 + power)

    def rank(ranks, scores, bias_gmem):
        choice = _line(scores)[:experts]
        if cfg.bias:
            choice = choice + bias_gmem.read(_here.warp.number, np.arange(experts))
        ranks[:] = 0
        _line(ranks)[:experts] = _rank_of(choice)

    def drop_groups(ranks):
        groups = _line(ranks)[:experts].reshape(cfg.num_groups, -1)
        best = np.sort(groups, axis=1)[:, ::-1]
        worth = best[:, 0]
        if cfg.top2:
            worth = _rank_of(np.float32(0.5) * _of_rank(best[:, 0]) + np.float32(0.5) * _of_rank(best[:, 1]))
        kept = np.argsort(-worth.astype(np.int64), kind="stable")[: cfg.topk_groups]
        groups[np.setdiff1d(np.arange(cfg.num_groups), kept)] = 0

    def best(ranks, scores):
        chosen = np.argsort(-_line(ranks).astype(np.int64), kind="stable")[:top_k]
        expert, score = np.zeros(32, np.int32), np.zeros(32, np.float32)
        expert[:top_k], score[:top_k] = chosen, _line(scores)[chosen]
        return expert, score

    def by_weight(expert, score):
        order = np.lexsort((expert[:top_k], -score[:top_k]))
        place = np.full(32, top_k, np.int32)
        place[order] = np.arange(top_k)
        return place

    def weigh(score):
        if cfg.renormalize:
            score = score / (score.sum(dtype=np.float32) + np.float32(TINY))
        return score * np.float32(cfg.scale)

    return _named(scores, ranks, softmax, sigmoid, rank, drop_groups, best, by_weight, weigh)


def _rank_of(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return bits ^ np.where(bits >> 31, np.uint32(0xFFFFFFFF), np.uint32(0x80000000))


def _of_rank(rank: np.ndarray) -> np.ndarray:
    bits = rank ^ np.where(rank >> 31, np.uint32(0x80000000), np.uint32(0xFFFFFFFF))
    return bits.view(np.float32)


def _given_words(cfg: Any) -> dict[str, Any]:
    def load_id(ids_gmem, slot, inside):
        expert = np.full(32, NOBODY)
        given = ids_gmem.read(_here.warp.number, slot[inside])
        expert[inside] = np.where((given >= 0) & (given < cfg.experts), given, NOBODY)
        return expert

    def load_weight(given_gmem, slot, inside):
        weight = np.zeros(32, np.float32)
        weight[inside] = given_gmem.read(_here.warp.number, slot[inside]).astype(np.float32)
        return weight

    return _named(load_id, load_weight)


def _slot_words(cfg: Any) -> dict[str, Any]:
    dropped = (1 << 32) - 1

    def lane():
        return LANE

    def turns(slots):
        warp = _here.warp
        chunks = -(-slots // cfg.chunk)
        mine = len(range(warp.cta.number, chunks, warp.machine.grid))
        return -(-mine * cfg.chunk // cfg.threads)

    def slot(turn):
        warp = _here.warp
        thread = warp.thread % 32 * cfg.warps + warp.thread // 32 if cfg.copies else warp.thread
        chunk, inside = np.divmod(turn * cfg.threads + thread, cfg.chunk)
        return (chunk * warp.machine.grid + warp.cta.number) * cfg.chunk + inside

    def token_of(slot):
        return slot // cfg.top_k

    def park(slots_gmem, slot, expert, rank, inside):
        if (rank[inside] >> 32 - EXPERT_BITS).any():
            raise KernelError(f"{_here.warp}: a rank has {32 - EXPERT_BITS} bits, got {rank[inside].max()}")
        both = np.where(expert < 0, dropped, expert.astype(np.int64) | rank.astype(np.int64) << EXPERT_BITS)
        slots_gmem.write(_here.warp.number, slot[inside], both.astype(np.uint32).view(np.int32)[inside])

    def recall(slots_gmem, slot, inside):
        both = np.full(32, dropped, np.uint32)
        both[inside] = slots_gmem.read(_here.warp.number, slot[inside]).view(np.uint32)
        expert = np.where(both == dropped, -1, both & (1 << EXPERT_BITS) - 1)
        return expert.astype(np.int32), (both >> EXPERT_BITS).astype(np.int32)

    def position(expert, rank):
        known, at = expert >= 0, np.full(32, NOBODY)
        at[known] = _here.warp.cta.start.read(_here.warp.number, expert[known]) + rank[known]
        return np.maximum(at, NOBODY)

    def store_int(gmem, index, value, inside):
        gmem.store(_here.warp.number, index[inside], value[inside])

    def barrier():
        _here.warp.barrier()

    def copy_tokens(x_gmem, sorted_gmem, token, position, x_pitch, pieces):
        for row, at in zip(token[position >= 0], position[position >= 0], strict=True):
            column = np.arange(8 * pieces)
            values = x_gmem.read(_here.warp.number, row * x_pitch + column)
            sorted_gmem.store(_here.warp.number, at * 8 * pieces + column, values)

    words = _named(lane, turns, slot, token_of, park, recall, position, store_int, barrier, copy_tokens)
    return {**words, "store_float": store_int, "inline": lambda function: function}


def _count_words(cfg: Any) -> dict[str, Any]:
    experts = cfg.experts
    everyone, arrived, left = np.arange(experts), np.array([experts]), np.array([experts + 1])

    def mine():
        """Experts that the threads of this warp count for the CTA."""
        warp = _here.warp
        return np.concatenate([range(thread, experts, cfg.threads) for thread in warp.thread]).astype(np.int64)

    def clear():
        _here.warp.cta.counts.write(_here.warp.number, mine(), 0)

    def count(expert, inside):
        warp, before = _here.warp, np.zeros(32, np.int32)
        warp.wait()
        before[inside] = warp.cta.counts.add(warp.number, expert[inside], 1)
        return before

    def reserve(counter_gmem):
        warp, at = _here.warp, mine()
        warp.wait()
        before = np.zeros(at.size, np.int32)
        if warp.machine.grid > 1:
            counts = warp.cta.counts.read(warp.number, at)
            some = counts > 0
            before[some] = counter_gmem.add(warp.number, at[some], counts[some])
        warp.cta.start.write(warp.number, at, before)

    def meet(counter_gmem):
        warp, machine = _here.warp, _here.warp.machine
        if machine.grid > 1 and warp.warp == 0:
            counter_gmem.add(warp.number, arrived, 1)
            machine.clocks.release(warp.number, machine.met)
            warp.wait(lambda: counter_gmem.values[experts] >= machine.grid, "all CTAs")
            machine.clocks.acquire(warp.number, machine.met)

    def plan(plan_gmem, counter_gmem, order_gmem, tile_t):
        warp = _here.warp
        if warp.warp:
            return
        order = everyone if cfg.kept is None else order_gmem.read(warp.number, everyone)
        kept, dropped = order[: cfg.kept], order[len(everyone) if cfg.kept is None else cfg.kept :]
        totals = (counter_gmem if warp.machine.grid > 1 else warp.cta.counts).read(warp.number, kept)
        ends, tiles, start = np.cumsum(totals), np.cumsum(-(-totals // tile_t)), warp.cta.start
        start.write(warp.number, kept, start.read(warp.number, kept) + ends - totals)
        start.write(warp.number, dropped, FAR_BELOW)
        if warp.cta.number == 0:
            found = np.concatenate([ends, tiles])
            if cfg.kept is not None:
                found = np.stack([[0, *ends], [0, *tiles]], axis=1).reshape(-1)
            plan_gmem.store(warp.number, np.arange(found.size), found)

    def leave(counter_gmem):
        warp, machine = _here.warp, _here.warp.machine
        if machine.grid > 1 and warp.warp == 0:
            warp.wait()
            before = counter_gmem.add(warp.number, left, 1)[0]
            machine.clocks.release(warp.number, machine.left)
            if before == machine.grid - 1:
                machine.clocks.acquire(warp.number, machine.left)
                counter_gmem.write(warp.number, np.arange(experts + 2), 0)

    return _named(clear, count, reserve, meet, plan, leave)


def launch(
    make_kernel: Callable[[Any, Any], Callable[..., None]],
    make: Callable[[Any], SimpleNamespace],
    cfg: Any,
    grid: int,
    arguments: Sequence[Any],
    seed: int = 0,
) -> None:
    """Run ``make_kernel(make(cfg), cfg)(*arguments)`` on ``grid`` CTAs at once.

    Arrays that can be written are results, undefined until they are stored, but ``counter_gmem``; others are inputs.
    """
    crew = Crew(seed)
    machine = _Machine(cfg, grid, crew)
    kernel = make_kernel(make(cfg), cfg)
    memory = []
    for name, argument in zip(inspect.signature(kernel).parameters, arguments, strict=True):
        if isinstance(argument, np.ndarray):
            known = name == "counter_gmem" or not argument.flags.writeable
            argument = Cells(name.removesuffix("_gmem"), argument, machine.clocks, known=known)
        memory.append(argument)

    def live(warp: _Warp) -> None:
        _here.warp = warp
        kernel(*memory)

    warps = [_Warp(cta, number) for cta in machine.ctas for number in range(cfg.warps)]
    crew.run({str(warp): functools.partial(live, warp) for warp in warps})
    for counters in (cells for cells in memory if isinstance(cells, Cells) and cells.name == "counter"):
        if counters.values.any():
            left = np.flatnonzero(counters.values)
            raise KernelError(f"counters: expected zeros at the end, got {left} other than 0")
