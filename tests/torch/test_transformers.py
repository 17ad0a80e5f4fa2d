"""Models of transformers with sparse experts: the same logits as with the pruned weights in dense form."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from moe_models import MODELS, make, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import nmsparse.torch as nt
from nmsparse import NMSparseError
from nmsparse.io import convert
from nmsparse.torch import SparseLinear, SparseWeight
from nmsparse.torch.layout import halves

PATTERNS = ["2:4", "1:4", "samoyeds:1:2:16", "vnm:8:2:8"]


def weights_of(model):
    return [module for module in model.modules() if isinstance(module, SparseWeight)]


@torch.no_grad()
def logits(model, **options):
    return model(tokens(), **options).logits


def masked(model):
    """A dense copy with zeros where nothing is stored, on the plain loop of transformers."""
    dense = nt.densify_(copy.deepcopy(model))
    dense.set_experts_implementation("eager")
    return dense


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", MODELS)
def test_logits(name, pattern):
    model = make(name)
    before = logits(model)
    names = set(model.state_dict())
    nt.sparsify_(model, pattern)
    assert model.config._experts_implementation == "nmsparse"
    assert len(weights_of(model)) >= 2 and {w.pattern for w in weights_of(model)} == {pattern}
    dense = masked(model)
    assert set(dense.state_dict()) == names
    assert not weights_of(dense)
    want = logits(dense)
    assert (before - want).abs().max() > 1e-3, "pruning must be seen"
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("name", MODELS)
def test_gradients(name):
    """Training the kept values gives the gradients of the masked dense model, where values are kept."""
    model = nt.sparsify_(make(name), "2:4")
    dense = masked(model)
    ids = tokens()
    for m in (model, dense):
        m(ids, labels=ids).loss.backward()
    dense_parameters = dict(dense.named_parameters())
    for path, parameter in model.named_parameters():
        if not path.endswith(".values"):
            want = dense_parameters[path].grad
            assert (parameter.grad is None) == (want is None)
            if want is not None:
                torch.testing.assert_close(parameter.grad, want, rtol=1e-4, atol=1e-6)
    for path, weight in model.named_modules():
        if isinstance(weight, SparseWeight):
            sparse = copy.deepcopy(weight)
            sparse.values = torch.nn.Parameter(weight.values.grad)
            owner, _, attribute = path.rpartition(".")
            holder = copy.copy(dense.get_submodule(owner))
            got = sparse.todense()
            want = dense_parameters[path].grad
            if holder.is_transposed:
                want = want.mT
            if attribute == "gate_up_proj" and not holder.is_concatenated:
                want = halves(want, -2)
            kept = copy.deepcopy(weight)
            kept.values = torch.nn.Parameter(torch.ones_like(weight.values))
            torch.testing.assert_close(got, want * kept.todense(), rtol=1e-4, atol=1e-6)


class Watch(TorchDispatchMode):
    """The shapes of all floating-point tensors that are made, on the meta device apart."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and not leaf.is_meta:
                self.shapes.add(tuple(leaf.shape))
        return result


