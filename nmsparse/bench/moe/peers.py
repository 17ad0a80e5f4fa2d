"""The MoE layers that users of torch have today, each called with the same weights, tokens, ids and routing weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...errors import require

__all__ = ["IMPLEMENTATIONS", "grouped_mm", "transformers_experts"]

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")  # of transformers' experts


def grouped_mm(gate_up: Any, down: Any, *, add: bool) -> Callable[[Any, Any, Any], Any]:
    """A layer on ``torch.nn.functional.grouped_mm`` that never waits for the GPU.

    Sort the pairs by expert, gather their tokens, two grouped products with SwiGLU and the routing weight between them
    (on I columns rather than H), then sum the rows of each token: with ``add`` by ``index_add_``, whose order of
    additions is left to chance, else gathered and summed.
    """
    torch = require("torch", "torch")
    functional, numbers = torch.nn.functional, torch.arange(len(down), device=down.device, dtype=torch.int32)

    def run(x: Any, ids: Any, weights: Any) -> Any:
        expert, order = torch.sort(ids.reshape(-1))
        ends = torch.searchsorted(expert, numbers, right=True, out_int32=True)
        token = order // ids.shape[1]
        h = functional.grouped_mm(x.index_select(0, token), gate_up.mT, offs=ends)
        gate, up = h.chunk(2, -1)
        h = functional.silu(gate).mul_(up).mul_(weights.reshape(-1)[order, None])
        pairs = functional.grouped_mm(h, down.mT, offs=ends)
        if add:
            return torch.zeros_like(x).index_add_(0, token, pairs)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        return pairs.index_select(0, place).view(*ids.shape, -1).sum(1)

    return run


def transformers_experts(implementation: str, gate_up: Any, down: Any) -> Callable[[Any, Any, Any], Any]:
    """The experts of ``transformers``' Mixtral, whose code is that of the other models too, on these weights.

    To be called with int64 ids and routing weights in the dtype of ``x``, as most of its routers return them. "eager"
    asks the GPU which experts have tokens, so it waits for it and no CUDA graph can hold it; "batched_mm" copies the
    weights of each pair.
    """
    torch, transformers = require("torch", "torch"), require("transformers", "test")
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    num_experts, hidden, intermediate = down.shape
    config = transformers.MixtralConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_local_experts=num_experts, hidden_act="silu"
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = MixtralExperts(config)
    experts.gate_up_proj = torch.nn.Parameter(gate_up, requires_grad=False)
    experts.down_proj = torch.nn.Parameter(down, requires_grad=False)
    return experts
