"""Orders of columns, and a model whose hidden dimension is in another order: the same outputs, other patterns."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmsparse import NMSparseError, __main__, demo, prune
from nmsparse.calibration import MixtralWalk
from nmsparse.calibration.channels import channel_order, hidden_axis, load_mixtral, reorder_hidden
from nmsparse.calibration.choices import weight_scores
from nmsparse.calibration.walk import survey
from nmsparse.demo.mixtral import load
from nmsparse.formats import parse
from nmsparse.prune.permutation import column_order

PATTERNS = ("2:4", "1:4", "3:6", "4:4", "vnm:4:2:8", "samoyeds:1:2:8")


def kept(scores, pattern):
    return float(prune.apply(scores, pattern, scores=scores).sum())


@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(0, 30), st.sampled_from(PATTERNS))
@settings(max_examples=60, deadline=None)
def test_it_is_an_order_of_all_columns(seed, rows, columns, pattern):
    order = column_order(np.random.default_rng(seed).random((rows, columns)), pattern)
    assert sorted(order.tolist()) == list(range(columns))


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:6"])
def test_more_is_kept_than_by_the_order_that_was(pattern):
    rng = np.random.default_rng(0)
    for _ in range(5):
        scores = rng.random((20, 48)) * rng.lognormal(0, 1.5, 48)
        scores = scores[:, np.argsort(scores.sum(0))]  # strong ones side by side: the worst case
        m = parse(pattern).m
        dealt = np.argsort(-scores.sum(0), kind="stable").reshape(m, -1).T.ravel()
        best = kept(scores[:, column_order(scores, pattern)], pattern)
        assert best >= kept(scores[:, dealt], pattern) > kept(scores, pattern)


def test_blocks_of_rows_are_ordered_together():
    scores = np.random.default_rng(1).random((16, 64)) * np.random.default_rng(2).lognormal(0, 2, 64)
    scores = scores[:, np.argsort(scores.sum(0))]
    for pattern in ("vnm:4:2:8", "samoyeds:1:2:16"):
        assert kept(scores[:, column_order(scores, pattern)], pattern) > kept(scores, pattern)


def test_one_row_finds_the_best_grouping():
    """Two of four columns of one row: the best that any order can do is to keep the larger half of all."""
    scores = np.random.default_rng(3).random((1, 32))
    assert kept(scores[:, column_order(scores, "2:4")], "2:4") == pytest.approx(np.sort(scores[0])[16:].sum(), rel=1e-6)


def test_names_of_tensors():
    layer = "model.layers.7."
    reads = (
        "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", layer + "input_layernorm.weight",
        layer + "self_attn.q_proj.weight", layer + "mlp.gate.weight", layer + "mlp.shared_expert_gate.weight",
        layer + "block_sparse_moe.experts.0.w3.weight", layer + "mlp.experts.gate_up_proj",
    )  # fmt: skip
    assert {hidden_axis(name) for name in reads} == {-1}
    writes = ("self_attn.o_proj.weight", "mlp.experts.down_proj", "mlp.shared_experts.down_proj.weight")
    assert {hidden_axis(layer + name) for name in writes} == {-2}
    assert hidden_axis(layer + "self_attn.o_proj.bias") == -1
    inside = ("self_attn.q_proj.bias", "self_attn.kv_a_layernorm.weight", "mlp.gate.e_score_correction_bias")
    assert {hidden_axis(layer + name) for name in inside} == {None}
    for unknown in ("model.visual.patch_embed.weight", layer + "mlp.router.weight", layer + "input_layernorm.bias"):
        with pytest.raises(NMSparseError, match="leave --reorder out"):
            hidden_axis(unknown)
    with pytest.raises(NMSparseError, match=r"expected the hidden size 3 on axis -2, got shape \(2, 3\)"):
        reorder_hidden("w2.weight", np.zeros((2, 3)), np.arange(3))


@st.composite
def small_models(draw):
    """The config and the tensors of a small random Mixtral."""
    heads, kv_heads = draw(st.sampled_from([(2, 1), (2, 2), (4, 2)]))
    hidden, width, experts, layers = draw(st.integers(2, 12)), draw(st.integers(1, 9)), draw(st.integers(2, 4)), 2
    config = {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "head_dim": 4,
        "num_key_value_heads": kv_heads, "num_local_experts": experts, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5,
        "rope_theta": 100.0, "model_type": "mixtral", "tie_word_embeddings": draw(st.booleans()),
    }  # fmt: skip
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shapes = {"model.embed_tokens": (256, hidden), "lm_head": (256, hidden), "model.norm": (hidden,)}
    for layer in range(layers):
        attention, moe = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.block_sparse_moe"
        shapes |= {f"{attention}.q_proj": (4 * heads, hidden), f"{attention}.o_proj": (hidden, 4 * heads)}
        shapes |= {f"{attention}.{p}_proj": (4 * kv_heads, hidden) for p in "kv"}
        shapes |= {f"model.layers.{layer}.{n}_layernorm": (hidden,) for n in ("input", "post_attention")}
        shapes[f"{moe}.gate"] = experts, hidden
        for e in range(experts):
            shapes |= {f"{moe}.experts.{e}.w{i}": (width, hidden) for i in (1, 3)}
            shapes[f"{moe}.experts.{e}.w2"] = hidden, width
    return config, {f"{name}.weight": rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


@given(small_models(), st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_the_order_of_the_hidden_dimension_changes_no_logit(model, seed):
    config, tensors = model
    rng = np.random.default_rng(seed)
    order, tokens = rng.permutation(config["hidden_size"]), rng.integers(0, 256, (2, 5)).astype(np.uint8)
    moved = {name: reorder_hidden(name, tensor, order) for name, tensor in tensors.items()}
    want, got = (load(config, held.__getitem__)(tokens) for held in (tensors, moved))
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-4 * np.abs(want).max())


needs_model = pytest.mark.skipif(not demo.MODEL.exists(), reason="needs examples/tiny-moe of a checkout")


@needs_model
def test_tiny_moe_computes_the_same_and_keeps_more():
    model = load_mixtral(demo.MODEL)
    windows = demo.read_windows(demo.MODEL / "calibration.txt", 3)
    order = channel_order(MixtralWalk(model, windows), "2:4", "wanda")
    moved = load_mixtral(demo.MODEL, order)
    want = model(windows)
    assert np.abs(moved(windows) - want).max() < 1e-5 * np.abs(want).max()
    gains = []
    for was, now in zip(survey(MixtralWalk(model, windows)), survey(MixtralWalk(moved, windows)), strict=True):
        for e in range(len(was.down)):
            before, after = (weight_scores(record, e, "wanda")[0] for record in (was, now))
            np.testing.assert_allclose(after, before[:, order], rtol=1e-3, atol=1e-3 * before.max())
            gains.append(kept(after, "2:4") / kept(before, "2:4"))
    assert np.mean(gains) > 1


@needs_model
def test_prune_and_eval_in_another_order(tmp_path, capsys):
    """Everything at once: neurons and channels moved, half of the neurons dropped, super experts asked for."""
    bits = {}
    for name, options in (("plain", []), ("moved", ["--reorder"]), ("half", ["--reorder", "--neurons", "0.5"])):
        words = ["prune", demo.MODEL, tmp_path / name, "--pattern", "2:4", "--method", "magnitude", "--windows", 2]
        assert __main__.main([str(word) for word in [*words, *options]]) == 0, capsys.readouterr().err
        capsys.readouterr()
        assert __main__.main(["eval", str(tmp_path / name), "--windows", "12", "--json"]) == 0
        bits[name] = json.loads(capsys.readouterr().out)["bits_per_byte"]
    assert bits["moved"] < bits["plain"] < bits["half"]
