"""Checkpoints that transformers itself writes: each expert as the model holds it, packed; the rest bit for bit."""

import json

import ml_dtypes
import numpy as np
import pytest

import nmsparse
from nmsparse.io import Checkpoint, convert, load

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
MLA = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
MODELS = {
    "Mixtral": {"num_local_experts": 3},
    "Qwen2Moe": {"num_experts": 3, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    "Qwen3Moe": {"num_experts": 3, "moe_intermediate_size": 24, "head_dim": 16},
    "Olmoe": {"num_experts": 3},
    "DeepseekV2": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        **MLA,
    },
    "DeepseekV3": {
        **{"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "moe_intermediate_size": 24},
        **{"first_k_dense_replace": 1, **MLA},
    },
    "GptOss": {"num_local_experts": 3, "head_dim": 16},
}


def make(name, dtype):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**COMMON, **MODELS[name])
    return getattr(transformers, f"{name}ForCausalLM")(config).to(dtype)


def bits(tensor):
    """A torch tensor as a NumPy array of the same bits."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def experts_of(model):
    """(gate_up, down) of each layer that has experts, as (E, 2I, H) and (E, H, I)."""
    for layer in model.model.layers:
        module = getattr(layer.mlp, "experts", None)
        if module is None:
            continue
        gate_up, down = bits(module.gate_up_proj), bits(module.down_proj)
        if isinstance(model, transformers.GptOssForCausalLM):  # gate and up alternate along the last axis
            gate_up, down = gate_up.swapaxes(1, 2), down.swapaxes(1, 2)
            gate_up = np.concatenate([gate_up[:, ::2], gate_up[:, 1::2]], axis=1)
        yield gate_up, down


def assert_converted(model, source, target, pattern):
    convert(source, target, pattern)
    dense, sparse = Checkpoint(source), load(target)
    names = [name for name in sparse if isinstance(sparse[name], nmsparse.formats.SparseArray)]
    gate_ups = [sparse[name] for name in names if name.endswith(".experts.gate_up_proj")]
    downs = [sparse[name] for name in names if name.endswith(".experts.down_proj")]
    layers = list(experts_of(model))
    assert len(names) == 2 * len(layers) > 0
    for (gate_up, down), *packed in zip(layers, gate_ups, downs, strict=True):
        for weight, array in zip((gate_up, down), packed, strict=True):
            assert (array.shape, array.dtype) == (weight.shape, weight.dtype)
            for e, expert in enumerate(weight):
                alone = nmsparse.array(np.ascontiguousarray(expert), pattern)
                for buffer, value in alone.buffers().items():
                    assert getattr(array[e], buffer).tobytes() == value.tobytes()
    rest = [name for name in dense if ".experts." not in name]
    assert set(rest) == {name for name in sparse if ".experts." not in name}
    assert any("layers.1.self_attn" in name for name in rest)
    for name in rest:
        assert (dense[name].dtype, dense[name].shape) == (sparse[name].dtype, sparse[name].shape)
        assert dense[name].tobytes() == sparse[name].tobytes()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_as_published(tmp_path, name, dtype):
    model = make(name, getattr(torch, dtype))
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB" if dtype == "float32" else "5GB")
    assert (tmp_path / "dense" / "model.safetensors.index.json").exists() == (dtype == "float32")
    assert_converted(model, tmp_path / "dense", tmp_path / "sparse", "samoyeds:1:2:16")
    config = json.loads((tmp_path / "sparse" / "config.json").read_text())
    assert config["nmsparse"]["pattern"] == "samoyeds:1:2:16"
    assert config["model_type"] == model.config.model_type


@pytest.mark.parametrize("name", MODELS)
def test_as_transformers_holds_it(tmp_path, name):
    """The stacked layout of transformers 5, without the way back to the published names."""
    model = make(name, torch.float32)
    model.save_pretrained(tmp_path / "dense", save_original_format=False)
    assert any(key.endswith(".mlp.experts.gate_up_proj") for key in Checkpoint(tmp_path / "dense"))
    assert_converted(model, tmp_path / "dense", tmp_path / "sparse", "2:4")


def test_the_published_names_are_what_is_tested(tmp_path):
    """So that test_as_published does not come to test the stacked layout twice."""
    make("Mixtral", torch.float32).save_pretrained(tmp_path / "mixtral")
    make("Qwen3Moe", torch.float32).save_pretrained(tmp_path / "qwen")
    assert "model.layers.1.block_sparse_moe.experts.2.w3.weight" in Checkpoint(tmp_path / "mixtral")
    assert "model.layers.1.mlp.experts.2.up_proj.weight" in Checkpoint(tmp_path / "qwen")