# GraniteMoe's published names are none that convert knows.
@pytest.mark.parametrize("name", [name for name in MODELS if name != "GraniteMoe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_converted_directory(tmp_path, name, dtype, monkeypatch):
    """nmsparse convert, then from_pretrained: the same model as sparsify_, and no dense experts on the way."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # load in this thread, where Watch looks
    model = make(name, dtype)
    model.save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "sparse", "samoyeds:1:2:16")
    with Watch() as watch:
        loaded = nt.from_pretrained(tmp_path / "sparse")
    made = {shape for shape in watch.shapes if len(shape) == 3}
    assert made and not made & {tuple(w.shape) for w in weights_of(loaded)}
    assert loaded.dtype == dtype and loaded.config._experts_implementation == "nmsparse"
    want = nt.sparsify_(make(name, dtype), "samoyeds:1:2:16")
    assert loaded.state_dict().keys() == want.state_dict().keys()
    for key, tensor in want.state_dict().items():
        assert torch.equal(loaded.state_dict()[key].float(), tensor.float()), key
    if dtype == torch.float32:  # to(bfloat16) rounds the rotary frequencies of ``want`` as well
        torch.testing.assert_close(logits(loaded), logits(want), rtol=0, atol=0)
    assert not any(p.is_meta for p in loaded.parameters())
    # And through the files of transformers itself, which remember the weights one by one.
    loaded.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert set(config["quantization_config"]["weights"].values()) == {"samoyeds:1:2:16"}
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=dtype)
    torch.testing.assert_close(logits(again), logits(loaded), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_asked_for(tmp_path, dtype):
    """Whatever the files hold."""
    for stored in (torch.float32, torch.bfloat16):
        make("Qwen3Moe", stored).save_pretrained(tmp_path / f"dense-{stored}")
        convert(tmp_path / f"dense-{stored}", tmp_path / f"{stored}", "2:4")
        loaded = nt.from_pretrained(tmp_path / f"{stored}", dtype=dtype)
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
        assert logits(loaded).dtype == dtype


def test_select_and_mixed_patterns(tmp_path):
    model = make("Mixtral")
    nt.sparsify_(model, "2:4", select=r"layers\.1\.mlp\.experts")
    nt.sparsify_(model, "1:2", select=r"self_attn\.(q|o)_proj")
    assert isinstance(model.model.layers[0].self_attn.q_proj, SparseLinear)
    assert not isinstance(model.model.layers[0].self_attn.k_proj, SparseLinear)
    assert [w.pattern for w in weights_of(model)] == ["1:2", "1:2", "1:2", "1:2", "2:4", "2:4"]
    want = logits(masked(model))
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)  # layer 0 runs dense beside it
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    nt.sparsify_(model, "2:4")
    assert len(weights_of(model)) == 8
    with pytest.raises(NMSparseError, match="found no experts"):
        nt.sparsify_(model, "2:4")


def test_generate_and_the_dense_start():
    """A dense model under our implementation runs dense; generate goes through the cache, token by token."""
    model = make("Qwen3Moe")
    want = logits(model)
    import nmsparse.torch.hf  # noqa: F401

    model.set_experts_implementation("nmsparse")
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)
    nt.sparsify_(model, "2:4")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(tokens(), **options), masked(model).generate(tokens(), **options))


def test_it_stays_a_model():
    """Casting, copying and training flags work as on any model of transformers."""
    model = nt.sparsify_(make("Olmoe"), "2:4")
    want = logits(model)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert {w.dtype for w in weights_of(half)} == {torch.bfloat16}
    assert {w.meta.dtype for w in weights_of(half)} == {torch.uint16}
    assert (logits(half).float() - want).abs().max() < 0.1 * want.abs().max()
    torch.testing.assert_close(logits(half.float()), want, rtol=0.05, atol=0.05)
    assert all(p.requires_grad for p in model.parameters())


def test_what_is_refused(tmp_path):
    model = make("Mixtral")
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(NMSparseError, match="not written by nmsparse convert"):
        nt.from_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "experts", "2:4", experts_only=True)
    with pytest.raises(NMSparseError, match="experts only"):
        nt.from_pretrained(tmp_path / "experts")
    with pytest.raises(NMSparseError, match="prunes nothing"):
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", quantization_config=nt.hf.NMSparseConfig(pattern="2:4")
        )
    nt.sparsify_(model, "2:4")
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(NMSparseError, match="expert parallelism"):
        logits(model)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_device_map(tmp_path, place):
    """Weights of a layer on another device, or on disk until they are needed."""
    pytest.importorskip("accelerate")
    model = nt.sparsify_(make("Mixtral"), "samoyeds:1:2:16")
    model.save_pretrained(tmp_path)
    names = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    device_map = dict.fromkeys(names, "cpu") | {"model.layers.1": place}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=device_map, offload_folder=tmp_path / "offload", offload_buffers=True
    )
    assert any(w.values.is_meta for w in weights_of(loaded)) == (place == "disk")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
