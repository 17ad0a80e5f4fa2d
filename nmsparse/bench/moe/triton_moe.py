"""A fused MoE layer in Triton: its launches, and the search for its tiles."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from . import triton_kernels as kernels

__all__ = ["Launch", "Plan", "Tile", "TritonExperts", "tune"]

ALL_AT_ONCE = 2048  # up to so many pairs each program of the schedule counts them all; beyond, a launch counts first
MOST_CHUNKS = 128  # of the pairs, where a launch counts first
PART = 64  # pairs that a program of the schedule places at a time


class Tile(NamedTuple):
    """``rows x columns`` of output in steps of ``depth``; ``group`` blocks of rows share the weights they read;
    ``persistent``: a program for each SM, which does one tile after the other."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int = 8
    persistent: bool = False


class Plan(NamedTuple):
    """What a layer runs with: two tiles of equally many rows, and whether the pairs are sorted by expert at all."""

    gate_up: Tile
    down: Tile
    sorted: bool = True

    def __str__(self) -> str:
        first, second = ("x".join(map(str, map(int, tile[1:]))) for tile in (self.gate_up, self.down))
        return f"{self.gate_up.rows} rows, {first}, {second}{'' if self.sorted else ', unsorted'}"


class Launch(NamedTuple):
    """A kernel and everything it is called with."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]

    def __call__(self) -> None:
        self.kernel[self.grid](*self.args, **self.constants)

    def compile(self) -> None:
        """Compiles what a call would run."""
        self.kernel.warmup(*self.args, grid=self.grid, **self.constants)


class Schedule(NamedTuple):
    """Pairs in the order of experts; expert, first row and end of each block of rows; how many blocks there are."""

    order: torch.Tensor
    blocks: torch.Tensor
    num_blocks: torch.Tensor


CONSTANTS = ("ROWS", "COLUMNS", "DEPTH", "num_warps", "num_stages", "GROUP", "PERSISTENT")  # of a tile, in order

# Tiles by rows, the likely best first. Below 64 rows Triton uses mma.sync, from 64 rows on wgmma.
GATE_UP = {
    16: (Tile(16, 64, 128, 4, 4), Tile(16, 32, 128, 4, 4), Tile(16, 64, 64, 4, 5), Tile(16, 128, 64, 4, 4)),
    32: (Tile(32, 64, 128, 4, 3), Tile(32, 64, 64, 4, 4), Tile(32, 128, 64, 4, 4)),
    64: (Tile(64, 128, 64, 4, 3), Tile(64, 64, 64, 4, 4), Tile(64, 128, 64, 8, 4)),
    128: (
        Tile(128, 128, 64, 8, 4),
        Tile(128, 128, 64, 8, 3),
        Tile(128, 64, 64, 4, 3),
        Tile(128, 64, 64, 8, 4),
        Tile(128, 128, 64, 8, 4, group=32),
        Tile(128, 128, 64, 8, 3, persistent=True),
    ),
    256: (Tile(256, 64, 64, 8, 4),),
}
DOWN = {
    16: (Tile(16, 64, 128, 4, 5), Tile(16, 32, 128, 4, 5), Tile(16, 128, 128, 4, 4), Tile(16, 128, 64, 4, 5)),
    32: (Tile(32, 128, 128, 4, 4), Tile(32, 64, 128, 4, 4), Tile(32, 128, 64, 4, 5)),
    64: (Tile(64, 128, 64, 4, 4), Tile(64, 256, 64, 4, 4), Tile(64, 256, 64, 8, 4)),
    128: (
        Tile(128, 256, 64, 8, 4),
        Tile(128, 256, 64, 8, 3),
        Tile(128, 128, 64, 4, 3),
        Tile(128, 128, 64, 8, 4),
        Tile(128, 256, 64, 8, 4, group=32),
        Tile(128, 256, 64, 8, 3, persistent=True),
        Tile(128, 128, 64, 8, 4, persistent=True),
    ),
    256: (Tile(256, 128, 64, 8, 4),),
}


class TritonExperts:
    """E experts with SwiGLU, ``gate_up (E, 2I, H)`` and ``down (E, H, I)`` in C order; called like ``SparseExperts``.

    ``plan`` says how to run; :func:`tune` finds a good one. H and I have to be multiples of the columns and depths of
    its tiles.
    """

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor):
        self.num_experts, self.hidden, self.intermediate = down.shape
        self.gate_up, self.down = gate_up.flatten(0, 1), down.flatten(0, 1)
        self.plan = Plan(GATE_UP[16][0], DOWN[16][0])

    def __call__(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Each token's weighted sum of the outputs of its experts; ``ids`` int32 and ``weights`` float32 are (T, k)."""
        size = ids.numel()
        h, pairs = x.new_empty(size, self.intermediate), x.new_empty(size, self.hidden)
        schedule = self.schedule(ids, self.plan.gate_up.rows) if self.plan.sorted else None
        self.gate_up_launch(x, h, ids, schedule, self.plan.gate_up)()
        self.down_launch(h, pairs, ids, weights, schedule, self.plan.down)()
        y, width = torch.empty_like(x), min(2048, triton.next_power_of_2(self.hidden))
        grid = len(x), triton.cdiv(self.hidden, width)
        kernels.combine[grid](pairs, y, self.hidden, TOP_K=ids.shape[1], WIDTH=width, num_warps=4)
        return y

    def schedule(self, ids: torch.Tensor, rows: int) -> Schedule:
        """The order of the pairs and their blocks of at most ``rows``; one or two launches."""
        size, bins = ids.numel(), max(32, triton.next_power_of_2(self.num_experts))
        schedule = Schedule(ids.new_empty(size), ids.new_empty(self.most_blocks(size, rows), 3), ids.new_empty(1))
        counts, chunk, wide = None, PART, 256 if size <= 256 else ALL_AT_ONCE
        if size > ALL_AT_ONCE:
            chunk, wide = max(128, triton.next_power_of_2(triton.cdiv(size, MOST_CHUNKS))), MOST_CHUNKS
            counts = ids.new_empty(wide, bins)
        chunks = triton.cdiv(size, chunk)
        if counts is not None:
            kernels.count[(chunks,)](ids, counts, size, CHUNK=chunk, BINS=bins, num_warps=4)
        kernels.place[(chunks,)](
            ids, counts, *schedule, size, chunks, chunk, rows,
            PART=PART, BINS=bins, WIDE=wide, COUNTED=counts is not None, num_warps=8,
        )  # fmt: skip
        return schedule

    def most_blocks(self, size: int, rows: int) -> int:
        """Blocks that ``size`` pairs can make at most: each active expert has one that is not full."""
        return (size + min(self.num_experts, size) * (rows - 1)) // rows

    def gate_up_launch(
        self, x: torch.Tensor, h: torch.Tensor, ids: torch.Tensor, schedule: Schedule | None, tile: Tile
    ) -> Launch:
        """``h (S, I)``, in the order of the schedule, or of the pairs if there is none: SwiGLU of ``x (T, H)``."""
        w = TensorDescriptor.from_tensor(self.gate_up, [tile.columns, tile.depth])
        sizes = ids.numel(), ids.shape[1], self.hidden, self.intermediate
        args = x, w, h, ids, *(schedule or (None, None, None)), *sizes
        return self._launch(kernels.gate_up, args, self.intermediate // tile.columns, ids, schedule, tile)

    def down_launch(
        self, h: torch.Tensor, y: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor,
        schedule: Schedule | None, tile: Tile,
    ) -> Launch:  # fmt: skip
        """``y (S, H)``, in the order of the pairs: the routing weights times the products with ``h``."""
        rows = TensorDescriptor.from_tensor(h, [tile.rows, tile.depth])
        w = TensorDescriptor.from_tensor(self.down, [tile.columns, tile.depth])
        sizes = ids.numel(), self.hidden, self.intermediate
        args = rows, w, y, weights, ids, *(schedule or (None, None, None)), *sizes
        return self._launch(kernels.down, args, self.hidden // tile.columns, ids, schedule, tile)

    def _launch(self, kernel: Any, args: Any, columns: int, ids: Any, schedule: Any, tile: Tile) -> Launch:
        blocks = self.most_blocks(ids.numel(), tile.rows) if schedule else ids.numel()
        programs = min(blocks * columns, processors(ids.device)) if tile.persistent else blocks * columns
        constants = dict(zip(CONSTANTS, tile, strict=True))
        return Launch(kernel, (programs,), args, {**constants, "SORTED": schedule is not None})


@functools.cache
def processors(device: torch.device) -> int:
    """How many SMs a GPU has; 1 of anything else."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


# --- tuning ----------------------------------------------------------------------------------------------------------

Seconds = Callable[[Sequence[Callable[[], Any]]], float]


def tune(
    experts: TritonExperts, x: torch.Tensor, routings: Sequence[torch.Tensor], weights: torch.Tensor,
    seconds: Seconds, limit: float,
) -> Plan:  # fmt: skip
    """Sets and returns the quickest plan for ``x`` and the ``routings`` (ids), which take turns.

    ``seconds`` times a list of calls. Each product is timed alone, and has to give what the first tile gives; once
    ``limit`` seconds are over, only what a plan needs at least is tried.
    """
    stop = time.perf_counter() + limit
    by_expert = len(x) > 1  # the experts of a single token are distinct: nothing to sort
    size = routings[0].numel()
    mean = size / routings[0].unique().numel()
    best: list[tuple[float, Plan]] = []
    for rows in rows_worth_trying(mean):
        schedules = [experts.schedule(ids, rows) if by_expert else None for ids in routings]
        h, pairs = x.new_empty(size, experts.intermediate), x.new_empty(size, experts.hidden)
        launches: list[dict[Tile, list[Launch]]] = [
            {
                tile: [experts.gate_up_launch(x, h, *turn, tile) for turn in zip(routings, schedules, strict=True)]
                for tile in GATE_UP[rows]
                if not (experts.intermediate % tile.columns or experts.hidden % tile.depth)
            },
            {
                tile: [
                    experts.down_launch(h, pairs, ids, weights, schedule, tile)
                    for ids, schedule in zip(routings, schedules, strict=True)
                ]
                for tile in DOWN[rows]
                if not (experts.hidden % tile.columns or experts.intermediate % tile.depth)
            },
        ]
        compile_all([runs[0] for candidates in launches for runs in candidates.values()])
        results = (h, pairs)
        found = [
            _quickest(candidates, result, seconds, stop) for candidates, result in zip(launches, results, strict=True)
        ]
        if None not in found:
            best.append((sum(took for took, _ in found), Plan(*(tile for _, tile in found), by_expert)))
        if time.perf_counter() > stop and best:
            break
    experts.plan = min(best)[1]
    return experts.plan


def rows_worth_trying(mean: float) -> list[int]:
    """Rows of a block for experts that get ``mean`` tokens: from about a quarter of that to four times that.

    >>> rows_worth_trying(1), rows_worth_trying(40), rows_worth_trying(1000)
    ([16], [16, 32, 64, 128], [128, 256])
    """
    return [rows for rows in GATE_UP if min(mean, 500) / 4 < rows <= max(16, 4 * mean)]


def _quickest(
    candidates: dict[Tile, list[Launch]], result: torch.Tensor, seconds: Seconds, stop: float
) -> tuple[float, Tile] | None:
    times: list[tuple[float, Tile]] = []
    wanted = None
    for tile, runs in candidates.items():
        if times and time.perf_counter() > stop:
            break
        result.fill_(math.nan)
        try:
            runs[0]()
        except triton.runtime.errors.OutOfResources:  # more shared memory or registers than this GPU has
            continue
        if wanted is None:
            wanted = result.clone()
        elif not float((result - wanted).norm()) < 0.01 * float(wanted.norm()):
            print(f"triton: {runs[0].kernel.__name__} is wrong with {tile}")
            continue
        times.append((seconds(runs), tile))
    if wanted is not None:
        result.copy_(wanted)  # so that a product that follows reads what it would: other numbers take other power
    return min(times, default=None)


def compile_all(launches: Sequence[Launch]) -> None:
    """Compiles the kernels of ``launches``, on all cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for launch in launches:
            launch.compile()
