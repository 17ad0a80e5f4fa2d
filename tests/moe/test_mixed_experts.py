"""Experts of one layer that differ in pattern, some of them dropped: against float64, and in and out of files."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nmsparse
from nmsparse import NMSparseError, demo, reference
from nmsparse.calibration import PrunedLayer
from nmsparse.calibration.writing import write_pruned
from nmsparse.formats import MixedExperts, stack_experts
from nmsparse.io import Checkpoint
from nmsparse.moe import MoELayer, Router, SparseExperts

H, I = 48, 40  # noqa: E741 (the field's names)
KINDS = ["dense", "2:4", "samoyeds:1:2:16", "vnm:16:2:8", "4:8", "drop"]


def weights(kinds, rows, columns, dtype=np.float32, seed=0):
    """One weight (rows, columns) for each kind."""
    rng = np.random.default_rng(seed)
    dense = (rng.standard_normal((len(kinds), rows, columns)) * columns**-0.5).astype(dtype)
    made = {"dense": lambda w: w, "drop": lambda w: None}
    return [
        made.get(kind, lambda w, kind=kind: nmsparse.array(w, kind))(w) for kind, w in zip(kinds, dense, strict=True)
    ]


def experts_of(kinds, dtype=np.float32, gated=True, activation="silu", down=None):
    gate_up = weights(kinds, 2 * I if gated else I, H, dtype)
    return SparseExperts(gate_up, weights(down or kinds, H, I, dtype, seed=1), activation)


def call(experts, tokens, top_k, dtype=np.float32, seed=0):
    """A routing in which no token takes an expert twice: the result, and what the definition makes of it."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, H)).astype(dtype)
    ids = rng.random((tokens, experts.num_experts)).argsort(axis=1)[:, :top_k]
    routing = ids, rng.random((tokens, top_k)).astype(np.float32)
    return experts(x, *routing), reference.moe(x, *routing, experts.gate_up, experts.down, experts.activation)


