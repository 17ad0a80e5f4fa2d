"""The oracle: the MoE blocks of ``transformers``, in torch, small and with random weights."""

from __future__ import annotations

import importlib

import pytest

# model_type: configuration class, block class, the names of (hidden, intermediate, experts) in the configuration.
BLOCKS = {
    "mixtral": ("MixtralConfig", "MixtralSparseMoeBlock", "intermediate_size", "num_local_experts"),
    "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeSparseMoeBlock", "moe_intermediate_size", "num_experts"),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeSparseMoeBlock", "moe_intermediate_size", "num_experts"),
    "olmoe": ("OlmoeConfig", "OlmoeSparseMoeBlock", "intermediate_size", "num_experts"),
    "deepseek_v2": ("DeepseekV2Config", "DeepseekV2Moe", "moe_intermediate_size", "n_routed_experts"),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3MoE", "moe_intermediate_size", "n_routed_experts"),
}


@pytest.fixture
def published_block():
    """``build(model_type, hidden, intermediate, experts, **config)``: a block of transformers in float32, eager."""
    reason = "the oracle is transformers: python -m pip install 'nmsparse[test]'"
    torch = pytest.importorskip("torch", reason=reason)
    pytest.importorskip("transformers", reason=reason)
    torch.set_num_threads(1)  # its idle threads spin, and the kernels under test want the cores

    def build(model_type, *, hidden, intermediate, experts, **settings):
        config_name, block_name, intermediate_name, experts_name = BLOCKS[model_type]
        configuration = importlib.import_module(f"transformers.models.{model_type}.configuration_{model_type}")
        modeling = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
        sizes = {"hidden_size": hidden, intermediate_name: intermediate, experts_name: experts}
        config = getattr(configuration, config_name)(**sizes, num_attention_heads=1, **settings)
        config._experts_implementation = "eager"
        block = getattr(modeling, block_name)(config).float().eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
                fan_in = 1 if name.endswith("bias") else tensor.shape[-1]
                tensor.normal_(0, fan_in**-0.5, generator=generator)
        return block, config.to_dict()

    return build
