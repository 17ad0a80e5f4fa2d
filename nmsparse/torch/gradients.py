"""Gradients of products with sparse weights.

With ``y = x Wᵀ`` the gradient of ``x`` is ``dy W``: it reduces along M, the rows of W. Sparse tensor cores skip along
the axis that is reduced, and here the pattern runs along K. They could run ``dy W`` only if ``Wᵀ`` were 2:4 as well: a
*transposable* mask (Hubara et al., 2021), which no pattern of ours promises. So W is decoded, one matrix at a time, and
the product is dense. The gradient of the weight is ``dyᵀ x`` at the kept positions, dense arithmetic too.

Sums on the host are at least float32. No gradient of a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .decode import gather, scatter

__all__ = ["ACTIVATIONS", "experts", "grouped_linear", "linear"]

# ``nmsparse.reference.ACTIVATIONS`` in torch.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "identity": lambda x: x,
}


def linear(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    indices: Tensor | None,
    pattern: str,
    shape: Sequence[int],
    *,
    need_x: bool = True,
    need_values: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """``dx`` and ``dvalues`` of ``y = x Wᵀ`` for ``dy`` = ``grad``; plain torch, which a compiler sees through."""
    wide = _wide(grad)
    dx = dvalues = None
    if need_x:
        dx = (grad.to(wide) @ scatter(values, meta, indices, pattern, shape).to(wide)).to(x.dtype)
    if need_values:
        dense = grad.to(wide).flatten(0, -2).mT @ x.to(wide).flatten(0, -2)
        dvalues = gather(dense, meta, indices, pattern).to(values.dtype)
    return dx, dvalues


def grouped_linear(
    grad: Tensor,
    x: Tensor,
    offsets: Tensor,
    values: Tensor,
    meta: Tensor,
    indices: Tensor | None,
    pattern: str,
    shape: Sequence[int],
    need_values: bool,
) -> tuple[Tensor, Tensor]:
    """``dx`` and ``dvalues`` of ``nmsparse::grouped_linear``; reads the offsets on the host.

    Without ``need_values``, as when only adapters around frozen experts train, ``dvalues`` is not computed: it is 0.
    """
    dx, dvalues = x.new_empty(x.shape), torch.zeros_like(values)
    for expert, rows in _groups(offsets):
        one = _one((values, meta, indices, pattern, shape), expert)
        dx[rows], found = linear(grad[rows], x[rows], *one, need_values=need_values)
        if need_values:
            dvalues[expert] = found
    return dx, dvalues


def experts(
    grad: Tensor, x: Tensor, ids: Tensor, weights: Tensor, *projections: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``dx``, ``dweights`` and both ``dvalues`` of ``nmsparse::experts``; the last argument is ``need_values``.

    Recomputes each expert's forward from its decoded weights: nothing is kept from the forward pass but its inputs.
    Reads the routing on the host.
    """
    gate_up, down, activation, need_values = projections[:5], projections[5:10], *projections[10:]
    number, width = down[4][0], down[4][2]
    gated, act, wide = gate_up[4][1] == 2 * width, ACTIVATIONS[activation], _wide(grad)
    dgate_up, ddown, dweights = torch.zeros_like(gate_up[0]), torch.zeros_like(down[0]), weights.new_zeros(ids.numel())
    tokens, dy, weights = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1]), weights.reshape(-1)
    dtokens = torch.zeros(tokens.shape, dtype=torch.promote_types(wide, torch.float32), device=x.device)
    # A GPU leaves out choices of experts that do not exist; here they go to the end, where nobody looks.
    chosen = ids.reshape(-1).masked_fill(ids.reshape(-1) < 0, number)
    slots = chosen.argsort(stable=True)
    ends = (chosen[:, None] == torch.arange(number, device=x.device)).sum(0).cumsum(0)
    for expert, rows in _groups(ends):
        slot, first, second = slots[rows], _one(gate_up, expert), _one(down, expert)
        row = slot // ids.shape[-1]
        leaves = tokens[row], weights[slot], scatter(*first), scatter(*second)
        wanted = True, True, need_values, need_values
        with torch.enable_grad():
            inputs = [t.detach().to(wide).requires_grad_(want) for t, want in zip(leaves, wanted, strict=True)]
            token, weight, w_gate_up, w_down = inputs
            h = token @ w_gate_up.mT
            h = act(h[:, :width]) * h[:, width:] if gated else act(h)
            y = weight[:, None] * (h @ w_down.mT)
        found = torch.autograd.grad(y, [t for t in inputs if t.requires_grad], dy[row].to(wide))
        dtokens.index_add_(0, row, found[0].to(dtokens.dtype))
        dweights[slot] = found[1].to(dweights.dtype)
        if need_values:
            dgate_up[expert] = gather(found[2], *first[1:4]).to(dgate_up.dtype)
            ddown[expert] = gather(found[3], *second[1:4]).to(ddown.dtype)
    return dtokens.to(x.dtype).view(x.shape), dweights.view(ids.shape), dgate_up, ddown


def _one(weight: Sequence[Any], expert: int) -> tuple[Any, ...]:
    """Values, meta, indices, pattern and shape of one expert."""
    values, meta, indices, pattern, shape = weight
    return values[expert], meta[expert], None if indices is None else indices[expert], pattern, shape[1:]


def _groups(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Experts that have rows, with their rows."""
    first = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > first:
            yield expert, slice(first, end)
        first = end


def _wide(grad: Tensor) -> torch.dtype:
    """The dtype to compute in: 16 bits are slow and rough on the host, and accumulate in float32 on a GPU anyhow."""
    return grad.dtype if grad.is_cuda else torch.promote_types(grad.dtype, torch.float32)
