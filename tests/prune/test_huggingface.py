"""Any Mixture-of-Experts model of transformers: statistics against autograd, and pruning layer by layer."""

from __future__ import annotations

import numpy as np
import pytest

from nmsparse import NMArray, NMSparseError, __main__, load
from nmsparse.calibration import prune_layers, survey
from nmsparse.io import Checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from nmsparse.calibration.channels import channel_order, reorder_hidden  # noqa: E402
from nmsparse.calibration.huggingface import ModelWalk, observe, reorder_model  # noqa: E402

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
DEEPSEEK = SIZES | {
    "num_key_value_heads": 4,
    "intermediate_size": 48, "moe_intermediate_size": 24, "n_routed_experts": 4, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}  # fmt: skip
MODELS = {
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, intermediate_size=48, num_local_experts=4),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **SIZES,
        intermediate_size=48,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=48,
        num_experts=4,
        decoder_sparse_step=1,
    ),
    "olmoe": lambda: transformers.OlmoeConfig(**SIZES, intermediate_size=48, num_experts=4),
}
REORDERED = {
    **MODELS,
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SIZES, head_dim=16, intermediate_size=48, moe_intermediate_size=24, num_experts=4, attention_bias=True
    ),
    "deepseek_v2": lambda: transformers.DeepseekV2Config(**DEEPSEEK, topk_method="greedy"),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(**DEEPSEEK, n_group=2, topk_group=1),
}


def make(name):
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(REORDERED[name]())
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 1.0)
    return made.eval()


@pytest.fixture(params=MODELS)
def model(request):
    return make(request.param)


@pytest.fixture
def batches():
    return list(torch.randint(0, 64, (3, 4, 32), generator=torch.Generator().manual_seed(1)))


def test_a_pass_counts_every_slot_and_leaves_the_model_as_it_was(model, batches):
    before = model(batches[0]).logits
    records = observe(model, batches)
    assert torch.equal(before, model(batches[0]).logits)
    assert len(records) == 2
    for record in records:
        assert record.count.sum() == 3 * 4 * 32 * 2
        assert (record.h_gradients > 0).any()


def test_gradients_are_those_of_autograd(model, batches):
    """Σ over experts of (∂loss/∂(g E(x)))² is known from the output of the experts: each slot has its gradient."""
    records = observe(model, batches[:1])
    walk, gradients = ModelWalk(model, ()), []
    handles = [
        module.register_forward_hook(lambda _m, _i, out: out.register_hook(gradients.append) and None)
        for module in walk.modules
    ]
    model(batches[0], labels=batches[0]).loss.backward()
    for handle in handles:
        handle.remove()
    for record, gradient in zip(records, reversed(gradients), strict=True):
        square = 2 * gradient.reshape(-1, 32).square().sum(0)  # two experts for each token
        np.testing.assert_allclose(record.y_gradients.sum(0), square.numpy(), rtol=1e-4)


def test_pruning_layer_by_layer_keeps_the_model_near(model, batches):
    dense = model(batches[0]).logits.detach()
    errors = {}
    for method in ("magnitude", "admm"):
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        walk = ModelWalk(model, batches)
        layers = prune_layers(walk, "2:4", method)
        assert [r.density for layer in layers for r in layer.reports] == [0.5] * 8
        for layer, module in zip(layers, walk.modules, strict=True):
            np.testing.assert_array_equal(layer.down[1].todense(), module.down_proj[1].detach().numpy())
        errors[method] = float((model(batches[0]).logits - dense).norm().detach())
        model.load_state_dict(state)
    assert 0 < errors["admm"] < errors["magnitude"]


def test_the_stream_before_the_experts_is_the_one_that_their_norm_reads(model, batches):
    walk = ModelWalk(model, batches)
    for layer in range(2):
        for batch in walk.batches(layer):
            read = model.model.layers[layer].post_attention_layernorm(torch.from_numpy(batch.before))
            np.testing.assert_allclose(read.detach(), batch.x, atol=1e-5)
    record = next(survey(ModelWalk(model, batches)))
    assert record.stream > 0 and (record.turns > 0).any()


def test_gradients_decide_which_outputs_count(model, batches):
    """Gradients that say that only the even outputs matter make Samoyeds keep the even rows of ``down``."""
    records = observe(model, batches)
    for record in records:
        record.y_gradients[:] = np.where(np.arange(32) % 2, 1e-9, 1.0)
    layers = prune_layers(ModelWalk(model, batches), "samoyeds:1:2:16", "admm", observed=records)
    mask = layers[0].down[0].mask()
    assert mask[::2].any(axis=1).all() and not mask[1::2].any()


@pytest.mark.parametrize("name", REORDERED)
def test_the_order_of_the_hidden_dimension_changes_no_logit(name, batches, tmp_path):
    """In memory and in the published names of a checkpoint; embeddings and head share their memory or not."""
    order = np.random.default_rng(0).permutation(32)
    for tied in (False, True):
        model = make(name)
        model.config.tie_word_embeddings = tied
        if tied:
            model.tie_weights()
        want = model(batches[0]).logits.detach()
        model.save_pretrained(tmp_path / f"{tied}")
        reorder_model(model, order)
        assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
        np.testing.assert_allclose(model(batches[0]).logits.detach(), want, atol=1e-4 * want.abs().max().item())
        model.save_pretrained(tmp_path / f"moved {tied}")
        was, now = (load(tmp_path / f"{which}{tied}") for which in ("", "moved "))
        assert was.keys() == now.keys()
        for tensor in was:
            np.testing.assert_array_equal(reorder_hidden(tensor, was[tensor], order), now[tensor], err_msg=tensor)


def test_an_order_of_channels_from_a_model_of_transformers(model, batches):
    before = model(batches[0]).logits.detach()
    order = channel_order(ModelWalk(model, batches), "2:4", "wanda")
    assert sorted(order.tolist()) == list(range(32))
    assert torch.equal(model(batches[0]).logits.detach(), before)


@pytest.mark.parametrize("options", [(), ("--reorder",)])
def test_the_command_prunes_a_checkpoint_of_transformers(tmp_path, capsys, options):
    tokenizers = pytest.importorskip("tokenizers")
    words = {chr(65 + i): i for i in range(64)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="A"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    source, target, text = tmp_path / "in", tmp_path / "out", tmp_path / "text.txt"
    make("olmoe").to(torch.bfloat16).save_pretrained(source)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="A").save_pretrained(source)
    text.write_text("".join(np.random.default_rng(0).choice(list(words), 3 * 512)))
    arguments = ["prune", source, target, "--pattern", "2:4", "--calibration", text, "--windows", "2", *options]
    assert __main__.main([str(word) for word in arguments]) == 0, capsys.readouterr().err
    arrays = load(target)
    sparse = [array for array in arrays.values() if isinstance(array, NMArray)]
    assert [array.dtype.name for array in sparse] == ["bfloat16"] * 4
    names = Checkpoint(source).tensors
    assert any(name in arrays for name in names) and not all(name in arrays for name in names)


def test_a_model_without_experts_is_refused():
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(NMSparseError, match="holds no experts"):
        ModelWalk(transformers.AutoModelForCausalLM.from_config(config), ())
