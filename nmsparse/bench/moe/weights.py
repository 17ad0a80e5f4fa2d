"""Random expert weights that obey a pattern, and the exact result of a layer for a few tokens, in torch."""

from __future__ import annotations

from itertools import combinations
from typing import Any

from ...errors import NMSparseError, require
from ...formats.pattern import NM, VNM, Samoyeds, parse

__all__ = ["exact", "random_weight", "relative_error"]


def random_weight(shape: tuple[int, int, int], pattern: str, device: str, dtype: Any, generator: Any) -> Any:
    """A tensor (E, M, K) of normal values with variance 1 / K, zero where a random choice of ``pattern`` keeps nothing;
    ``"dense"`` keeps all. Pruning it to the pattern changes nothing."""
    torch = require("torch", "torch")
    w = torch.empty(shape, dtype=dtype, device=device).normal_(0, shape[-1] ** -0.5, generator=generator)
    return w if pattern == "dense" else w.mul_(_mask(torch, shape, parse(pattern), device, generator))


def _mask(torch: Any, shape: tuple[int, int, int], pattern: Any, device: str, generator: Any) -> Any:
    experts, rows, columns = shape

    def keep(n: int, m: int, *groups: int) -> Any:
        """Random n of m, bool ``(*groups, m)``."""
        table = torch.tensor([[i in chosen for i in range(m)] for chosen in combinations(range(m), n)], device=device)
        return table[torch.randint(len(table), groups, device=device, generator=generator)]

    if isinstance(pattern, NM):
        return keep(pattern.n, pattern.m, experts, rows, columns // pattern.m).view(shape)
    if isinstance(pattern, Samoyeds):
        down, along = rows // pattern.m, columns // pattern.v
        kept = keep(pattern.n, pattern.m, experts, down, along).transpose(2, 3).reshape(experts, rows, along, 1)
        pairs = keep(2, 4, experts, rows, columns // 4).view(experts, rows, along, pattern.v)
        return pairs.logical_and_(kept).view(shape)
    if isinstance(pattern, VNM):
        down, along = rows // pattern.v, columns // pattern.m
        block = keep(4, pattern.m, experts, down, along).nonzero()[:, -1].view(experts, down, 1, along, 4)
        pairs = keep(2, 4, experts, down, pattern.v, along)
        mask = torch.zeros(experts, down, pattern.v, along, pattern.m, dtype=torch.bool, device=device)
        return mask.scatter_(-1, block.expand(pairs.shape), pairs).view(shape)
    raise NMSparseError(f"pattern {pattern}: expected one of the formats NM, VNM and Samoyeds")


def exact(x: Any, ids: Any, weights: Any, gate_up: Any, down: Any) -> Any:
    """The outputs (T, H) of experts with SwiGLU in float64, from unrounded intermediate results: meant for few tokens.
    An expert's weights become float64 one after the other."""
    torch = require("torch", "torch")
    y = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for e in ids.unique().tolist():
        token, place = (ids == e).nonzero(as_tuple=True)
        gate, up = (x[token].double() @ gate_up[e].double().mT).chunk(2, -1)
        h = torch.nn.functional.silu(gate) * up * weights[token, place, None].double()
        y.index_add_(0, token, h @ down[e].double().mT)
    return y


def relative_error(got: Any, want: Any) -> float:
    """Norm of the difference over the norm of what is wanted; inf where anything is NaN."""
    error = float((got.double() - want).norm() / want.norm())
    return error if error == error else float("inf")
