"""The experts of an MoE layer on a GPU: four launches, whatever the routing.

1. sort the routing by expert (:mod:`~nmsparse.cuda.route`);
2. gate and up of all experts in one product, the activation in its epilogue; tokens are gathered inside, or, where
   experts are wide and tokens many, copied into order by the sort: each is read so often that the copy costs less;
3. down of all experts;
4. each token adds up its experts' rows, in fp32 and in the order of its choices (:mod:`~nmsparse.cuda.combine`).

What depends on the routing stays on the device: the host knows how many tokens there are, and nothing waits. A CUDA
graph of a call may be replayed with other tokens and other routings.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np

from ..errors import NMSparseError
from . import array, driver
from .array import DeviceArray
from .combine import Combine
from .config_route import MAX_EXPERTS, CombineConfig, DispatchConfig
from .pack import DTYPES
from .projection import Projection
from .route import Dispatch, counters, plan_of_ends

__all__ = ["Experts", "grouped_matmul", "tile_of"]

IDS = {"int32": "s32", "int64": "s64"}
WEIGHTS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
WIDE, MANY = 2048, 100  # neurons of an expert, and tokens for each, from which on tokens are copied; benchmarks/LOG.md
FEW_TOKENS = 8  # what the kernel without a pipeline takes of each expert


def active_experts(tokens: int, top_k: int, experts: int) -> float:
    """How many experts get a token when routing is uniform.

    >>> round(active_experts(8, 2, 8), 1)
    7.2
    """
    return experts * (1 - (1 - top_k / experts) ** tokens)


def tile_of(tokens: int, top_k: int, experts: int, widest: int) -> int:
    """Tokens of a tile: as many as an expert usually gets, so that its weights are read once.

    One and a half standard deviations above the mean of a Poisson distribution: of uniformly routed experts, about
    93 % get no more.

    >>> [tile_of(tokens, 8, 64, 128) for tokens in (1, 64, 256, 512, 4096)]
    [8, 16, 64, 128, 128]
    """
    mean = tokens * top_k / active_experts(tokens, top_k, experts)
    usual = mean + 1.5 * mean**0.5
    return next((tile for tile in (8, 16, 32, 64, 128, 256) if usual <= tile), widest) if usual < widest else widest


class _Call(NamedTuple):
    """What a call with one number of tokens launches."""

    tile_t: int
    dispatch: Dispatch
    combine: Combine
    gate_up: tuple[Any, int]  # config, grid
    down: tuple[Any, int]
    places: tuple[int, ...]  # of plan, slots, rows, weights, h, d and the copy of the tokens in the arena
    nbytes: int


class Experts:
    """Both projections of all experts, ready to be called: ``experts(x, topk_ids, topk_weights)``."""

    def __init__(self, gate_up: Any, down: Any, activation: str):
        gated = gate_up.shape[1] == 2 * down.shape[2]
        self.gate_up, self.down = Projection(gate_up, gated, activation), Projection(down, False, "identity")
        self.device, self.dtype = self.down.device, down.dtype
        self.experts, self.hidden, self.width = down.shape
        if self.gate_up.device != self.device:
            raise NMSparseError(f"experts: gate_up is on cuda:{self.gate_up.device}, down on cuda:{self.device}")
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
        kind = array.kind_of(x)
        view, ids, weights = kind.view(x), array.view(topk_ids), array.view(topk_weights)
        tokens, top_k = self._check(view, ids, weights)
        y = kind.empty(x, tuple(view.shape), view.dtype)
        if not tokens:
            return y
        key = tokens, top_k, ids.dtype.name, weights.dtype.name
        call = self.calls.get(key)
        if call is None:
            call = self.calls[key] = self._prepare(*key)
        stream = kind.stream(x)
        base = _arena(self.device, stream, call.nbytes)
        plan, slots, rows, scaled, h, d, x_sorted = (base + place for place in call.places)
        if weights.dtype == np.float32:
            scaled = weights.pointer
        pitch, pairs = view.strides[-2] if view.ndim > 1 and tokens > 1 else self.hidden, tokens * top_k
        addresses = ids.pointer, weights.pointer, scaled, slots, rows, plan, base
        if call.dispatch.config.copies:
            copy = view.pointer, x_sorted, pitch, self.hidden // 8
            call.dispatch(stream, *addresses, tokens, call.tile_t, *copy)
            self.gate_up(*call.gate_up, stream, x_sorted, self.hidden, pairs, rows, plan, h)
        else:
            call.dispatch(stream, *addresses, tokens, call.tile_t)
            self.gate_up(*call.gate_up, stream, view.pointer, pitch, tokens, rows, plan, h)
        self.down(*call.down, stream, h, self.width, pairs, rows, plan, d)
        call.combine(
            stream,
            d,
            self.hidden,
            slots,
            scaled,
            kind.address(y, y.shape, self.dtype),
            self.hidden,
            tokens,
            self.hidden,
        )
        return y

    def configs(self, tokens: int, top_k: int) -> list[Any]:
        """The kernels that take long to compile, so that :func:`~nmsparse.cuda.launch.compile_all` can do it ahead."""
        call = self._prepare(tokens, top_k, "int64", "float32")
        return [call.gate_up[0], call.down[0]]

    def _check(self, x: DeviceArray, ids: DeviceArray, weights: DeviceArray) -> tuple[int, int]:
        """Tokens and choices of each."""
        if x.dtype != self.dtype or x.device != self.device or x.shape[-1:] != (self.hidden,):
            wanted = f"{self.dtype.name}[…, {self.hidden}] on cuda:{self.device}"
            raise NMSparseError(f"experts: expected x as {wanted}, as the weights are, got {x!r}")
        tokens = x.size // self.hidden
        if x.strides[-1] != 1 or (tokens > 1 and (x.strides[-2] % 8 or (x.ndim > 2 and not x.contiguous))):
            raise NMSparseError(f"experts: expected x contiguous, or rows at multiples of 16 bytes; got {x!r}")
        if x.pointer % 16:
            raise NMSparseError(f"experts: expected x at a multiple of 16 bytes, got {x.pointer:#x}; copy it")
        for name, given, kinds in (("topk_ids", ids, IDS), ("topk_weights", weights, WEIGHTS)):
            if given.dtype.name not in kinds or not given.contiguous or given.device != self.device or not given.ndim:
                raise NMSparseError(f"experts: expected {name} in C order as {' or '.join(kinds)}, got {given!r}")
        top_k = ids.shape[-1]
        if ids.size != tokens * top_k or weights.shape != ids.shape:
            raise NMSparseError(
                f"experts: expected ids and weights ({tokens}, k), got {tuple(ids.shape)} and {tuple(weights.shape)}"
            )
        return tokens, top_k

    def _prepare(self, tokens: int, top_k: int, ids: str, weights: str) -> _Call:
        pairs, active = tokens * top_k, active_experts(tokens, top_k, self.experts)
        copies = self.width >= WIDE and pairs >= MANY * active
        # Samoyeds has three sums for each token; a gather keeps up with 128.
        sparser = "samoyeds" in (self.gate_up.kind, self.down.kind)
        tile_t = tile_of(tokens, top_k, self.experts, 256 if copies and not sparser else 128)
        few = tokens <= FEW_TOKENS and tile_t == FEW_TOKENS
        gate_up = self.gate_up.plan(tile_t, not copies, pairs, active, few)
        down = self.down.plan(tile_t, False, pairs, active, few)
        dispatch = DispatchConfig(self.experts, top_k, IDS[ids], WEIGHTS[weights], copies)
        combine = CombineConfig(top_k, DTYPES[self.dtype.name])
        sizes = (
            COUNTER_BYTES, 8 * self.experts, 4 * pairs, 4 * pairs, 4 * pairs, 2 * pairs * self.width,
            2 * pairs * self.hidden, 2 * pairs * self.hidden * copies,
        )  # fmt: skip
        *places, nbytes = itertools.accumulate(-(-size // 256) * 256 for size in sizes)
        around = Dispatch(dispatch, self.device), Combine(combine, self.device)
        return _Call(tile_t, *around, gate_up, down, tuple(places), nbytes)


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
    if ends.dtype.name not in IDS or ends.shape != (projection.experts,) or not ends.contiguous:
        raise NMSparseError(f"grouped_matmul: expected offsets int32 or int64[{projection.experts}], got {ends!r}")
    pairs = view.shape[0]
    y = kind.empty(x, (pairs, projection.outputs), view.dtype)
    if not pairs:
        return y
    stream = kind.stream(x)
    ready = projection.plans.get(pairs)
    if ready is None:
        tile_t = tile_of(pairs, 1, projection.experts, 128)
        active = min(projection.experts, pairs)
        ready = projection.plans[pairs] = tile_t, *projection.plan(tile_t, False, pairs, active)
    tile_t, config, grid = ready
    plan = _arena(projection.device, stream, COUNTER_BYTES + 8 * projection.experts) + COUNTER_BYTES
    plan_of_ends(projection.experts, IDS[ends.dtype.name], projection.device, stream, ends.pointer, plan, tile_t)
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


COUNTER_BYTES = 4 * counters(MAX_EXPERTS)  # those of any layer lie where no layer keeps anything else


_arenas: dict[tuple[int, int, int], list[DeviceArray]] = {}


def _arena(device: int, stream: int, nbytes: int) -> int:
    """Address of memory for the calls on ``stream``, which use it one after the other; it begins with zeros.

    A graph under capture gets its own, since it may be replayed beside the stream. What is outgrown stays, for a
    running kernel or a graph may still use it; each is twice as large as the last.
    """
    held = _arenas.setdefault((device, stream, driver.capture_id(stream)), [])
    if not held or held[-1].size < nbytes:
        size = max(nbytes, 2 * held[-1].size if held else 0)
        with driver.relaxed_capture():
            memory = array.empty((size,), np.uint8, device)
            zeros = np.zeros(COUNTER_BYTES, np.uint8)
            driver.copy_to_device(memory.pointer, zeros.ctypes.data, zeros.nbytes, device)
        held.append(memory)
    return held[-1].pointer
