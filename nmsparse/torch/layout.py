"""How ``transformers`` 5 keeps the experts of a layer, and how that becomes a pair of sparse weights and back.

All experts of a layer are two parameters of one module. Usually they are ours already, ``gate_up_proj`` (E, 2I, H) with
the gate's rows first and ``down_proj`` (E, H, I). The module's flags say where they are not: ``is_transposed`` stores
(E, in, out), ``is_concatenated=False`` lets gate and up alternate, ``has_gate=False`` has ``up_proj`` (E, I, H).
Sparse weights replace the parameters inside the module, so that its class, its router and its hooks stay what they are.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..formats import Pattern
from .weight import SparseWeight

__all__ = [
    "alternate",
    "from_rows",
    "halves",
    "holds_experts",
    "parameter_",
    "projections",
    "prune_",
    "put_",
    "shape_of",
    "sparse_weights",
    "to_rows",
]


def holds_experts(module: nn.Module) -> bool:
    """Whether ``module`` is the stacked experts of a ``transformers`` model, dense or sparse."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate") and hasattr(module, "down_proj")


def projections(module: nn.Module) -> tuple[str, str]:
    """Names of the two weights."""
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def sparse_weights(module: nn.Module) -> tuple[SparseWeight, SparseWeight] | None:
    """The two weights of an experts module if they are sparse."""
    first, second = (getattr(module, name) for name in projections(module))
    return (first, second) if isinstance(first, SparseWeight) and isinstance(second, SparseWeight) else None


def shape_of(module: nn.Module, name: str) -> tuple[int, int, int]:
    """(E, out, in) of a dense weight."""
    experts, rows, columns = getattr(module, name).shape
    return (experts, columns, rows) if module.is_transposed else (experts, rows, columns)


def to_rows(module: nn.Module, name: str, weight: Tensor) -> Tensor:
    """A dense weight as the model keeps it -> (E, out, in), all gates before all ups."""
    rows = weight.mT if module.is_transposed else weight
    return halves(rows, -2) if _alternates(module, name) else rows


def from_rows(module: nn.Module, name: str, rows: Tensor) -> Tensor:
    """The inverse of :func:`to_rows`."""
    rows = alternate(rows, -2) if _alternates(module, name) else rows
    return rows.mT if module.is_transposed else rows


def prune_(module: nn.Module, name: str, pattern: Pattern) -> None:
    """Replace a dense weight of an experts module by the sparse one that magnitude pruning leaves."""
    rows = to_rows(module, name, getattr(module, name).detach())
    put_(module, name, SparseWeight.from_dense(rows, pattern))


def parameter_(module: nn.Module, name: str) -> None:
    """Replace a sparse weight of an experts module by a dense parameter in the layout of the model."""
    rows = getattr(module, name).todense().detach()
    put_(module, name, nn.Parameter(from_rows(module, name, rows).contiguous()))


def put_(module: nn.Module, name: str, value: nn.Module | nn.Parameter) -> None:
    """Set an attribute that may be a parameter now and a module afterwards, or the reverse."""
    delattr(module, name)
    setattr(module, name, value)


def _alternates(module: nn.Module, name: str) -> bool:
    return name == "gate_up_proj" and not module.is_concatenated


def halves(rows: Tensor, axis: int = -1) -> Tensor:
    """Gate 0, up 0, gate 1, up 1, … along ``axis`` (counted from the end) as all gates, then all ups.

    >>> import torch
    >>> halves(torch.tensor([0, 10, 1, 11])).tolist()
    [0, 1, 10, 11]
    """
    return rows.unflatten(axis, (-1, 2)).transpose(axis - 1, axis).flatten(axis - 1, axis)


def alternate(rows: Tensor, axis: int = -1) -> Tensor:
    """The inverse of :func:`halves`.

    >>> import torch
    >>> alternate(torch.tensor([0, 1, 10, 11])).tolist()
    [0, 10, 1, 11]
    """
    return rows.unflatten(axis, (2, -1)).transpose(axis - 1, axis).flatten(axis - 1, axis)
