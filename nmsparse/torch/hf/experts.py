"""``experts_implementation="nmsparse"``: what the experts module of a model calls instead of its own forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import logging

from ...errors import NMSparseError
from .. import functional
from ..layout import alternate, sparse_weights
from ..weight import SparseWeight

__all__ = ["experts_forward", "fused_activation"]

logger = logging.get_logger(__name__)

# The class of ``act_fn`` and what we call it.
ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
}


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of an experts module: tokens (T, H), experts of each (T, k) and their weights (T, k) → (T, H).

    Layers whose experts are dense run the ``grouped_mm`` of ``transformers``.
    """
    weights = sparse_weights(self)
    if weights is None:
        logger.warning_once(
            "experts_implementation='nmsparse': some experts are dense and run as 'grouped_mm'; "
            "nmsparse.torch.sparsify_(model, pattern) prunes them"
        )
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)
    if getattr(self, "_is_expert_parallel", False):
        raise NMSparseError("experts_implementation='nmsparse' has no expert parallelism: load without a tp_plan")
    activation = fused_activation(self)
    if activation is not None:
        return functional.experts(hidden_states, top_k_index, top_k_weights, *weights, activation).to(
            hidden_states.dtype
        )
    return _step_by_step(self, hidden_states, top_k_index, top_k_weights, *weights)


ALL_EXPERTS_FUNCTIONS.register("nmsparse", experts_forward)


def fused_activation(module: nn.Module) -> str | None:
    """The activation, if act(gate) * up is all that stands between the two projections."""
    own_gate = module.has_gate and not type(module)._apply_gate.__module__.startswith("transformers.integrations")
    if own_gate or module.has_bias or getattr(module, "has_post_expert_norm", False):
        return None
    return ACTIVATIONS.get(type(getattr(module, "act_fn", None)).__name__)


def _step_by_step(
    module: nn.Module, x: Tensor, ids: Tensor, weights: Tensor, gate_up: SparseWeight, down: SparseWeight
) -> Tensor:
    """Experts with biases or a gate of their own: two grouped products, and the module's own steps between them."""
    tokens, top_k = ids.shape
    order = ids.flatten().argsort(stable=True)
    experts = ids.flatten()[order]
    offsets = (experts[:, None] == torch.arange(down.shape[0], device=x.device)).sum(0).cumsum(0)
    h = functional.grouped_linear(x[order // top_k], gate_up, offsets)
    if module.has_gate and not module.is_concatenated:
        h = alternate(h)
    if module.has_bias:
        h = h + (module.gate_up_proj_bias if module.has_gate else module.up_proj_bias)[experts]
    h = module._apply_gate(h) if module.has_gate else module.act_fn(h)
    y = functional.grouped_linear(h, down, offsets)
    if module.has_bias:
        y = y + module.down_proj_bias[experts]
    if getattr(module, "has_post_expert_norm", False):
        y = module.post_expert_norm(y)
    y = y * weights.flatten()[order, None]
    places = torch.empty_like(order)
    places[order] = torch.arange(order.numel(), device=x.device)
    return y[places].view(tokens, top_k, -1).sum(1).to(x.dtype)
