"""Any Mixture-of-Experts model of transformers: statistics against autograd, and pruning layer by layer."""

from __future__ import annotations

import numpy as np
import pytest

from nmsparse import NMArray, NMSparseError, __main__, load
from nmsparse.calibration import prune_layers
from nmsparse.io import Checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from nmsparse.calibration.huggingface import ModelWalk, observe  # noqa: E402

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
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


def make(name):
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(MODELS[name]())
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


def test_gradients_decide_which_outputs_count(model, batches):
    """Gradients that say that only the even outputs matter make Samoyeds keep the even rows of ``down``."""
    records = observe(model, batches)
    for record in records:
        record.y_gradients[:] = np.where(np.arange(32) % 2, 1e-9, 1.0)
    layers = prune_layers(ModelWalk(model, batches), "samoyeds:1:2:16", "admm", observed=records)
    mask = layers[0].down[0].mask()
    assert mask[::2].any(axis=1).all() and not mask[1::2].any()


def test_the_command_prunes_a_checkpoint_of_transformers(tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    words = {chr(65 + i): i for i in range(64)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="A"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    source, target, text = tmp_path / "in", tmp_path / "out", tmp_path / "text.txt"
    make("olmoe").to(torch.bfloat16).save_pretrained(source)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="A").save_pretrained(source)
    text.write_text("".join(np.random.default_rng(0).choice(list(words), 3 * 512)))
    arguments = ["prune", source, target, "--pattern", "2:4", "--calibration", text, "--windows", "2"]
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
