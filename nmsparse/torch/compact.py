"""Serving from a GPU with one copy of the weights: the packed one that its kernels read.

A sparse weight keeps its canonical buffers, which can be saved, moved and trained; a GPU's kernels read a packed form
that is made of them at the first call. Who only serves needs the second alone.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import NMSparseError
from .arrays import experts_of, remember
from .buffers import as_tensor
from .layout import sparse_weights
from .modules import SparseExperts
from .surgery import is_sparse
from .weight import SparseWeight

__all__ = ["compact_"]

Model = TypeVar("Model", bound=nn.Module)


def compact_(model: Model) -> Model:
    """Replace the canonical buffers of sparse experts on a GPU by what its kernels read, in place; returns ``model``.

    Halves the memory of experts that have been called. Afterwards they run, compile and are captured as before, but can
    be neither trained, saved, copied, moved nor decoded: save first. Experts on the host stay as they are, since their
    kernels read the canonical buffers; so do linear layers, and experts with biases or a gate of their own, which run
    as two products. Raises :class:`~nmsparse.errors.NMSparseError` where there are no sparse experts.

    >>> experts = SparseExperts.from_dense(torch.randn(2, 16, 8), torch.randn(2, 8, 8), "2:4")
    >>> compact_(experts) is experts
    True
    """
    found = [module for module in model.modules() if isinstance(module, SparseExperts) or is_sparse(module)]
    if not found:
        raise NMSparseError(f"compact_: found no sparse experts in {type(model).__name__}; call sparsify_ first")
    for module in found:
        gate_up, down, activation = _parts(module)
        on_gpu = gate_up.values.is_cuda and down.values.is_cuda
        if activation is not None and on_gpu and not (gate_up.is_compact or down.is_compact):
            _compact(gate_up, down, activation)
    return model


def _parts(module: Any) -> tuple[SparseWeight, SparseWeight, str | None]:
    if isinstance(module, SparseExperts):
        return module.gate_up_proj, module.down_proj, module.activation
    from .hf.experts import fused_activation

    return *sparse_weights(module), fused_activation(module)  # type: ignore[misc]


@torch.inference_mode(False)  # whose tensors count no versions, and so are not remembered
@torch.no_grad()
def _compact(gate_up: SparseWeight, down: SparseWeight, activation: str) -> None:
    layer = experts_of(gate_up(), down(), activation).compact()
    hold(gate_up, as_tensor(layer.gate_up.weights), layer.gate_up, {activation: layer})
    hold(down, as_tensor(layer.down.weights), layer.down, {})


def hold(weight: SparseWeight, packed: Tensor, array: Any, experts: dict[str, Any]) -> None:
    """Let ``weight`` consist of ``packed``; an op that gets its buffers finds ``array`` and ``experts``."""
    weight.values = nn.Parameter(packed.view(weight.dtype), requires_grad=False)
    weight.meta = weight.meta.new_empty(0)
    remember(weight(), array, experts)
