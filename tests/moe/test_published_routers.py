"""Router.from_config against the routers of transformers, on the logits alone."""

from __future__ import annotations

import numpy as np
import pytest

from nmsparse.moe import Router

SOFTMAX = [
    (model_type, {"num_experts_per_tok": top_k, **flag})
    for model_type in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
    for top_k in (1, 2, 8, 16)
    for flag in ([{}] if model_type == "mixtral" else [{"norm_topk_prob": False}, {"norm_topk_prob": True}])
]
DEEPSEEK_V2 = [
    ("deepseek_v2", {"num_experts_per_tok": top_k, "routed_scaling_factor": 16.0, **groups})
    for top_k in (1, 6)
    for groups in (
        {"topk_method": "greedy", "n_group": 1, "topk_group": 1},
        {"topk_method": "greedy"},
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
        {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3},
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 4},
    )
]
DEEPSEEK_V3 = [
    {"num_experts_per_tok": top_k, "norm_topk_prob": norm, "n_group": groups, "topk_group": kept}
    for top_k in (1, 2, 8)
    for norm in (False, True)
    for groups, kept in ((1, 1), (4, 2), (8, 4), (2, 2))
]


def as_table(ids, weights, num_experts):
    """(T, E) weights with NaN for the experts not chosen: the published order within a token is open."""
    table = np.full((len(ids), num_experts), np.nan, np.float32)
    np.put_along_axis(table, np.asarray(ids, np.int64), np.asarray(weights), axis=1)
    return table


def assert_same_routing(published_block, model_type, settings, bias_mean=None):
    import torch

    num_experts, bias = 16, None
    block, config = published_block(model_type, hidden=num_experts, intermediate=8, experts=num_experts, **settings)
    with torch.no_grad():
        block.gate.weight.copy_(torch.eye(num_experts))  # the hidden state is the logits, exactly
        if bias_mean is not None:
            bias = np.random.default_rng(1).normal(bias_mean, 0.3, num_experts).astype(np.float32)
            block.gate.e_score_correction_bias.copy_(torch.from_numpy(bias))
        logits = np.random.default_rng(0).normal(0, 2, (200, num_experts)).astype(np.float32)
        seen, want_weights, want_ids = block.gate(torch.from_numpy(logits))
    np.testing.assert_array_equal(seen.numpy(), logits)

    router = Router.from_config(config)
    ids, weights = router(logits, bias)
    if model_type not in ("deepseek_v2", "deepseek_v3"):  # these sort
        np.testing.assert_array_equal(ids, want_ids.numpy())
    np.testing.assert_allclose(
        as_table(ids, weights, num_experts),
        as_table(want_ids.numpy(), want_weights.numpy(), num_experts),
        rtol=1e-6,
    )


@pytest.mark.parametrize(("model_type", "settings"), SOFTMAX + DEEPSEEK_V2)
def test_softmax_routers(published_block, model_type, settings):
    assert_same_routing(published_block, model_type, settings)


@pytest.mark.parametrize("settings", DEEPSEEK_V3)
@pytest.mark.parametrize("bias_mean", [0.0, -3.0])  # -3 makes every choice negative: dropped groups must not win with 0
def test_deepseek_v3(published_block, settings, bias_mean):
    assert_same_routing(published_block, "deepseek_v3", settings, bias_mean)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3"])
def test_a_config_that_leaves_the_defaults_means_the_defaults_of_transformers(published_block, model_type):
    settings = {"num_experts_per_tok": 4}
    _, config = published_block(model_type, hidden=8, intermediate=8, experts=16, **settings)
    assert Router.from_config({"model_type": model_type, **settings}) == Router.from_config(config)
