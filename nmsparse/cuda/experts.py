"""The experts of an MoE layer on a GPU: four launches, whatever the routing.

1. sort the routing by expert, one that is given or that of a router's logits (:mod:`~nmsparse.cuda.routing`);
2. gate and up of all experts in one product, the activation in its epilogue; tokens are gathered inside, or, where
   experts are wide and tokens many, copied into order by the sort: each is read so often that the copy costs less;
3. down of all experts;
4. each token adds up its experts' rows, in fp32 and in the order of its choices (:mod:`~nmsparse.cuda.combine`).

From sm_90 on these launches overlap (:func:`~nmsparse.cuda.launch.overlaps`).

What depends on the routing stays on the device: the host knows how many tokens there are, and nothing waits. A CUDA
graph of a call may be replayed with other tokens and other routings.

Experts of several kinds are sorted by kind, once for all, and added up once for all; each kind has its own two
products: two launches, and two for each kind. The pairs of dropped experts get no position.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..errors import NMSparseError
from . import array
from .arena import arena
from .array import DeviceArray
from .combine import Combine
from .config_route import MAX_EXPERTS, CombineConfig
from .driver import Recording, Varying
from .pack import DTYPES
from .projection import Projection
from .route import NO_COPY, Copy, Dispatch, Route, Sorted, plan_of_ends
from .routing import IDS, Given, Logits, places

__all__ = ["Experts", "grouped_matmul", "tile_of"]

ROW = 8  # bytes of a plan for each expert
# Neurons of an expert and tokens for each from which on tiles are as wide as registers allow: of Samoyeds that is wider
# with tokens in order than with a gather, so they are copied. benchmarks/LOG.md
WIDE, MANY = 2048, {"samoyeds": 2000, "2:4": 500, "dense": 500}
WIDEST = {"samoyeds": 192, "2:4": 256, "dense": 256}
CALLS = 1024  # kinds of calls that a layer remembers
FEW_TOKENS = 8  # what the kernel without a pipeline takes of each expert


def active_experts(tokens: int, top_k: int, experts: int) -> float:
    """How many experts get a token when routing is uniform.

    >>> round(active_experts(8, 2, 8), 1)
    7.2
    """
    return experts * (1 - (1 - top_k / experts) ** tokens)


def tile_of(tokens: int, top_k: int, experts: int, kind: str) -> int:
    """Tokens of a tile of weights of ``kind``: as many as an expert usually gets, so that its weights are read once; of
    many tokens, what takes least.

    Usually: one and a half standard deviations above the mean of a Poisson distribution, of uniformly routed experts
    about 93 % get no more.

    >>> [tile_of(tokens, 8, 64, "2:4") for tokens in (1, 64, 256, 512, 8192)]
    [8, 16, 64, 96, 256]
    >>> tile_of(8192, 8, 64, "samoyeds")
    160
    """
    mean = tokens * top_k / active_experts(tokens, top_k, experts)
    usual = mean + 1.5 * mean**0.5
    if usual <= MOST:
        return next(tile for tile in (8, 16, 32, 64, 96, 128, MOST) if usual <= tile)
    return min(TILE_COST[kind], key=lambda tile: tiles_cost(mean, kind, tile))


MOST = 160  # tokens of a tile that is to hold all of an expert
# What a tile costs, and one of which half or less is tokens, in tiles of 128; fitted, benchmarks/LOG.md.
TILE_COST = {
    "samoyeds": {128: (1.0, 0.97), 160: (1.18, 0.92)},
    "2:4": {128: (1.0, 0.92), 160: (1.28, 1.07), 192: (1.38, 1.13), 256: (1.74, 1.40)},
    "dense": {128: (1.0, 1.0), 160: (1.23, 0.83), 192: (1.41, 1.16), 256: (1.87, 1.45)},
}
QUARTERS = np.arange(-8, 9) / 4  # of a standard deviation


def tiles_cost(mean: float, kind: str, tile: int) -> float:
    """Expected cost of an expert's tiles, whose tokens have this mean. The host does not know the routing, so half of
    the cost is of experts that are alike (normally distributed, as Poisson) and half of unequal ones (exponentially).

    >>> [round(tiles_cost(273, "samoyeds", tile), 1) for tile in (128, 160)]
    [2.7, 2.4]
    """
    whole, short = TILE_COST[kind][tile]

    def cost(tokens: np.ndarray) -> np.ndarray:
        full, left = np.divmod(tokens, tile)
        return full * whole + np.where(left < 0.5, 0.0, np.where(left <= tile / 2, short, whole))

    alike = np.average(cost(np.maximum(0.0, mean + QUARTERS * mean**0.5)), weights=np.exp(-(QUARTERS**2) / 2))
    unequal = cost(-mean * np.log((np.arange(64) + 0.5) / 64)).mean()
    return float(alike + unequal) / 2


@dataclass
class _Part:
    """``count`` experts of one kind, from place ``first`` of the layer's order on: weights, then their projections."""

    gate_up: Any
    down: Any
    first: int
    count: int


