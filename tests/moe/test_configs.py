"""Router.from_config on the router fields of real config.json files, and on what it must refuse."""

from __future__ import annotations

import pytest

from nmsparse.errors import NMSparseError
from nmsparse.moe import Router

V3 = {"model_type": "deepseek_v3", "num_experts_per_tok": 8, "n_routed_experts": 256}


def test_mixtral():
    config = {"model_type": "mixtral", "num_experts_per_tok": 2, "num_local_experts": 8}
    assert Router.from_config(config) == Router(2, renormalize=True)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe", "olmoe"])
@pytest.mark.parametrize("flag", [False, True])
def test_softmax_with_a_flag(model_type, flag):
    config = {"model_type": model_type, "num_experts_per_tok": 8, "num_experts": 64, "norm_topk_prob": flag}
    assert Router.from_config(config) == Router(8, renormalize=flag)


def test_deepseek_v2_reads_groups_only_when_it_limits_them():
    config = {
        "model_type": "deepseek_v2",
        "n_routed_experts": 160,
        "num_experts_per_tok": 6,
        "n_group": 8,
        "topk_group": 3,
        "topk_method": "group_limited_greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 16.0,
    }
    assert Router.from_config(config) == Router(6, num_groups=8, topk_groups=3, scale=16.0)
    for greedy in ("greedy", "gready"):
        assert Router.from_config({**config, "topk_method": greedy}) == Router(6, scale=16.0)


def test_deepseek_v3():
    config = {
        **V3,
        "n_group": 8,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    }
    router = Router(8, "sigmoid", renormalize=True, num_groups=8, topk_groups=4, group_score="top2", scale=2.5)
    assert Router.from_config(config) == router


def test_a_router_is_frozen_and_can_be_a_key():
    router = Router(2)
    with pytest.raises(AttributeError):
        router.top_k = 3
    assert {router: "a"}[Router(2)] == "a"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {"model_type": "llama", "num_experts_per_tok": 2},
            "mixtral, qwen2_moe, qwen3_moe, olmoe, deepseek_v2, deepseek_v3",
        ),
        ({}, "got None"),
        ("config.json", "got str; pass config.to_dict"),
        ({"model_type": "mixtral"}, "num_experts_per_tok: expected in the config of a mixtral model"),
        ({"model_type": "deepseek_v2", "num_experts_per_tok": None}, "num_experts_per_tok"),
        ({"model_type": "mixtral", "num_experts_per_tok": 2.5}, "top_k"),
        ({"model_type": "mixtral", "num_experts_per_tok": 9, "num_local_experts": 8}, "experts, 8; got 9"),
        ({"model_type": "olmoe", "num_experts_per_tok": 1, "num_experts": 0}, "num_experts: expected an integer"),
        ({"model_type": "deepseek_v2", "num_experts_per_tok": 2, "norm_topk_prob": True}, "norm_topk_prob"),
        ({"model_type": "deepseek_v2", "num_experts_per_tok": 2, "scoring_func": "sigmoid"}, "scoring_func"),
        ({"model_type": "deepseek_v2", "num_experts_per_tok": 2, "topk_method": "noaux_tc"}, "topk_method"),
        ({"model_type": "deepseek_v2", "num_experts_per_tok": 2, "topk_method": "group_limited_greedy"}, "n_group"),
        ({**V3, "scoring_func": "softmax"}, "scoring_func: expected 'sigmoid' in a deepseek_v3 config, got 'softmax'"),
        ({**V3, "topk_method": "greedy"}, "topk_method"),
        ({**V3, "n_group": 7}, "divisor of the number of experts, 256; got 7"),
        ({**V3, "n_group": None}, "n_group"),
        ({**V3, "topk_group": 9}, "at most num_groups = 8"),
        ({**V3, "routed_scaling_factor": 0}, "scale"),
    ],
)
def test_refused(config, says):
    with pytest.raises(NMSparseError, match=says):
        Router.from_config(config)
