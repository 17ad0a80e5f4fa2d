"""Configs of the kernels around the experts: routing, sorting by expert, combining."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "EXPERT_BITS",
    "FEW_THREADS",
    "MAX_EXPERTS",
    "TINY",
    "CombineConfig",
    "DispatchConfig",
    "EndsConfig",
    "RouteConfig",
]

MAX_EXPERTS, MAX_TOP_K, MAX_GROUPS = 512, 32, 32  # a warp's registers and lanes
EXPERT_BITS = 10  # of the 32 that a slot's expert and rank take together
TINY = 1e-20  # added to a sum of weights before dividing by it, as nmsparse.moe.router does
FEW_THREADS = 256  # of a CTA for few tokens


class _Config:
    """What sorting ``experts`` experts with CTAs of ``threads`` threads takes."""

    experts: int
    threads: int
    copies: bool
    kept: int | None

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
    copies: bool = False  # the tokens, into the order of the positions
    kept: int | None = None  # experts that have an order of their own, and how many of them are not dropped
    threads: int = 1024
    overlaps: bool = False  # with the launches around it: nmsparse.cuda.launch.overlaps

    @property
    def signature(self) -> str:
        """Letters of the arguments: logits, bias, ids, weights, slots, rows, plan, counters, order, X, its
        copy; tokens, tokens of a tile, pitch of X, pieces of eight columns, pitch of the logits."""
        return "pppppppppppiiiii"

    @property
    def chunk(self) -> int:
        """Slots next to each other that one CTA has: those of a token for each warp."""
        return self.warps * self.top_k

    @property
    def most_threads(self) -> int:
        """Of a CTA for many tokens; what a lane keeps of 16 experts with a bias takes more than 64 registers, and
        copies want many CTAs."""
        return FEW_THREADS if self.copies else 512 if self.bias and self.numbers > 8 else 1024

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
    kept: int | None = None  # experts that have an order of their own, and how many of them are not dropped
    threads: int = 1024
    overlaps: bool = False  # with the launches around it: nmsparse.cuda.launch.overlaps

    @property
    def signature(self) -> str:
        """Letters of the arguments: ids, their weights, float32 weights, slots, rows, plan, counters, order, X, its
        copy; tokens, tokens of a tile, pitch of X, pieces of eight columns."""
        return "ppppppppppiiii"

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


@dataclass(frozen=True)
class CombineConfig:
    """``aligned``: rows of ``d``, ``base`` and ``y`` begin at multiples of 16 bytes and have whole pieces of 8 columns.

    >>> CombineConfig(top_k=0, dtype="f32").problems()
    ['top_k=0: at least one expert for each token', 'dtype=f32: the rows are f16 or bf16']
    """

    top_k: int
    dtype: str = "f16"
    base: bool = False
    aligned: bool = True
    threads: int = 128
    overlaps: bool = False  # with the launches around it: nmsparse.cuda.launch.overlaps

    @property
    def signature(self) -> str:
        """Letters of the arguments: d, slots, weights, base, y; tokens, columns, pieces of eight columns of a row,
        pitches of d, base and y."""
        return "pppppiiiiii"

    @property
    def batch(self) -> int:
        """Rows that a thread has under way: 16 bytes of each, in four registers."""
        return min(self.top_k, 8)

    @property
    def shared_bytes(self) -> int:
        return 0

    def problems(self) -> list[str]:
        """Why the config cannot run; empty if it can."""
        found = []
        if self.top_k < 1:
            found.append(f"top_k={self.top_k}: at least one expert for each token")
        if self.dtype not in ("f16", "bf16"):
            found.append(f"dtype={self.dtype}: the rows are f16 or bf16")
        return found