def _parts(gate_up: Any, down: Any) -> tuple[list[_Part], np.ndarray | None]:
    """The parts of a layer and the order of its experts in them, dropped ones last; None if they are one stack."""
    upper, lower = ({tuple(n): w for n, w in getattr(weight, "parts", ())} for weight in (gate_up, down))
    if not upper and not lower:
        return [_Part(gate_up, down, 0, down.shape[0])], None
    if upper.keys() != lower.keys():
        raise NMSparseError(
            f"experts on a GPU: expected the same experts to be of one kind in both projections, got {gate_up!r} and "
            f"{down!r}; let an expert have one pattern"
        )
    parts: list[_Part] = []
    order: list[int] = []
    for numbers, weight in upper.items():
        parts.append(_Part(weight, lower[numbers], len(order), len(numbers)))
        order += numbers
    order += sorted(set(range(down.shape[0])) - set(order))
    return parts, np.array(order, np.int32)


class _Products(NamedTuple):
    """How both projections are computed for one number of tokens."""

    tile_t: int
    copies: bool
    gate_up: list[tuple[Any, int]]  # config and grid for each kind of experts
    down: list[tuple[Any, int]]


@dataclass
class _Call:
    """What calls with arrays of the same shapes and kinds launch."""

    tokens: int
    products: Any = None  # _Products
    sort: Dispatch | Route | None = None
    combine: Combine | None = None
    places: tuple[int, ...] = ()  # of slots, rows, plan, ids, weights, h, d and the copied tokens in the arena; its end
    recorded: dict[tuple[int, int, int], Recording] = field(default_factory=dict)  # by stream, arena and thread


