"""What says where tokens go: ids and weights that are given, or the logits of a router. Either is one launch.

Both answer the same questions, so that what follows (:mod:`~nmsparse.cuda.experts`) need not know which it is:
``arrays`` (of the caller), ``settings`` (what a launch depends on beside them and the layer), ``varying`` (itself, with
addresses that a recording replaces); and of that ``top_k``, ``check`` (does it fit the tokens?), ``launch`` (for a
layer) and ``operands`` (the addresses that a call of it begins with).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from ..errors import NMSparseError
from . import array
from .arena import COUNTER_BYTES, arena
from .array import DeviceArray
from .config_route import DispatchConfig, RouteConfig
from .dlpack import BFLOAT16
from .driver import Varying
from .route import Dispatch, Route, Sorted

__all__ = ["IDS", "Given", "Logits", "logits_of", "places", "route"]

IDS = {np.dtype(np.int32): "s32", np.dtype(np.int64): "s64"}
FLOATS = {np.dtype(np.float32): "f32", np.dtype(np.float16): "f16", BFLOAT16: "bf16"}


def _names(dtypes: Iterable[np.dtype]) -> str:
    return " or ".join(dtype.name for dtype in dtypes)


def _varying(given: Any, number: int) -> DeviceArray:
    """A view of ``given`` whose address is value ``number`` of a recording."""
    held = array.view(given)
    return DeviceArray(Varying(held.pointer, number), held.shape, held.dtype, held.device, held, held.strides)


class Given(NamedTuple):
    """``ids`` int32 or int64 and ``weights`` float32, float16 or bfloat16, both ``(…, k)`` in C order."""

    ids: Any
    weights: Any

    settings = None

    @property
    def arrays(self) -> tuple[Any, ...]:
        return self

    def varying(self, first: int) -> Given:
        """Views of the arrays, which are the values from number ``first`` on of a recording."""
        return Given(_varying(self.ids, first), _varying(self.weights, first + 1))

    @property
    def top_k(self) -> int:
        return self.ids.shape[-1]

    def check(self, tokens: int, experts: int, device: int) -> None:
        """Raise NMSparseError unless this routes ``tokens`` tokens on GPU number ``device``."""
        for name, given, kinds in (("topk_ids", self.ids, IDS), ("topk_weights", self.weights, FLOATS)):
            if given.dtype not in kinds or not given.contiguous or given.device != device or not given.ndim:
                raise NMSparseError(
                    f"experts: expected {name} in C order on cuda:{device} as {_names(kinds)}, got {given!r}"
                )
        if self.ids.size != tokens * self.top_k or self.weights.shape != self.ids.shape:
            raise NMSparseError(
                f"experts: expected ids and weights ({tokens}, k), got {tuple(self.ids.shape)} and "
                f"{tuple(self.weights.shape)}"
            )

    def launch(self, experts: int, device: int, copies: bool = False, kept: int | None = None) -> Dispatch:
        """What sorts such a routing among ``experts`` experts."""
        ids, weights = IDS[self.ids.dtype], FLOATS[self.weights.dtype]
        return Dispatch(DispatchConfig(experts, self.top_k, ids, weights, copies, kept), device)

    def operands(self, ids: int, weights: int) -> tuple[int, ...]:
        """The last of them is where float32 weights are, at ``weights`` if these are not."""
        return self.ids.pointer, self.weights.pointer, self.weights.pointer if self._ready else weights

    @property
    def _ready(self) -> bool:
        return self.weights.dtype == np.float32


class Logits(NamedTuple):
    """``logits (T, E)`` float32, float16 or bfloat16, rows at any distance, for a :class:`nmsparse.moe.Router`.

    ``bias (E,)`` is float32. Whether the router fits the experts has been checked; values are not looked at.
    """

    logits: DeviceArray
    router: Any
    bias: DeviceArray | None = None

    @property
    def settings(self) -> Any:
        return self.router

    @property
    def arrays(self) -> tuple[Any, ...]:
        return (self.logits,) if self.bias is None else (self.logits, self.bias)

    def varying(self, first: int) -> Logits:
        """The same arrays as the values from number ``first`` on of a recording."""
        bias = None if self.bias is None else _varying(self.bias, first + 1)
        return Logits(_varying(self.logits, first), self.router, bias)

    @property
    def top_k(self) -> int:
        return self.router.top_k

    def check(self, tokens: int, experts: int, device: int) -> None:
        """Raise NMSparseError unless this routes ``tokens`` tokens among ``experts`` on GPU number ``device``."""
        logits, bias = self.logits, self.bias
        fits = logits.dtype in FLOATS and logits.device == device and tuple(logits.shape) == (tokens, experts)
        if not fits or (experts > 1 and logits.strides[1] != 1):
            wanted = f"{_names(FLOATS)}[{tokens}, {experts}] on cuda:{device}, rows contiguous"
            raise NMSparseError(f"logits: expected {wanted}; got {logits!r} with strides {tuple(logits.strides)}")
        if bias is not None and not (
            bias.dtype == np.float32 and tuple(bias.shape) == (experts,) and bias.contiguous and bias.device == device
        ):
            raise NMSparseError(f"bias: expected float32[{experts}] on cuda:{device} in C order, got {bias!r}")

    def launch(self, experts: int, device: int, copies: bool = False, kept: int | None = None) -> Route:
        """What routes among ``experts`` experts, and sorts."""
        given = FLOATS[self.logits.dtype], self.bias is not None
        return _route(self.router, experts, device, *given, copies, kept)

    def operands(self, ids: int, weights: int) -> tuple[int, ...]:
        """Ids and float32 weights are written to ``ids`` and ``weights``; the latter is the last."""
        pitch = self.logits.strides[0] if len(self.logits) > 1 else self.logits.shape[1]
        return self.logits.pointer, pitch, 0 if self.bias is None else self.bias.pointer, ids, weights


def logits_of(logits: Any, router: Any, bias: Any = None) -> Logits:
    """Anybody's arrays on a GPU as :class:`Logits`; raises NMSparseError for a router that does not fit them."""
    view = array.view(logits)
    if view.ndim != 2:
        raise NMSparseError(f"logits: expected shape (tokens, experts), got {tuple(view.shape)}")
    router.check(view.shape[1])
    return Logits(view, router, None if bias is None else array.view(bias))


