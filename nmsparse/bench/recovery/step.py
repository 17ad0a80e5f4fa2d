"""The training loss of a Mixtral model, in pieces that compile without a graph break.

The same as the model's own loss (tests compare them), whose forward collects the logits of the routers by hooks, where
a compiler would stop. The grouped products run in the dtype of autocast, which torch does not cast by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

__all__ = ["IMPLEMENTATION", "make_loss", "mixed"]

IMPLEMENTATION = "nmsparse_recovery"  # of the experts, in the registry of transformers
Loss = Callable[[Tensor], Tensor]


class _Reorder(torch.autograd.Function):
    """``x[order]`` for a permutation, whose gradient is gathered too; torch would add it up by atomics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad[inverse], None, None


def experts(self: nn.Module, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Dense experts by grouped products, which wait for nothing and compile."""
    tokens, top_k = ids.shape
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    expert, order = ids.reshape(-1).sort()
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=x.device)
    ends = torch.searchsorted(expert, torch.arange(self.num_experts, device=x.device), right=True).to(torch.int32)
    pairs = x.to(dtype)[:, None].expand(-1, top_k, -1).reshape(tokens * top_k, -1)
    h = F.grouped_mm(_Reorder.apply(pairs, order, inverse), self.gate_up_proj.to(dtype).mT, offs=ends)
    gate, up = h.chunk(2, -1)
    y = F.grouped_mm(F.silu(gate) * up, self.down_proj.to(dtype).mT, offs=ends)
    y = _Reorder.apply(y, inverse, order).view(tokens, top_k, -1)
    return (y * weights[..., None].to(dtype)).sum(1).to(x.dtype)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts)


def mixed(tensor: Tensor) -> torch.autocast:
    """Autocast to bfloat16 for work on ``tensor`` if that is on a GPU; nothing on the host."""
    return torch.autocast(tensor.device.type, dtype=torch.bfloat16, enabled=tensor.is_cuda)


def make_loss(model: Any, router_loss: float, *, compiled: bool) -> Loss:
    """The loss of a ``MixtralForCausalLM`` on windows ``(batch, length)``: cross-entropy of the next byte in nats, and
    ``router_loss`` times the balancing loss of the routers."""

    # By ``forward``: on attention and router transformers may have put hooks, at which a compiler stops.
    def block(layer: Any, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x, rotary = layer.input_layernorm(h), (cos, sin)
        h = h + layer.self_attn.forward(x, position_embeddings=rotary, attention_mask=None)[0]
        x = layer.post_attention_layernorm(h).flatten(0, 1)
        logits, weights, ids = layer.mlp.gate.forward(x)
        return h + layer.mlp.experts(x, ids, weights).view_as(h), logits

    def head(h: Tensor, tokens: Tensor, routed: tuple[Tensor, ...]) -> Tensor:
        logits = model.lm_head(model.model.norm(h))[:, :-1].float()
        shares = torch.cat(routed).float().softmax(-1)
        numbers = torch.arange(shares.shape[-1], device=h.device)
        chosen = (shares.topk(model.config.num_experts_per_tok).indices[..., None] == numbers).sum(1)
        balance = len(numbers) * (chosen.float().mean(0) * shares.mean(0)).sum()  # Switch Transformer, equations 4 to 6
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) + router_loss * balance

    if compiled:
        block, head = (torch.compile(part, fullgraph=True, dynamic=False) for part in (block, head))

    def loss(tokens: Tensor) -> Tensor:
        h = model.model.embed_tokens(tokens)
        cos, sin = model.model.rotary_emb(h, torch.arange(tokens.shape[1], device=tokens.device)[None])
        routed = []
        for layer in model.model.layers:
            h, logits = block(layer, h, cos, sin)
            routed.append(logits)
        return head(h, tokens, tuple(routed))

    return loss
