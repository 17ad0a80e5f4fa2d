"""The routing of a sparse MoE layer on a GPU, in one launch: from router logits or given ids to the plan of a product.

What a grouped product needs is written to memory that is sized for the worst case, so that the host never waits and a
CUDA graph serves every routing. The kernels are in :mod:`nmsparse.cuda.kernels.route`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..errors import NMSparseError
from . import launch

__all__ = ["Dispatch", "DispatchConfig", "EndsConfig", "Route", "RouteConfig", "counters", "plan_of_ends"]

MAX_EXPERTS, MAX_TOP_K, MAX_GROUPS = 512, 32, 32  # a warp's registers and lanes
EXPERT_BITS = 10  # of the 32 that a slot's expert and rank take together
MAX_TOKENS = 1 << 32 - EXPERT_BITS
TINY = 1e-20  # added to a sum of weights before dividing by it, as nmsparse.moe.router does
FEW_THREADS = 256  # of a CTA for few tokens
TOKENS_OF_A_WARP = 2  # as many as one CTA takes before there are others: meeting them costs as much


class _Config:
    """What sorting ``experts`` experts with CTAs of ``threads`` threads takes."""

    experts: int
    threads: int

    copies = False

    @property
    def most_threads(self) -> int:
        """Of a CTA for many tokens."""
        return 1024

    @property
    def warps(self) -> int:
        return self.threads // 32

    @property
    def numbers(self) -> int:
        """Experts of a lane."""
        return -(-self.experts // 32)

    @property
    def shared_bytes(self) -> int:
        """A count and a start for each expert."""
        return 8 * self.experts


@dataclass(frozen=True)
class RouteConfig(_Config):
    """The settings of :class:`nmsparse.moe.Router` for ``experts`` experts and logits of ``dtype``.

    >>> RouteConfig(experts=64, top_k=6).problems(), RouteConfig(experts=1024, top_k=6).problems()
    ([], ['experts=1024: 1 to 512, which a warp has registers for'])
    """

    experts: int
    top_k: int
    scoring: str = "softmax"
    renormalize: bool = False
    num_groups: int = 1
    topk_groups: int = 1
    group_score: str = "max"
    scale: float = 1.0
    bias: bool = False
    dtype: str = "f32"
    threads: int = 1024

    @property
    def signature(self) -> str:
        """Letters of the arguments: logits, bias, ids, weights, slots, rows, plan, counters; tokens, tokens of a tile,
        pitch of the logits."""
        return "ppppppppiii"

    @property
    def chunk(self) -> int:
        """Slots next to each other that one CTA has: those of a token for each warp."""
        return self.warps * self.top_k

    @property
    def most_threads(self) -> int:
        """Of a CTA for many tokens; what a lane keeps of 16 experts with a bias takes more than 64 registers."""
        return 512 if self.bias and self.numbers > 8 else 1024

    @property
    def limits_groups(self) -> bool:
        return self.topk_groups < self.num_groups

    @property
    def top2(self) -> bool:
        """Whether a group is worth its two best experts."""
        return self.group_score == "top2"

    def problems(self) -> list[str]:
        """Why the config cannot run; empty if it can. What every router needs, Router says."""
        found = []
        if not 1 <= self.experts <= MAX_EXPERTS:
            found.append(f"experts={self.experts}: 1 to {MAX_EXPERTS}, which a warp has registers for")
        if not 1 <= self.top_k <= min(MAX_TOP_K, self.experts):
            found.append(f"top_k={self.top_k}: 1 to {MAX_TOP_K}, a lane for each, and at most the experts")
        if self.num_groups > MAX_GROUPS:
            found.append(f"num_groups={self.num_groups}: at most {MAX_GROUPS}, a lane for each")
        if self.dtype not in ("f32", "f16", "bf16"):
            found.append(f"dtype={self.dtype}: the logits are f32, f16 or bf16")
        return found


@dataclass(frozen=True)
class DispatchConfig(_Config):
    """A routing that is given: the types of its ``ids`` ("s32", "s64") and ``weights`` ("f32", "f16", "bf16").

    >>> DispatchConfig(experts=8, top_k=2, ids="u8").problems()
    ['ids=u8: the ids are s32 or s64']
    """

    experts: int
    top_k: int
    ids: str = "s32"
    weights: str = "f32"
    copies: bool = False  # the tokens, into the order of the positions
    threads: int = 1024

    @property
    def signature(self) -> str:
        """Letters of the arguments: ids, their weights, float32 weights, slots, rows, plan, counters, X, its copy;
        tokens, tokens of a tile, pitch of X, pieces of eight columns."""
        return "pppppppppiiii"

    @property
    def chunk(self) -> int:
        """Slots next to each other that one CTA has: few where it also copies their tokens."""
        return 64 if self.copies else self.threads

    @property
    def most_threads(self) -> int:
        """Of a CTA for many tokens; copies want many CTAs."""
        return FEW_THREADS if self.copies else 1024

    @property
    def converts(self) -> bool:
        """Whether the weights are written as float32."""
        return self.weights != "f32"

    def problems(self) -> list[str]:
        """Why the config cannot run; empty if it can."""
        found = []
        if not 1 <= self.experts <= MAX_EXPERTS:
            found.append(f"experts={self.experts}: 1 to {MAX_EXPERTS}, which a warp has registers for")
        if self.top_k < 1:
            found.append(f"top_k={self.top_k}: at least one expert for each token")
        if self.ids not in ("s32", "s64"):
            found.append(f"ids={self.ids}: the ids are s32 or s64")
        if self.weights not in ("f32", "f16", "bf16"):
            found.append(f"weights={self.weights}: the weights are f32, f16 or bf16")
        return found


@dataclass(frozen=True)
class EndsConfig(_Config):
    """Rows that are sorted already: the type of their ``ends`` ("s32", "s64")."""

    experts: int
    ids: str = "s32"
    threads: int = 32

    @property
    def signature(self) -> str:
        """Letters of the arguments: ends, plan; tokens of a tile."""
        return "ppi"

    @property
    def shared_bytes(self) -> int:
        return 0


def _ends(config: EndsConfig) -> Any:
    from .kernels.route import make_ends
    from .tile.gpu import route

    return make_ends(route.make_ends(config), config)


def plan_of_ends(experts: int, ids: str, device: int, stream: int, ends: int, plan: int, tile_t: int) -> None:
    """The plan of ``ends (E,)`` of ``ids`` on the device: ``[ends, cumulative tiles of tile_t]``, int32 ``(2, E)``."""
    launch.kernel_of(EndsConfig(experts, ids), device)(1, stream, ends, plan, tile_t)


def _route(config: RouteConfig) -> Any:
    from .kernels.route import make_route
    from .tile.gpu import route

    return make_route(route.make_route(config), config)


def _dispatch(config: DispatchConfig) -> Any:
    from .kernels.route import make_dispatch
    from .tile.gpu import route

    return make_dispatch(route.make_dispatch(config), config)


launch.TEXTS.update({RouteConfig: _route, DispatchConfig: _dispatch, EndsConfig: _ends})


def counters(experts: int) -> int:
    """How many int32 counters a launch needs: zero before it, zero again after it, and its stream's alone.

    >>> counters(64)
    66
    """
    return experts + 2  # how many CTAs have arrived, and left


class _Launch:
    """A config on a device; its kernels are loaded when a number of tokens first asks for one."""

    def __init__(self, config: Any, device: int):
        if problems := config.problems():
            raise NMSparseError(f"{config}: {'; '.join(problems)}")
        self.config, self.device, self.sms = config, device, launch.model_of(device).sms
        self._kernels: dict[int, Any] = {}

    def _kernel(self, tokens: int, work: int) -> tuple[Any, int]:
        """The kernel and the number of CTAs for ``work`` warps' worth of tokens."""
        if tokens >= MAX_TOKENS or tokens * self.config.top_k >= 1 << 30:
            raise NMSparseError(f"route: expected fewer than {MAX_TOKENS} tokens and 2**30 slots, got {tokens} tokens")
        threads = FEW_THREADS if 32 * work <= FEW_THREADS else self.config.most_threads
        kernel = self._kernels.get(threads)
        if kernel is None:
            kernel = self._kernels[threads] = launch.kernel_of(replace(self.config, threads=threads), self.device)
        warps = threads // 32
        return kernel, 1 if work <= TOKENS_OF_A_WARP * warps else min(self.sms, -(-work // warps))


class Route(_Launch):
    """Routes tokens from their logits and sorts them by expert: ``Route(config, device)(stream, …)``, one launch.

    Reads ``logits (tokens, E)`` of ``config.dtype``, rows ``pitch`` elements apart, and with ``config.bias`` a float32
    ``bias (E,)``; all are addresses. Writes, with S = tokens·k slots:

    =============  ==================  =============================================================================
    ``ids``        int32 (tokens, k)   the experts of each token, by descending weight
    ``weights``    float32 (tokens,k)  theirs, as :func:`nmsparse.moe.route` says, to a few ulp
    ``slots``      int32 (tokens, k)   position of each slot in the order by expert
    ``rows``       int32 (S,)          token of each position
    ``plan``       int32 (2, E)        cumulative ends of the experts' positions, and of their tiles of ``tile_t``
    =============  ==================  =============================================================================

    ``counters`` are :func:`counters` int32 zeros, for launches that follow each other. Positions within an expert may
    come in another order in every run. Does not allocate and does not wait; up to one CTA an SM, all at the same time.
    A NaN among the logits of a token makes its weights NaN, and its experts arbitrary.
    """

    def __call__(
        self,
        stream: int,
        logits: int,
        pitch: int,
        bias: int,
        ids: int,
        weights: int,
        slots: int,
        rows: int,
        plan: int,
        counters: int,
        tokens: int,
        tile_t: int,
    ) -> None:
        kernel, grid = self._kernel(tokens, tokens)
        kernel(grid, stream, logits, bias, ids, weights, slots, rows, plan, counters, tokens, tile_t, pitch)


class Dispatch(_Launch):
    """Sorts a given routing by expert: ``Dispatch(config, device)(stream, …)``, one launch.

    Reads ``ids (tokens, k)`` and, unless they are float32 already, ``given (tokens, k)``, the weights, of which it then
    writes ``weights`` in float32. The other outputs are those of :class:`Route`, but an id outside of 0..E-1 is
    dropped: its slot is -1, and fewer rows are written. With ``config.copies`` the rows of ``x``, ``x_pitch`` elements
    apart, go to ``x_sorted (S, 8·pieces)`` in the order of the positions, 16 bytes at a time.
    """

    def __call__(
        self,
        stream: int,
        ids: int,
        given: int,
        weights: int,
        slots: int,
        rows: int,
        plan: int,
        counters: int,
        tokens: int,
        tile_t: int,
        x: int = 0,
        x_sorted: int = 0,
        x_pitch: int = 0,
        pieces: int = 0,
    ) -> None:
        number = tokens * self.config.top_k
        kernel, grid = self._kernel(tokens, -(-number // 32))
        if self.config.copies:
            grid = max(1, min(self.sms, -(-number // self.config.chunk)))
        sizes = tokens, tile_t, x_pitch, pieces
        kernel(grid, stream, ids, given, weights, slots, rows, plan, counters, x, x_sorted, *sizes)
