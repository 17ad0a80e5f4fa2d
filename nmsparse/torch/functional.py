"""Products with a :class:`~nmsparse.torch.SparseWeight`: the ops, without the dispatcher where nobody listens.

A call through ``torch.library`` with a gradient registered takes 8 µs on the host, twice a kernel's time for a few
tokens. Where no gradient is wanted, nothing traces and no mode intercepts, the implementation is called by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import library
from .arrays import Buffers
from .weight import SparseWeight

__all__ = ["experts", "grouped_linear", "linear"]


def linear(x: Tensor, weight: SparseWeight, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``: ``x`` (…, K), ``weight`` (M, K), ``bias`` (M,) → (…, M).

    The result has the dtype of both, or the wider one; on a GPU both need one 16-bit dtype. Autocast casts both, as it
    does for ``nn.Linear``. Gradients: see :mod:`nmsparse.torch.gradients`.

    >>> weight = SparseWeight.from_dense(torch.eye(4), "2:4")
    >>> linear(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), weight).detach()
    tensor([[1., 2., 3., 4.]])
    """
    x, parts = _autocast(x, weight())
    return (library.linear if _direct(x, parts[0], bias) else library.linear_op)(x, *parts, bias)


def grouped_linear(x: Tensor, weight: SparseWeight, offsets: Tensor) -> Tensor:
    """Rows ``offsets[e-1]:offsets[e]`` of ``x`` (S, K) times ``weight[e].T`` of ``weight`` (E, M, K): (S, M).

    ``offsets`` (E,) int32 or int64 are cumulative ends, as in ``torch.nn.functional.grouped_mm``.

    >>> weight = SparseWeight.from_dense(torch.stack([torch.eye(4), 2 * torch.eye(4)]), "2:4")
    >>> with torch.no_grad():
    ...     grouped_linear(torch.ones(3, 4), weight, torch.tensor([1, 3])).sum(1)
    tensor([4., 8., 8.])
    """
    x, parts = _autocast(x, weight())
    return (library.grouped_linear if _direct(x, parts[0]) else library.grouped_linear_op)(x, offsets, *parts)


def experts(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: SparseWeight, down: SparseWeight, activation: str = "silu"
) -> Tensor:
    """Each token's weighted sum of the outputs of its experts, as :class:`nmsparse.SparseExperts` computes it.

    ``x`` (…, H); ``ids`` (…, k) int32 or int64 and ``weights`` (…, k); ``gate_up`` (E, 2I, H), the gate's rows first,
    or (E, I, H) without a gate; ``down`` (E, H, I). The result is like ``x``.

    >>> eye = SparseWeight.from_dense(torch.eye(4)[None], "2:4")
    >>> with torch.no_grad():
    ...     experts(torch.ones(1, 4), torch.tensor([[0]]), torch.tensor([[2.0]]), eye, eye, "identity")
    tensor([[2., 2., 2., 2.]])
    """
    x, first, second = _autocast(x, gate_up(), down())
    direct = _direct(x, weights, first[0], second[0])
    return (library.experts if direct else library.experts_op)(x, ids, weights, *first, *second, activation)


def _autocast(x: Tensor, *weights: Buffers) -> tuple[Any, ...]:
    """All of them in the dtype of autocast, if that is on; float64 stays. A weight that is cast is packed anew."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():  # in a tenth of the time
        return x, *weights
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, *values = (t if t.dtype == torch.float64 else t.to(dtype) for t in (x, *(w[0] for w in weights)))
        weights = tuple((v, *w[1:]) for v, w in zip(values, weights, strict=True))
    return x, *weights


def _direct(*tensors: Any) -> bool:
    """Whether the op's implementation may be called without the dispatcher."""
    if torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return False
    return (
        type(tensors[0]) is Tensor  # no fake, no subclass
        and torch._C._len_torch_dispatch_stack() == 0  # no mode
        and torch._C._functorch.maybe_get_level(tensors[0]) < 0  # no transform
    )