@functools.lru_cache(maxsize=256)
def _route(router: Any, experts: int, device: int, dtype: str, bias: bool, copies: bool, kept: int | None) -> Route:
    settings = dataclasses.asdict(router)
    return Route(RouteConfig(experts, **settings, dtype=dtype, bias=bias, copies=copies, kept=kept), device)


def places(*sizes: int) -> list[int]:
    """Where pieces of so many bytes begin in an arena, after its zeros, at multiples of 256; last, where they end.

    >>> places(100, 300)[1] - places(100, 300)[0]
    256
    """
    found = [-(-COUNTER_BYTES // 256) * 256]
    for size in sizes:
        found.append(found[-1] + -(-size // 256) * 256)
    return found


def route(like: Any, given: Logits) -> tuple[Any, Any]:
    """Ids int32 and weights float32 ``(T, k)`` as :func:`nmsparse.moe.route`, arrays of the library of ``like``.

    One launch on the current stream of ``like``; the host does not wait.
    """
    kind, (tokens, experts) = array.kind_of(like), given.logits.shape
    device = given.logits.device
    given.check(tokens, experts, device)
    shape = tokens, given.top_k
    ids, weights = kind.empty(like, shape, np.dtype(np.int32)), kind.empty(like, shape, np.dtype(np.float32))
    if tokens:
        stream, pairs = kind.stream(like), tokens * given.top_k
        slots, rows, plan, end = places(4 * pairs, 4 * pairs, 8 * experts)
        start = arena(device, stream, end)
        to = Sorted(start + slots, start + rows, start + plan, start)
        found = kind.address(ids, shape, np.dtype(np.int32)), kind.address(weights, shape, np.dtype(np.float32))
        given.launch(experts, device)(stream, *given.operands(*found), to, tokens, 1)
    return ids, weights
