"""``Y = X · Wᵀ`` on a GPU: prepare the weight once, choose a kernel for each number of tokens, launch it.

What depends only on the weight and the number of tokens is looked up; what depends on the call is two addresses, a
stream and a tensor map. No Numba, no synchronisation, no allocation but the output's.
"""

from __future__ import annotations

import math
import threading
from typing import Any, NamedTuple

from ..errors import NMSparseError, UnsupportedDeviceError
from ..formats import SparseArray
from ..formats.nm import is_24
from . import array, driver, launch
from .array import DeviceArray
from .choose import Plan, Problem, choose, grid, tiles_of
from .config import GemmConfig, GemvConfig
from .config_mma import MmaConfig
from .driver import Recording, Varying
from .layout import BLOCK
from .pack import DTYPES, as_24, packed

__all__ = ["Operand", "matmul", "operand"]

MAPS = 512  # launches remembered for each weight and number of tokens, and kinds of tokens for each weight


class Operand:
    """A weight in the layout of the kernels, with the launches that were prepared for it."""

    def __init__(self, weight: SparseArray):
        values, pattern = weight.values, weight.pattern
        gathers, self.run = weight.format == "vnm", runs_of(weight)
        if weight.ndim != 2 or not (gathers or self.run or (weight.format == "nm" and is_24(pattern))):
            raise UnsupportedDeviceError(
                f"matmul on a GPU: expected one 2:4, V:N:M or Samoyeds 1:2 matrix, got {weight!r}; multiply with its "
                "todense()"
            )
        if values.dtype.name not in DTYPES:
            raise NMSparseError(
                f"matmul on a GPU: expected float16 or bfloat16 values, got {weight!r}; use its astype()"
            )
        self.rows, self.columns = weight.shape
        self.device, self.dtype, self.kind = values.device, values.dtype, DTYPES[values.dtype.name]
        self.gather = (pattern.v, pattern.m) if gathers else None
        self.indices = weight.indices
        self.blocks = packed(weight)
        self.places: dict[tuple[Any, ...], _Place] = {}  # by the signature of the tokens
        self.launches: dict[tuple[int, bool, int], Launch] = {}

    def runs(self, columns: int) -> tuple[int, int]:
        """Of Samoyeds, the steps of ``columns`` columns in a run and the number of runs; 1 and 1 of others."""
        return (max(1, self.run // columns), self.indices.shape[-1]) if self.run else (1, 1)


class _Place(NamedTuple):
    """Of tokens: how many, elements between them, the shape of their product, its launch at a multiple of 16 bytes."""

    tokens: int
    pitch: int
    wanted: tuple[int, ...]
    usual: Launch | None


class Launch:
    """A plan with its kernel, for one weight and number of tokens: ``launch(stream, x, pitch of x, y, bias)``.

    What it launches is described once for a stream, a thread and a workspace, and then repeated.
    """

    mapped = False  # whether the address of x is part of the description

    def __init__(self, weight: Operand, plan: Plan, tokens: int):
        config = plan.config
        self.weight, self.plan, self.tokens = weight, plan, tokens
        self.kernel, self.grid = launch.kernel_of(config, weight.device, plan.cluster), plan.workers
        self.k_blocks, self.pieces = weight.blocks.shape[1], (plan.split, plan.parts)
        slots, sums = getattr(config, "partial_slots", (0, 0))
        slots *= self.grid if plan.split else 0
        self.room = slots * sums, slots
        self.recorded: dict[tuple[Any, ...], Recording] = {}

    def partials(self, stream: int) -> tuple[int, int]:
        """Addresses of the partial sums and flags, if the plan splits tiles; other ones for each graph."""
        if not self.plan.split:
            return 0, 0
        space = launch.workspace(self.weight.device, stream, *self.room)
        return space.partial_pointer, space.flag_pointer

    def __call__(self, stream: int, x: int, pitch: int, y: int, bias: int) -> None:
        partials = self.partials(stream)
        place = stream, threading.get_ident(), pitch, x if self.mapped else 0, partials
        launches = self.recorded.get(place)
        if launches is None:
            if len(self.recorded) >= MAPS:
                self.recorded.clear()
            with Recording() as launches:
                self.launch(stream, Varying(x, 0), pitch, Varying(y, 1), Varying(bias, 2), partials)
            self.recorded[place] = launches
        launches(x, y, bias)

    def launch(self, stream: int, x: int, pitch: int, y: int, bias: int, partials: tuple[int, int]) -> None:
        """What a call launches."""
        raise NotImplementedError


def runs_of(weight: SparseArray) -> int:
    """V of a Samoyeds weight that the kernels multiply as it is, else 0."""
    pattern = weight.pattern
    if weight.format == "samoyeds" and (pattern.n, pattern.m) == (1, 2) and pattern.v % BLOCK == 0:
        return pattern.v
    return 0


def check_clusters(plan: Plan, problem: Problem) -> None:
    """Raise unless each tile has a cluster, if CTAs come in clusters, and each CTA a step."""
    cluster, (tiles, steps) = plan.cluster, grid(plan.config, problem)
    if cluster > 1 and (plan.workers != tiles * cluster or cluster > steps):
        raise NMSparseError(
            f"matmul: expected {cluster} CTAs for each of {tiles} tiles with {steps} steps, at least one a CTA, got a "
            f"plan of {plan.workers}"
        )


def check_tiles(plan: Plan, problem: Problem) -> None:
    """Raise unless a plan of the kernel for few tokens has a CTA for each of its tiles."""
    tiles = tiles_of(plan.config, problem)
    if plan.workers != tiles:
        raise NMSparseError(f"matmul: expected a plan of {tiles} CTAs for {problem.tokens} tokens, got {plan.workers}")


def check_alignment(config: Any, bits: int) -> None:
    """Raise unless the kernel can read rows of x whose address and distance in bytes, or-ed, are ``bits``."""
    if bits % config.width:
        raise NMSparseError(
            f"matmul: {config.name} reads rows at multiples of {config.width} bytes, got {bits & -bits}"
        )


class GemmLaunch(Launch):
    """The ``wgmma.sp`` kernel; its tokens come through a tensor map, which is of an address."""

    mapped = True

    def __init__(self, weight: Operand, plan: Plan, tokens: int):
        check_clusters(plan, Problem(weight.rows, tokens, weight.columns))
        super().__init__(weight, plan, tokens)
        self.box = plan.config.tile_t, BLOCK
        self.head, self.tail = (weight.blocks.pointer,), (weight.rows, tokens, weight.rows, self.k_blocks, *self.pieces)
        if weight.run:
            self.head += (weight.indices.pointer,)
            self.tail += weight.runs(plan.config.tile_k)

    def launch(self, stream: int, x: int, pitch: int, y: int, bias: int, partials: tuple[int, int]) -> None:
        shape = self.tokens, self.weight.columns
        tensor_map = driver.tensor_map(x, shape, (2 * pitch,), self.box, self.weight.kind)
        self.kernel(self.grid, stream, *self.head, tensor_map, y, bias, *partials, *self.tail)


class MmaLaunch(Launch):
    """The ``mma.sp`` kernel, of any address and pitch, and of V:N:M."""

    def __init__(self, weight: Operand, plan: Plan, tokens: int):
        super().__init__(weight, plan, tokens)
        self.index = 0 if weight.indices is None else weight.indices.pointer
        self.tail = *self.pieces, *weight.runs(plan.config.tile_k)

    def launch(self, stream: int, x: int, pitch: int, y: int, bias: int, partials: tuple[int, int]) -> None:
        weight = self.weight
        addresses = weight.blocks.pointer, x, self.index, y, bias
        sizes = weight.rows, self.tokens, weight.columns, self.k_blocks, pitch, weight.rows
        self.kernel(self.grid, stream, *addresses, *partials, *sizes, *self.tail)


class GemvLaunch(Launch):
    """The kernel for few tokens."""

    def __init__(self, weight: Operand, plan: Plan, tokens: int):
        check_tiles(plan, Problem(weight.rows, tokens, weight.columns, run=weight.run))
        super().__init__(weight, plan, tokens)
        self.head = weight.blocks.pointer, weight.indices.pointer if weight.run else 0
        self.runs = weight.runs(BLOCK)

    def launch(self, stream: int, x: int, pitch: int, y: int, bias: int, partials: tuple[int, int]) -> None:
        weight = self.weight
        sizes = weight.rows, self.tokens, weight.columns, pitch, weight.rows, self.k_blocks
        self.kernel(self.grid, stream, *self.head, x, y, bias, *sizes, *self.runs)


LAUNCHES = {GemmConfig: GemmLaunch, GemvConfig: GemvLaunch, MmaConfig: MmaLaunch}


def operand(weight: SparseArray) -> Operand:
    """The prepared form of ``weight``, made at first use and kept with it."""
    try:
        return weight._cuda_operand
    except AttributeError:
        if weight.format == "samoyeds" and not runs_of(weight):
            weight._cuda_operand = operand(as_24(weight))
        else:
            weight._cuda_operand = Operand(weight)
        return weight._cuda_operand


def matmul(x: Any, weight: SparseArray, *, out: Any = None, bias: Any = None, config: Plan | None = None) -> Any:
    """``x`` ``(…, K)`` times the transpose of a 2:4, V:N:M or Samoyeds ``weight`` ``(M, K)``, plus ``bias`` ``(M,)``:
    ``(…, M)``.

    ``x`` is an array on the weight's GPU, of torch, cupy or anything with DLPack, float16 or bfloat16 as the weight,
    its last axis contiguous; rows may be any distance apart, multiples of 16 bytes are fastest, and leading axes that
    leave gaps cost a launch for each index of the first. The result is of the same kind, or is written to ``out``, and
    comes on the caller's stream. ``config`` forces a :class:`~nmsparse.cuda.choose.Plan`. Sums are fp32, in the same
    order in every call. Raises :class:`~nmsparse.errors.NMSparseError` where shapes or dtypes do not fit.
    """
    x, sparse, weight = array.comparable(x), weight, operand(weight)
    kind = array.kind_of(x)
    like = kind.signature(x)
    tokens, pitch, wanted, usual = weight.places.get(like) or _place(kind.view(x), weight, like)
    if out is None:
        out = kind.like(x, wanted)
        to = kind.pointer(out)
    else:
        to = array.kind_of(out).address(out, wanted, weight.dtype)
        if to is None:
            held = array.view(out)
            raise NMSparseError(f"matmul: expected out as contiguous {weight.dtype.name}{[*wanted]}, got {held!r}")
    if not tokens or not weight.rows:
        return out
    if pitch < 0:
        for i in range(wanted[0]):
            matmul(x[i], sparse, out=out[i], bias=bias, config=config)
        return out
    pointer = kind.pointer(x)
    if config is None and bias is None and usual and not pointer & 15:
        usual(kind.stream(x), pointer, pitch, to, 0)
        return out
    bits = pointer | 2 * pitch
    if config is None:
        # What the copy engine needs of an address and a pitch, 16 bytes; what copies of two columns need, 4.
        alignment = 16 if not bits & 15 else 4 if not bits & 3 and not weight.columns & 1 else 2
        ready = _launch(weight, tokens, bias is not None, alignment)
    else:
        check_alignment(config.config, bits)
        ready = LAUNCHES[type(config.config)](weight, config, tokens)
    ready(kind.stream(x), pointer, pitch, to, 0 if bias is None else _bias(bias, weight))
    return out


def _place(x: DeviceArray, weight: Operand, like: tuple[Any, ...]) -> _Place:
    """What is known of tokens that are ``like`` x."""
    shape = tuple(x.shape)
    if shape[-1:] != (weight.columns,) or x.dtype != weight.dtype or x.device != weight.device:
        raise _mismatch(x, weight)
    tokens, pitch, usual = math.prod(shape[:-1]), _row_pitch(x), None
    if tokens and weight.rows and pitch >= 0 and not pitch % 8:
        usual = _launch(weight, tokens, False, 16)
    if len(weight.places) >= MAPS:
        weight.places.clear()
    found = weight.places[like] = _Place(tokens, pitch, (*shape[:-1], weight.rows), usual)
    return found


def _launch(weight: Operand, tokens: int, bias: bool, alignment: int) -> Launch:
    """The chosen launch, remembered."""
    key = tokens, bias, alignment
    ready = weight.launches.get(key)
    if ready is None:
        ready = weight.launches[key] = _choose(weight, *key)
    return ready


def _choose(weight: Operand, tokens: int, bias: bool, alignment: int) -> Launch:
    problem = Problem(weight.rows, tokens, weight.columns, weight.kind, bias, alignment, weight.gather, weight.run)
    plan = choose(problem, launch.model_of(weight.device))
    return LAUNCHES[type(plan.config)](weight, plan, tokens)


def _row_pitch(x: DeviceArray) -> int:
    """Elements between the rows of ``x`` seen as (tokens, K); -1 if they are not at one distance."""
    strides, shape = x.strides, x.shape
    if len(shape) == 2 and strides[1] == 1 and shape[0] > 1:
        return strides[0]
    if len(shape) == 1:
        return shape[0]
    if strides[-1] != 1 and shape[-1] != 1:
        raise NMSparseError(f"matmul: expected x with a contiguous last axis, got {x!r} with strides {strides}")
    for axis in range(len(shape) - 2):
        if strides[axis] != strides[axis + 1] * shape[axis + 1] and shape[axis] != 1:
            return -1
    return strides[-2] if shape[-2] != 1 or len(shape) > 2 else shape[-1]


def _bias(bias: Any, weight: Operand) -> int:
    view = array.view(bias)
    if view.shape != (weight.rows,) or view.dtype != weight.dtype or not view.contiguous:
        raise NMSparseError(f"matmul: expected bias as {weight.dtype.name}[{weight.rows}], got {view!r}")
    return view.pointer


def _mismatch(x: DeviceArray, weight: Operand) -> NMSparseError:
    wanted = f"{weight.dtype.name}[…, {weight.columns}] on cuda:{weight.device}"
    return NMSparseError(f"matmul: expected x as {wanted}, the weight's dtype, columns and device, got {x!r}")
