"""MoELayer against the MoE blocks of transformers, with the pruned weights put back into them."""

from __future__ import annotations

import numpy as np
import pytest

from nmsparse.moe import MoELayer, Router, SparseExperts

SIZES = {"hidden": 48, "intermediate": 40, "experts": 8}  # multiples of neither 16 nor 32: every format has a tail

CASES = [
    *[("mixtral", {"num_experts_per_tok": k}) for k in (1, 2)],
    *[
        (model_type, {"num_experts_per_tok": k, "norm_topk_prob": norm})
        for model_type in ("qwen3_moe", "olmoe")
        for k in (1, 3)
        for norm in (False, True)
    ],
    *[
        ("qwen2_moe", {"num_experts_per_tok": k, "norm_topk_prob": norm, "shared_expert_intermediate_size": 56})
        for k in (1, 3)
        for norm in (False, True)
    ],
    *[
        ("deepseek_v2", {"num_experts_per_tok": k, "n_shared_experts": 2, "routed_scaling_factor": 16.0, **groups})
        for k in (1, 3)
        for groups in (
            {"topk_method": "greedy"},
            {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
        )
    ],
    *[
        ("deepseek_v3", {"num_experts_per_tok": k, "norm_topk_prob": norm, "n_group": groups, "topk_group": kept})
        for k in (1, 3)
        for norm in (False, True)
        for groups, kept in ((1, 1), (4, 2))
    ],
]


def convert(block, config, pattern):
    """The block as an MoELayer with experts of ``pattern``; the block's own experts become the pruned ones."""
    import torch

    def pruned(gate_up, down):
        """Experts of two stacked torch weights, which are overwritten by what is left of them."""
        dense = gate_up.numpy(), down.numpy()
        experts = SparseExperts(*dense) if pattern == "dense" else SparseExperts.from_dense(*dense, pattern)
        if pattern != "dense":
            for tensor, weight in ((gate_up, experts.gate_up), (down, experts.down)):
                assert 0 < np.count_nonzero(weight.todense()) < tensor.count_nonzero()
                tensor.copy_(torch.from_numpy(weight.todense()))
        return experts

    with torch.no_grad():
        experts = pruned(block.experts.gate_up_proj.detach(), block.experts.down_proj.detach())
        shared = shared_gate = bias = None
        mlp = getattr(block, "shared_expert", None) or getattr(block, "shared_experts", None)
        if mlp is not None:
            gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).detach()
            shared = pruned(gate_up[None], mlp.down_proj.weight.detach()[None])
            gate, up = gate_up.chunk(2)
            mlp.gate_proj.weight.copy_(gate)
            mlp.up_proj.weight.copy_(up)
        if hasattr(block, "shared_expert_gate"):
            shared_gate = block.shared_expert_gate.weight.detach().numpy()
        if hasattr(block.gate, "e_score_correction_bias"):
            bias = block.gate.e_score_correction_bias.numpy()
        router_weight = block.gate.weight.detach().numpy()
    return MoELayer(router_weight, experts, Router.from_config(config), shared, shared_gate, bias=bias)


@pytest.mark.parametrize(("model_type", "settings"), CASES)
@pytest.mark.parametrize("pattern", ["dense", "2:4", "vnm:16:2:8", "samoyeds:1:2:16"])
def test_published_block(published_block, model_type, settings, pattern):
    import torch

    block, config = published_block(model_type, **SIZES, **settings)
    layer = convert(block, config, pattern)
    for shape in ((2, 19), (1, 1)):
        x = np.random.default_rng(0).standard_normal((*shape, SIZES["hidden"]), np.float32)
        with torch.no_grad():
            want = block(torch.from_numpy(x)).numpy()
        got = layer(x)
        assert (got.shape, got.dtype) == (x.shape, x.dtype)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