class Experts:
    """Both projections of all experts, ready to be called: ``experts(x, topk_ids, topk_weights)``.

    ``gate_up`` and ``down`` are what the kernels read of both, and take the place of the weights they were made of.
    """

    def __init__(self, gate_up: Any, down: Any, activation: str):
        gated = gate_up.shape[1] == 2 * down.shape[2]
        self.parts, order = _parts(gate_up, down)
        several = order is not None
        for part in self.parts:
            part.gate_up = Projection(part.gate_up, gated, activation, several)
            part.down = Projection(part.down, False, "identity", several)
        self.gate_up, self.down = self.parts[0].gate_up, self.parts[0].down
        self.device, self.dtype = self.down.device, down.dtype
        self.experts, self.hidden, self.width = down.shape
        if self.gate_up.device != self.device:
            raise NMSparseError(f"experts: gate_up is on cuda:{self.gate_up.device}, down on cuda:{self.device}")
        self.kept, self.order = None, None
        if several:
            self.gate_up = gate_up.with_weights([part.gate_up for part in self.parts])
            self.down = down.with_weights([part.down for part in self.parts])
            self.kept, self.order = sum(part.count for part in self.parts), array.from_host(order, self.device)
        if self.experts > MAX_EXPERTS or self.hidden % 8 or self.width % 8:
            raise NMSparseError(
                f"experts on a GPU: expected at most {MAX_EXPERTS} experts and widths that are multiples of 8, got "
                f"{self.experts}, hidden {self.hidden}, intermediate {self.width}"
            )
        self.calls: dict[tuple[Any, ...], _Call] = {}

    def __call__(self, x: Any, topk_ids: Any, topk_weights: Any) -> Any:
        """``y[t] = Σ_j weights[t, j] · down[e] act(gate_up[e] x[t])`` with e = ids[t, j], of the kind of ``x``.

        ``x`` (…, H) of the weights' dtype; ids int32 or int64 and weights float32, float16 or bfloat16 (…, k). Ids
        outside of 0..E-1 are left out; that a token names an expert twice is not noticed (looking would wait for the
        device). Runs on the caller's current stream.
        """
        return self.run(x, Given(array.comparable(topk_ids), array.comparable(topk_weights)))

    def run(self, x: Any, routing: Given | Logits, base: Any = None) -> Any:
        """As a call, of any routing; ``base``, of the shape and kind of ``x``, is added before the sum is rounded.

        A call is checked, and its launches described, when its like is first seen; then they are repeated.
        """
        x, arrays = array.comparable(x), routing.arrays
        kind, kinds = array.kind_of(x), [array.kind_of(one) for one in arrays]
        like = [of.signature(one) for of, one in zip(kinds, arrays, strict=False)]
        key = base is not None, routing.settings, kind.signature(x), *like
        call = self.calls.get(key)
        if call is None:
            if len(self.calls) >= CALLS:
                self.calls.clear()
            call = self.calls[key] = self._prepare(kind.view(x), routing, base is not None)
        y = kind.like(x, x.shape)
        if not call.tokens:
            return y
        at = kind.pointer(x)
        if at % 16:
            raise NMSparseError(f"experts: expected x at a multiple of 16 bytes, got {at:#x}; copy it")
        stream = kind.stream(x)
        start = arena(self.device, stream, call.places[-1])
        place = stream, start, threading.get_ident()
        launches = call.recorded.get(place)
        if launches is None:
            launches = call.recorded[place] = self._record(call, kind.view(x), routing, stream, start)
        given = [of.pointer(one) for of, one in zip(kinds, arrays, strict=False)]
        launches(at, kind.pointer(y), 0 if base is None else kind.pointer(base), *given)
        return y

    def _record(self, call: _Call, x: DeviceArray, routing: Given | Logits, stream: int, start: int) -> Recording:
        """The launches of a call: of x, y, base and the arrays of its routing."""
        (at, y, base), routing = (Varying(0, number) for number in range(3)), routing.varying(3)
        slots, rows, plan, ids, weights, h, d, x_sorted, _ = (start + place for place in call.places)
        tokens, pairs, products = call.tokens, call.tokens * routing.top_k, call.products
        pitch = x.strides[-2] if x.ndim > 1 and tokens > 1 else self.hidden
        source, copy = (at, pitch, tokens), NO_COPY
        if products.copies:
            source, copy = (x_sorted, self.hidden, pairs), Copy(at, x_sorted, pitch, self.hidden // 8)
        operands = routing.operands(ids, weights)
        order = 0 if self.order is None else self.order.pointer
        with Recording() as launches:
            call.sort(stream, *operands, Sorted(slots, rows, plan, start, order), tokens, products.tile_t, copy)
            for part, launch in zip(self.parts, products.gate_up, strict=True):
                part.gate_up(*launch, stream, *source, rows, plan + ROW * part.first, h)
            for part, launch in zip(self.parts, products.down, strict=True):
                part.down(*launch, stream, h, self.width, pairs, rows, plan + ROW * part.first, d)
            pitches = self.hidden  # y is new, and base another call's: both are aligned
            call.combine(stream, d, pitches, slots, operands[-1], y, pitches, tokens, self.hidden, base, pitches)
        return launches

    def configs(self, tokens: int, top_k: int) -> list[Any]:
        """The kernels that take long to compile, so that :func:`~nmsparse.cuda.launch.compile_all` can do it ahead."""
        products = self._products(tokens, top_k)
        return [config for config, _ in (*products.gate_up, *products.down)]

    def check(self, x: DeviceArray) -> int:
        """The number of tokens of ``x (…, H)``; raises NMSparseError for what the kernels cannot read."""
        if x.dtype != self.dtype or x.device != self.device or tuple(x.shape[-1:]) != (self.hidden,):
            wanted = f"{self.dtype.name}[…, {self.hidden}] on cuda:{self.device}"
            raise NMSparseError(f"experts: expected x as {wanted}, as the weights are, got {x!r}")
        tokens = x.size // self.hidden
        if x.strides[-1] != 1 or (tokens > 1 and (x.strides[-2] % 8 or (x.ndim > 2 and not x.contiguous))):
            raise NMSparseError(f"experts: expected x contiguous, or rows at multiples of 16 bytes; got {x!r}")
        return tokens

    def _products(self, tokens: int, top_k: int) -> _Products:
        pairs, active = tokens * top_k, active_experts(tokens, top_k, self.experts)
        kinds = {projection.kind for part in self.parts for projection in (part.gate_up, part.down)}
        kind = next(kind for kind in TILE_COST if kind in kinds)  # Samoyeds has registers for the fewest tokens
        many = self.width >= WIDE and pairs >= MANY[kind] * active
        tile_t = WIDEST[kind] if many else tile_of(tokens, top_k, self.experts, kind)
        copies = many and kind == "samoyeds"
        few = tokens <= FEW_TOKENS and tile_t == FEW_TOKENS
        gate_up, down = [], []
        for part in self.parts:
            share = part.count / self.experts
            load = pairs, active * share, few, share
            gate_up.append(part.gate_up.plan(tile_t, not copies, *load))
            down.append(part.down.plan(tile_t, False, *load))
        return _Products(tile_t, copies, gate_up, down)

    def _prepare(self, x: DeviceArray, routing: Given | Logits, base: bool) -> _Call:
        tokens, routing = self.check(x), routing.varying(0)
        routing.check(tokens, self.experts, self.device)
        if not tokens:
            return _Call(0)
        pairs, products = tokens * routing.top_k, self._products(tokens, routing.top_k)
        combine = CombineConfig(routing.top_k, DTYPES[self.dtype.name], base)
        # Of slots, rows, plan, ids, weights, h, d, and the copy of the tokens.
        sizes = (
            4 * pairs, 4 * pairs, ROW * (self.experts + 1), 4 * pairs, 4 * pairs,
            2 * pairs * self.width, 2 * pairs * self.hidden, 2 * pairs * self.hidden * products.copies,
        )  # fmt: skip
        sort = routing.launch(self.experts, self.device, products.copies, self.kept)
        return _Call(tokens, products, sort, Combine(combine, self.device), tuple(places(*sizes)))


def grouped_matmul(x: Any, weight: Any, offsets: Any) -> Any:
    """Rows ``offsets[e-1]:offsets[e]`` of ``x (S, K)`` times ``weight[e].T`` of ``weight (E, M, K)``: ``(S, M)``.

    Two launches, whatever the offsets, which stay on the device: int32 or int64 ``(E,)``, cumulative ends. They are not
    checked; rows beyond the last end are not written.
    """
    kind = array.kind_of(x)
    view, ends = kind.view(x), array.view(offsets)
    projection = _projection(weight)
    if view.ndim != 2 or view.shape[1] != projection.columns or view.dtype != projection.dtype:
        wanted = f"{projection.dtype.name}[S, {projection.columns}]"
        raise NMSparseError(f"grouped_matmul: expected x as {wanted} on cuda:{projection.device}, got {view!r}")
    aligned = view.strides[1] == 1 and not view.strides[0] % 8 and not view.pointer % 16
    if not aligned or projection.columns % 8 or projection.outputs % 8:
        raise NMSparseError(f"grouped_matmul: expected rows of x and y at multiples of 16 bytes, got {view!r}")
    if ends.dtype not in IDS or ends.shape != (projection.experts,) or not ends.contiguous:
        raise NMSparseError(f"grouped_matmul: expected offsets int32 or int64[{projection.experts}], got {ends!r}")
    pairs = view.shape[0]
    y = kind.empty(x, (pairs, projection.outputs), view.dtype)
    if not pairs:
        return y
    stream = kind.stream(x)
    ready = projection.plans.get(pairs)
    if ready is None:
        tile_t = tile_of(pairs, 1, projection.experts, projection.kind)
        active = min(projection.experts, pairs)
        ready = projection.plans[pairs] = tile_t, *projection.plan(tile_t, False, pairs, active)
    tile_t, config, grid = ready
    at, end = places(8 * projection.experts)
    plan = arena(projection.device, stream, end) + at
    plan_of_ends(projection.experts, IDS[ends.dtype], projection.device, stream, ends.pointer, plan, tile_t)
    to = kind.address(y, tuple(y.shape), view.dtype)
    projection(config, grid, stream, view.pointer, view.strides[0], pairs, 0, plan, to)
    return y


def _projection(weight: Any) -> Projection:
    """The prepared form of ``weight``, made at first use and kept with it."""
    try:
        return weight._cuda_projection
    except AttributeError:
        weight._cuda_projection = Projection(weight, False, "identity")
        return weight._cuda_projection