@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=8).filter(lambda kinds: set(kinds) != {"drop"}),
    tokens=st.integers(0, 40),
    dtype=st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
    gated=st.booleans(),
    activation=st.sampled_from(["silu", "gelu", "relu2"]),
    seed=st.integers(0, 2**32),
)
def test_any_mixture(kinds, tokens, dtype, gated, activation, seed):
    experts = experts_of(kinds, dtype, gated, activation)
    got, want = call(experts, tokens, 1 + seed % len(kinds), seed=seed)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_it_is_the_loop_over_experts():
    kinds = ["2:4", "dense", "drop", "samoyeds:1:2:16", "2:4"]
    gate_up, down = weights(kinds, 2 * I, H), weights(kinds, H, I, seed=1)
    experts, x = SparseExperts(gate_up, down), np.random.default_rng(2).standard_normal((9, H), np.float32)
    y = np.zeros_like(x)
    for e, kind in enumerate(kinds):
        if kind != "drop":
            alone = SparseExperts(*([w] for w in (gate_up[e], down[e])))
            y += 0.2 * alone(x, np.zeros((9, 1), int), np.ones((9, 1), np.float32))
    everyone = np.tile(np.arange(5), (9, 1)), np.full((9, 5), 0.2, np.float32)
    np.testing.assert_allclose(experts(x, *everyone), y, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(experts(x, *everyone), experts(x, *everyone))


def test_pruned_to_a_pattern_for_each():
    kinds = ["2:4", "dense", "drop", "samoyeds:1:2:16"]
    gate_up, down = (np.stack(weights(["dense"] * 4, *shape)) for shape in ((2 * I, H), (H, I)))
    experts = SparseExperts.from_dense(gate_up, down, kinds, "gelu")
    assert experts.gate_up.kinds == experts.down.kinds == kinds and experts.activation == "gelu"
    np.testing.assert_array_equal(experts.down.todense()[0], nmsparse.array(down[0], "2:4").todense())
    np.testing.assert_array_equal(experts.down.todense()[1:3], [down[1], 0 * down[2]])
    with pytest.raises(NMSparseError, match="a pattern for each of 4 experts, got 3"):
        SparseExperts.from_dense(gate_up, down, kinds[1:])


def test_projections_may_be_mixed_apart():
    experts = experts_of(["2:4", "dense", "2:4"], down=["dense", "2:4", "4:8"])
    np.testing.assert_allclose(*call(experts, 12, 2), rtol=1e-4, atol=1e-5)


def test_a_dropped_expert_is_one_that_is_left_out():
    experts, x = experts_of(["2:4", "drop", "dense"]), np.ones((2, H), np.float32)
    half = np.full((2, 2), 0.5, np.float32)
    np.testing.assert_array_equal(experts(x, [[0, 1], [1, 2]], half), experts(x, [[0, -1], [-1, 2]], half))


def test_float64():
    experts = experts_of(["2:4", "drop", "dense"], np.float64)
    got, want = call(experts, 5, 2, np.float64)
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_a_layer_of_them():
    experts, rng = experts_of(["2:4", "dense", "drop", "4:8"]), np.random.default_rng(3)
    layer = MoELayer(rng.standard_normal((4, H), np.float32), experts, Router(2, renormalize=True))
    x = rng.standard_normal((7, H), np.float32)
    np.testing.assert_allclose(
        layer(x), reference.moe(x, *layer.route(x), experts.gate_up, experts.down), rtol=1e-4, atol=1e-4
    )


def test_what_it_says_of_itself():
    experts = experts_of(["2:4", "dense", "2:4", "drop"])
    assert experts.gate_up.kinds == ["2:4", "dense", "2:4", "drop"]
    assert "2 x 2:4, 1 x dense, 1 x drop, float32" in repr(experts) and experts.pattern is None
    one = sum(w.nbytes for w in (*weights(["2:4", "dense"], 2 * I, H), *weights(["2:4", "dense"], H, I)))
    spare = SparseExperts.from_dense(np.ones((1, 2 * I, H), np.float32), np.ones((1, H, I), np.float32), "2:4").nbytes
    assert experts.nbytes == one + spare
    assert (experts.num_experts, experts.hidden_size, experts.intermediate_size, experts.gated) == (4, H, I, True)
    assert experts.gate_up[3] is None and experts.gate_up[1].shape == (2 * I, H)
    assert experts.device == experts.gate_up.device == "cpu"
    wide = experts.gate_up.astype(np.float64)
    assert wide.dtype == np.float64 and wide.kinds == experts.gate_up.kinds
    np.testing.assert_array_equal(wide.todense(), experts.gate_up.todense())


def test_alike_experts_are_a_stack():
    assert isinstance(stack_experts(weights(["2:4", "2:4"], 8, 16)), nmsparse.NMArray)
    assert isinstance(stack_experts(weights(["dense", "dense"], 8, 16)), np.ndarray)
    assert isinstance(stack_experts(weights(["2:4", "drop"], 8, 16)), MixedExperts)


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([], "no parts"),
        ([([0], np.ones((2, 4, 8)))], "the numbers of its n experts"),
        ([([0], np.ones((4, 8)))], "the numbers of its n experts"),
        ([([1, 0], np.ones((2, 4, 8)))], "ascending"),
        ([([0], np.ones((1, 4, 8))), ([0], np.ones((1, 4, 8)))], "once at most"),
        ([([3], np.ones((1, 4, 8)))], r"0..2 once at most, got \[3\]"),
        ([([0], np.ones((1, 4, 8))), ([1], np.ones((1, 8, 4)))], "one shape, dtype and device"),
        ([([0], np.ones((1, 4, 8))), ([1], np.ones((1, 4, 8), np.float32))], "one shape, dtype and device"),
        ([([0], np.ones((1, 4, 8), int))], "expected weights in"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, says):
    with pytest.raises(NMSparseError, match=says):
        MixedExperts(parts, 3)


def test_experts_that_do_not_fit_are_refused():
    with pytest.raises(NMSparseError, match="stack experts on axis 0"):
        SparseExperts(weights(["2:4", "dense"], 2 * I, H), weights(["2:4", "dense", "2:4"], H, I))
    with pytest.raises(NMSparseError, match="no parts"):
        SparseExperts([None, None], [None, None])


# --- files -----------------------------------------------------------------------------------------------------------


def test_saved_and_loaded(tmp_path):
    experts, path = experts_of(["2:4", "dense", "drop", "samoyeds:1:2:16", "2:4"]), tmp_path / "experts.safetensors"
    nmsparse.save(path, {"gate_up": experts.gate_up, "down": experts.down, "norm": np.ones(3)})
    held = nmsparse.load(path)
    assert list(held) == ["gate_up", "down", "norm"] and isinstance(held["down"], MixedExperts)
    assert held["gate_up"].kinds == experts.gate_up.kinds and held["down"].nbytes == experts.down.nbytes
    again = SparseExperts(held["gate_up"], held["down"])
    np.testing.assert_array_equal(call(again, 9, 3)[0], call(experts, 9, 3)[0])
    checkpoint = Checkpoint(path)
    info = checkpoint.describe("gate_up")
    assert (info.pattern, info.shape) == ("2:4 + dense + samoyeds:1:2:16", (5, 2 * I, H))
    assert info.nbytes == experts.gate_up.nbytes and checkpoint.sparse_names == ["gate_up", "down"]
    assert "2 sparse and 1 dense" in repr(checkpoint)


def test_names_that_collide_are_refused(tmp_path):
    mixed = stack_experts(weights(["2:4", "dense"], 8, 16))
    for arrays in ({"w": mixed, "w.1": np.ones(2)}, {"w.1": np.ones(2), "w": mixed}):
        with pytest.raises(NMSparseError, match=r"would both be named 'w\.1'"):
            nmsparse.save(tmp_path / "w.safetensors", arrays)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ([], "expected an object 'experts'"),
        ({"w": 3}, "expected an object with count and parts"),
        ({"w": {"count": "2", "parts": {"w.0": [0]}}}, "expected an object with count and parts"),
        ({"w": {"count": 2, "parts": {"w.7": [0]}}}, "lack their part 'w.7'"),
        ({"w": {"count": 2, "parts": {"w.0": [0.5]}}}, "should list numbers"),
        ({"w": {"count": 2, "parts": {"w.0": [5], "w.1": [1]}}}, r"should list numbers in 0\.\.1, got \[5\]"),
        ({"w": {"count": 2, "parts": {"w.0": [], "w.1": [1]}}}, "the numbers of its n experts"),
        ({"w": {"count": 2, "parts": {"w.0": [0], "w.1": [0]}}}, "once at most"),
        ({"w.0": {"count": 2, "parts": {"w.1": [0]}}}, "names both experts"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(tmp_path, changed, says):
    path = tmp_path / "w.safetensors"
    nmsparse.save(path, {"w": stack_experts(weights(["2:4", "dense"], 8, 16))})
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    known = json.loads(header["__metadata__"]["nmsparse"])
    header["__metadata__"]["nmsparse"] = json.dumps({**known, "experts": changed})
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    with pytest.raises(NMSparseError, match=says):
        nmsparse.load(path)


@pytest.mark.skipif(not demo.MODEL.exists(), reason="needs examples/tiny-moe of a checkout")
def test_a_model_pruned_to_a_budget_runs_on_its_own_patterns(tmp_path):
    """What ``nmsparse prune --budget`` writes: each expert by itself, in its own pattern."""
    model, kinds = (
        demo.load_model(demo.MODEL),
        ["dense", "2:4", "samoyeds:1:2:128", "2:4", "dense", "2:4", "2:4", "2:4"],
    )
    pruned = [SparseExperts.from_dense(experts.gate_up, experts.down, kinds) for experts in model.experts]
    layers = [PrunedLayer(*([weight[e] for e in range(8)] for weight in (p.gate_up, p.down)), []) for p in pruned]
    held = demo.load_model(write_pruned(demo.MODEL, tmp_path / "out", layers, "magnitude"))
    assert [experts.down.kinds for experts in held.experts] == [kinds] * len(layers)
    assert [experts.nbytes for experts in held.experts] == [experts.nbytes for experts in pruned]
    windows = demo.read_windows(demo.MODEL / "heldout.txt", 1)[:, :64]
    expected = held.with_experts(lambda w: w.todense().astype(np.float32))(windows)
    assert np.abs(held(windows) - expected).max() < 1e-3 * np.abs(expected).max()
