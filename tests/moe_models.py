"""Small causal language models of transformers, one for each way to keep experts, with random weights."""

from __future__ import annotations

import torch
import transformers

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MLA = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
DEEPSEEK = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    **MLA,
}
MODELS = {
    "Mixtral": {"num_local_experts": 3},
    "Qwen2Moe": {"num_experts": 3, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    "Qwen3Moe": {"num_experts": 3, "moe_intermediate_size": 24, "head_dim": 16},
    "Olmoe": {"num_experts": 3},
    "DeepseekV2": DEEPSEEK,
    "DeepseekV3": {**DEEPSEEK, "n_group": 2, "topk_group": 1},
    "GptOss": {"num_local_experts": 3, "head_dim": 16},
    "GraniteMoe": {"num_local_experts": 3},
    "Jamba": {"num_experts": 3, "attn_layer_period": 1, "attn_layer_offset": 0, "expert_layer_period": 1,
              "expert_layer_offset": 0, "use_mamba_kernels": False},
}  # fmt: skip


def make(name: str, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """A model of a few thousand parameters, every one of them random, biases too."""
    config = getattr(transformers, f"{name}Config")(**COMMON, **MODELS[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    return model


def tokens(batch: int = 2, length: int = 9) -> torch.Tensor:
    """Random token ids (batch, length)."""
    return torch.randint(0, COMMON["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(1))
