"""The choice of a kernel, by a model of its time that can be printed and checked against measurements.

The model knows four things about a device: how fast its tensor cores multiply tiles that lie in shared memory, how
fast one SM can be fed, how fast the memory is, and what a launch and an exchange of partial sums cost. A product takes
the launch, then the longer of the busiest SM's steps and the memory's bytes; they overlap but for a twentieth. Without
a pipeline (:func:`gemv_plan`) trips to the memory count too, and less overlaps. ``NMSPARSE_PRINT_CONFIG=1`` prints each
choice once.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd

from ..errors import NMSparseError
from . import config_mma
from .config import SHIPPED, SHIPPED_GEMV, SHIPPED_GEMV_SAMOYEDS, SHIPPED_SAMOYEDS, GemmConfig, GemvConfig
from .config_mma import MmaConfig
from .layout import BLOCK, BLOCK_BYTES, blocks_of
from .schedule import cluster_of

__all__ = ["H200", "Device", "Plan", "Problem", "candidates", "choose", "plans"]


@dataclass(frozen=True)
class Device:
    """What the model knows of a GPU: rates in FLOP/s (skipped zeros count) and bytes/s, costs in seconds."""

    sms: int
    memory: float  # bytes/s of the whole GPU
    arch: str = "sm_90a"
    feed: float = 92.4e9  # bytes/s into the shared memory of one SM, from L2
    stream: float = 39e9  # the same, from memory, with the ring of one consumer
    stream_2: float = 67.7e9  # and with that of two, which holds more
    token_feed: float = 43.9e9  # bytes/s of tokens into one SM, by its threads
    start: float = 1.82e-6  # launch of the kernel for few tokens, and its end
    launch: float = 2.1e-6  # launch of a pipelined kernel, until its ring is filled
    exchange: float = 1.4e-6  # of partial sums between CTAs, besides the bytes
    exchange_part: float = 0.344e-6  # for each part of a tile
    exchange_feed: float = 68.8e9  # bytes/s of the partial sums of a CTA
    meet: float = 0.917e-6  # until the CTAs of a cluster have met and have their sums, besides the bytes
    cluster_feed: float = 23.1e9  # bytes/s of sums from the other CTAs of a cluster

    @property
    def hopper(self) -> bool:
        """Whether it has ``wgmma`` and the bulk copy engine."""
        return self.arch == "sm_90a"

    def clusters(self, size: int) -> int:
        """How many clusters of ``size`` CTAs run at once, each within one of the groups that SMs come in."""
        return ACTIVE_CLUSTERS[size] * self.sms // H200.sms

    def multiply(self, config: GemmConfig | MmaConfig) -> float:
        """FLOP/s of one SM on tiles of ``config``.

        ``wgmma.sp``: the measured ceilings with operands in place, of which the kernel reaches 86 % when it also has to
        fetch them.
        Samoyeds: the steps of small tiles; those of large ones take as long as their bytes.
        ``mma.sp``: what the kernel reached, most with 128 sums a thread, least where it loads single elements.
        """
        if isinstance(config, MmaConfig):
            if not config.vector or config.gather:
                return MMA_ELEMENTS / 132
            return (MMA_LARGE if config.sums >= 128 else MMA) / 132
        shared = 1.0 if config.pairs else 0.86
        rates = SAMOYEDS if config.pairs else WGMMA
        for tokens, rate in rates:
            if config.tile_t >= tokens:
                return shared * rate / 132
        return shared * rates[-1][1] / 132 * config.tile_t / rates[-1][0]


# FLOP/s of an H200's 132 SMs; benchmarks/LOG.md
WGMMA = ((256, 1362e12), (192, 1304e12), (128, 1250e12), (64, 1090e12))
SAMOYEDS = ((96, 2530e12), (64, 1222e12))
STEP = 0.0225e-6  # seconds of a step of Samoyeds besides the bytes that it brings, for which wgmma does not wait
END = 0.181e-6  # seconds of the additions at the end of a run, where products take longer than bytes: 128 tokens
COPIED = 1.03  # of `memory`, what pipelined kernels get
LOADED = 1.1  # and what the kernel for few tokens gets, besides its other costs
ROUND = 0.276e-6  # seconds of a trip to memory with all blocks that a CTA has under way
ISSUE = 0.0477e-6  # seconds more for each block that a warp asks for in a trip
OVERLAP = 0.284  # of what takes less time than memory, tokens or trips, whichever takes most
ADD = 0.0236e-6  # seconds for the sums of a warp
WAVE = 1.05e-6  # seconds between CTAs that follow each other on an SM
UNEVEN = 0.354  # of the time for the bytes, by how much more the busiest SM has than the mean
EPILOGUE = 1.52e-6  # seconds after a tile of Samoyeds with 128 tokens in which nothing is multiplied
POWER = 0.332  # how much faster few SMs are than all of them, which draw more power
MMA_LARGE, MMA, MMA_ELEMENTS = 575e12, 395e12, 165e12
MOST_PARTS = 8
FEW = {16: 64, 4: 16}  # tokens up to which the kernel without a pipeline is taken, by the bytes of its copies
CLUSTERED = 256  # tokens up to which clusters share tiles: (2048, 1024, 1408) took a third more
ACTIVE_CLUSTERS = {2: 66, 3: 39, 4: 30, 5: 22, 6: 17, 7: 15, 8: 15}  # cuOccupancyMaxActiveClusters, one CTA an SM

H200 = Device(sms=132, memory=4.2e12)


@dataclass(frozen=True)
class Problem:
    """``Y (tokens, rows) = X (tokens, columns) · Wᵀ`` with a weight whose blocks are 2:4."""

    rows: int
    tokens: int
    columns: int
    dtype: str = "f16"
    bias: bool = False
    alignment: int = 16  # of the address of X and of the bytes between its rows: 16, 4 or 2
    gather: tuple[int, int] | None = None  # (v, m) of V:N:M
    run: int = 0  # V of Samoyeds 1:2

    @property
    def packed_rows(self) -> int:
        """Rows that are stored."""
        return -(-self.rows // 2) if self.run else self.rows

    @property
    def k_blocks(self) -> int:
        """Blocks of 64 along K, as packed: of the condensed columns of V:N:M."""
        condensed = -(-self.columns // self.gather[1]) * 4 if self.gather else self.columns
        return blocks_of(self.rows, condensed)[1]

    @property
    def nbytes(self) -> int:
        """Bytes that have to move: packed weights, X and Y once."""
        return -(-self.packed_rows // BLOCK) * self.k_blocks * BLOCK_BYTES + 2 * self.tokens * (
            self.columns + self.rows
        )


@dataclass(frozen=True)
class Plan:
    """A config, how many CTAs run it, how many tiles are split into how many parts, the modelled time.

    Where no tile is split, ``parts`` CTAs form a cluster and share each tile.
    """

    config: GemmConfig | GemvConfig | MmaConfig
    workers: int
    split: int
    parts: int
    seconds: float

    def __post_init__(self) -> None:
        if self.cluster > 1 and self.cluster not in (fit := getattr(self.config, "clusters", ())):
            raise NMSparseError(
                f"{self.config.name}: clusters of {self.cluster} CTAs cannot share a tile; expected one of {fit}, or "
                "split tiles"
            )

    @property
    def cluster(self) -> int:
        """CTAs of a cluster."""
        return cluster_of(True, self.split, self.parts)

    def describe(self) -> str:
        """In a few words.

        >>> choose(Problem(4096, 64, 14336)).describe()
        'gemm 64x64x128, 128 CTAs in clusters of 2'
        """
        shape = f"{self.config.name}, {self.workers} CTAs"
        if self.split:
            return f"{shape}, {self.split} tiles in {self.parts} parts"
        return f"{shape} in clusters of {self.cluster}" if self.cluster > 1 else shape


def tiles_of(config: GemmConfig | GemvConfig | MmaConfig, problem: Problem) -> int:
    """How many tiles a product has."""
    return -(-problem.rows // config.tile_m) * -(-problem.tokens // config.tile_t)


def grid(config: GemmConfig | MmaConfig, problem: Problem) -> tuple[int, int]:
    """Tiles, and steps of k of each."""
    return tiles_of(config, problem), problem.k_blocks * BLOCK // config.tile_k


def candidates(config: GemmConfig | MmaConfig, problem: Problem, device: Device) -> Iterator[Plan]:
    """The ways to deal the tiles of ``config``: all of them whole, or those that do not fill a wave split along k, or
    each shared by a cluster.
    """
    (tiles, steps), most = grid(config, problem), device.sms
    # As few CTAs as are done in the same time: each draws power, and power limits large tiles.
    even = -(-tiles // -(-tiles // most)) if config.tile_t >= 128 else most
    yield _plan(config, problem, device, min(even, tiles), 0, 1)
    if split := tiles % most:
        for parts in range(2, min(MOST_PARTS, steps, most // split) + 1):
            workers = most if tiles > most else split * parts
            yield _plan(config, problem, device, workers, split, parts)
    if problem.tokens <= CLUSTERED:
        for cluster in getattr(config, "clusters", ()):
            if cluster <= steps and tiles <= device.clusters(cluster):
                yield _plan(config, problem, device, tiles * cluster, 0, cluster)


def _plan(
    config: GemmConfig | MmaConfig, problem: Problem, device: Device, workers: int, split: int, parts: int
) -> Plan:
    tiles, steps = grid(config, problem)
    cluster = cluster_of(True, split, parts)
    whole = -(-(tiles - split) * cluster // workers)
    path = -(-whole * steps // cluster) + (-(-steps // parts) if split else 0)
    pairs = getattr(config, "pairs", False)
    weights = config.tile_m // (2 * BLOCK if pairs else BLOCK) * config.weight_bytes
    flops = 2 * config.tile_m * config.tile_t * config.tile_k
    # One pass over the weights comes from memory; tokens that do not exist are written as zeros all the same.
    padding = 2 * max(config.tile_t - problem.tokens, 0) * config.tile_k
    stream = device.stream if getattr(config, "warpgroups", 1) == 1 else device.stream_2
    cold = (weights + padding) / stream if problem.tokens <= 2 * config.tile_t else 0.0
    brought = (weights + config.token_bytes) / device.feed
    multiplied = flops / device.multiply(config)
    if problem.run and isinstance(config, GemmConfig):
        multiplied += END * config.tile_k / problem.run if config.tile_t == 128 else 0.0
        brought += STEP
    step = max(multiplied, brought, cold)
    partial = 4 * config.tile_m * config.tile_t
    exchange = device.exchange + parts * (device.exchange_part + partial / device.exchange_feed) if split else 0.0
    if cluster > 1:
        sums = 4 * config.sums * 128 * config.warpgroups
        exchange = device.meet + sums * (1 - 1 / cluster) / device.cluster_feed
    busy, moving = path * step, problem.nbytes / (COPIED * device.memory)
    if pairs:
        if config.tile_t >= 128:
            busy *= 1 - POWER * (1 - workers / device.sms)
        busy += (whole / cluster + bool(split)) * EPILOGUE * config.tile_m * config.tile_t / (256 * 128)
    seconds = device.launch + max(busy, moving) + 0.05 * min(busy, moving) + exchange
    return Plan(config, workers, split, parts, seconds)


def gemv_plan(config: GemvConfig, problem: Problem, device: Device) -> Plan:
    """A CTA for each 16 packed rows and each tile of tokens, of which every CTA reads all columns, from L2; what has no
    place on the SMs at once comes in a second wave. Fitted to copies of 16 bytes; those of 4 were not timed."""
    ctas = tiles_of(config, problem)
    waves, busiest = -(-ctas // (device.sms * config.ctas)), -(-ctas // device.sms)
    moving = problem.nbytes / (LOADED * device.memory)
    brought = busiest * 2 * min(problem.tokens, config.tile_t) * problem.columns / device.token_feed
    trips = (ROUND + ISSUE * config.batch) * waves * -(-problem.k_blocks // (config.warps * config.batch))
    most = max(moving, brought, trips)
    late = WAVE * (waves - 1) + ADD * config.warps
    if ctas > device.sms:  # some SMs have one CTA more than others
        late += UNEVEN * (busiest * device.sms / ctas - 1) * moving
    seconds = device.start + most + OVERLAP * (moving + brought + trips - most) + late
    return Plan(config, ctas, 0, 1, seconds)


def plans(problem: Problem, device: Device) -> Iterator[Plan]:
    """Every way to compute ``problem`` on ``device``: ``wgmma.sp`` on Hopper for tokens that the copy engine can read,
    ``mma.sp`` for all else, straight from memory for few tokens."""
    kind = {"dtype": problem.dtype, "bias": problem.bias}
    vector = problem.alignment >= 16 and not problem.gather
    if device.hopper and vector:
        for config in SHIPPED_SAMOYEDS if problem.run else SHIPPED:
            if not problem.run or config.tile_k == gcd(problem.run, 2 * BLOCK):  # steps as long as runs allow
                yield from candidates(replace(config, **kind), problem, device)
    else:
        for config in config_mma.SHIPPED_SAMOYEDS if problem.run else config_mma.SHIPPED:
            config = replace(config, **kind, vector=vector, gather=problem.gather)
            if not config.problems(device.arch) and problem.run % config.tile_k == 0:
                yield from candidates(config, problem, device)
    if not problem.gather and problem.tokens <= FEW.get(problem.alignment, 0):
        for config in SHIPPED_GEMV_SAMOYEDS if problem.run else SHIPPED_GEMV:
            if not (config := replace(config, **kind, width=problem.alignment)).problems():
                yield gemv_plan(config, problem, device)


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem, device: Device = H200) -> Plan:
    """The plan with the least modelled time; :class:`~nmsparse.errors.NMSparseError` if nothing can compute it.

    >>> plan = choose(Problem(8192, 8192, 8192))
    >>> plan.config.tile_m, plan.config.tile_t, plan.workers
    (128, 256, 128)
    """
    best = min(plans(problem, device), key=lambda plan: (plan.seconds, plan.workers, plan.config.tile_t), default=None)
    if best is None:
        raise NMSparseError(f"no kernel for {problem} on {device.arch}; V:N:M needs v as a multiple of 64")
    if os.environ.get("NMSPARSE_PRINT_CONFIG") == "1":
        print(f"nmsparse: {problem}: {best.describe()}, modelled {best.seconds * 1e6:.1f} µs", file=sys.stderr)
    return best
