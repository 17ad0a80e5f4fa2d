"""The vLLM plugin against stand-ins for the classes of vLLM that it touches: not against vLLM."""

from __future__ import annotations

import sys
import types
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nmsparse import NMSparseError
from nmsparse.torch import SparseExperts, SparseWeight, vllm

LAYERS = "vllm.model_executor.layers"


@pytest.fixture
def stand_ins(monkeypatch):
    """What the plugin imports of vLLM, with the signatures of its sources."""

    def module(name, **content):
        made = types.ModuleType(name)
        vars(made).update(content)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    class QuantizationConfig:
        @staticmethod
        def get_from_keys(config, keys):
            return next(config[key] for key in keys if key in config)

    class UnquantizedFusedMoEMethod:
        def __init__(self, moe):
            self.moe = moe

        def create_weights(self, layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype):
            shapes = {"w13": (2 * intermediate_size_per_partition, hidden_size), "w2": (hidden_size, -1)}
            for name, (rows, columns) in shapes.items():
                columns = intermediate_size_per_partition if columns < 0 else columns
                weight = nn.Parameter(torch.empty(num_experts, rows, columns, dtype=params_dtype), requires_grad=False)
                layer.register_parameter(f"{name}_weight", weight)

    found = {}

    def register_quantization_config(name):
        def keep(config):
            found[name] = config
            quantization.QUANTIZATION_METHODS.append(name)
            return config

        return keep

    linear = module(f"{LAYERS}.linear", LinearBase=type("LinearBase", (nn.Module,), {}))
    linear.UnquantizedLinearMethod = type("UnquantizedLinearMethod", (), {})
    routed = module(f"{LAYERS}.fused_moe.routed_experts", RoutedExperts=type("RoutedExperts", (nn.Module,), {}))
    module(f"{LAYERS}.fused_moe.unquantized_fused_moe_method", UnquantizedFusedMoEMethod=UnquantizedFusedMoEMethod)
    module(f"{LAYERS}.quantization.base_config", QuantizationConfig=QuantizationConfig)
    quantization = module(f"{LAYERS}.quantization", QUANTIZATION_METHODS=["awq"])
    quantization.register_quantization_config = register_quantization_config
    vllm.register()
    vllm.register()
    assert quantization.QUANTIZATION_METHODS == ["awq", "nmsparse"]
    return SimpleNamespace(config=found["nmsparse"], linear=linear, routed=routed)


def routed_layer(stand_ins, **settings):
    layer = stand_ins.routed.RoutedExperts()
    layer.activation = "silu"
    parallel = SimpleNamespace(use_ep=settings.pop("use_ep", False))
    layer.moe_config = SimpleNamespace(has_bias=settings.pop("has_bias", False), moe_parallel_config=parallel)
    return layer


def test_the_life_of_a_layer(stand_ins):
    config = stand_ins.config.from_config({"quant_method": "nmsparse", "pattern": "samoyeds:1:2:16"})
    assert config.get_name() == "nmsparse" and torch.bfloat16 in config.get_supported_act_dtypes()
    layer = routed_layer(stand_ins)
    method = config.get_quant_method(layer, "model.layers.0.mlp.experts")
    method.create_weights(layer, 4, 32, 24, torch.float32)
    torch.manual_seed(0)
    gate_up, down = layer.w13_weight.data.normal_(), layer.w2_weight.data.normal_()
    want = SparseExperts.from_dense(gate_up.clone(), down.clone(), "samoyeds:1:2:16")
    method.process_weights_after_loading(layer)
    assert isinstance(layer.w13_sparse, SparseWeight) and not hasattr(layer, "w13_weight")
    x, ids, weights = torch.randn(5, 32), torch.tensor([[0, 1], [3, 2], [1, 2], [0, 3], [2, 0]]), torch.rand(5, 2)
    with torch.inference_mode():
        got = method.apply(layer, x, weights, ids, None, None)
        torch.testing.assert_close(got, want(x, ids, weights), rtol=0, atol=0)


def test_other_layers_and_refusals(stand_ins):
    config = stand_ins.config("2:4")
    assert isinstance(
        config.get_quant_method(stand_ins.linear.LinearBase(), ""), stand_ins.linear.UnquantizedLinearMethod
    )
    assert config.get_quant_method(nn.Embedding(2, 2), "") is None
    for settings in ({"has_bias": True}, {"use_ep": True}):
        with pytest.raises(NMSparseError, match="not supported"):
            config.get_quant_method(routed_layer(stand_ins, **settings), "experts")
    with pytest.raises(NMSparseError, match="pattern"):
        stand_ins.config("half")


def test_without_vllm():
    with pytest.raises(ImportError, match="vllm"):
        vllm.register()
