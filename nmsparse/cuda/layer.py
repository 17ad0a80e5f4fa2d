"""An MoE layer on a GPU, tokens in and tokens out: a product makes the logits, each set of experts is four launches.

The product is one of the library that ``x`` belongs to, in float32: the router's weight is small. A shared expert is
routed like any other, by one more row of that product: its gate and a sigmoid or, where it has no gate, zeros and a
softmax over a single expert, which is 1. What it makes of a token is the base that the routed experts' sum ends with.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from . import array
from .array import DeviceArray, Kind
from .experts import Experts
from .routing import Logits, route

__all__ = ["Layer", "Routed"]


class Routed(NamedTuple):
    """Experts, the :class:`nmsparse.moe.Router` of their tokens, and its float32 weight (E, H) and bias (E,)."""

    experts: Experts
    router: Any
    weight: np.ndarray
    bias: np.ndarray | None = None


class Layer:
    """``layer(x)`` for ``x (…, H)`` on the GPU of the experts, of their dtype; ``shared`` is added to ``routed``."""

    def __init__(self, routed: Routed, shared: Routed | None = None):
        self.device, self.sets = routed.experts.device, [routed] if shared is None else [routed, shared]
        self.weight = array.from_host(np.concatenate([part.weight for part in self.sets]), self.device)
        self.biases = [None if s.bias is None else array.from_host(s.bias, self.device) for s in self.sets]
        self.products: dict[Kind, Any] = {}

    def __call__(self, x: Any) -> Any:
        """Nothing on the host depends on the routing, and nothing waits; one product, and four launches a set."""
        y = None
        for part, logits in reversed(list(zip(self.sets, self.logits(x), strict=True))):
            y = part.experts.run(x, logits, y)
        return y

    def route(self, x: Any) -> tuple[Any, Any]:
        """The routed experts (T, k) of the tokens of ``x`` and their weights, of the kind of ``x``."""
        return route(x, self.logits(x)[0])

    def logits(self, x: Any) -> list[Logits]:
        """For each set of experts the columns of one product."""
        kind = array.kind_of(x)
        tokens = self.sets[0].experts.check(kind.view(x))
        if kind not in self.products:
            self.products[kind] = kind.linear(self.weight)
        whole, found, first = kind.view(self.products[kind](x)), [], 0
        for part, bias in zip(self.sets, self.biases, strict=True):
            shape, strides = (tokens, len(part.weight)), (len(self.weight), 1)
            columns = DeviceArray(whole.pointer + 4 * first, shape, whole.dtype, self.device, whole, strides)
            found.append(Logits(columns, part.router, bias))
            first += len(part.weight)
        return found
