"""SparseExperts against every expert applied to every token, weighted by a table with zeros."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmsparse import NMSparseError, UnsupportedDeviceError, array, reference
from nmsparse.moe import SparseExperts, route

PATTERNS = ["2:4", "1:3", "vnm:16:2:8", "samoyeds:1:2:16"]
E, H, I = 5, 48, 40  # noqa: E741 (the field's names)


def dense(weight):
    return np.asarray(weight.todense() if hasattr(weight, "todense") else weight, np.float64)


def all_experts_on_all_tokens(experts, x, ids, weights):
    table = np.zeros((len(x), experts.num_experts))
    np.put_along_axis(table, ids, weights, axis=1)
    h = np.einsum("erh,th->ter", dense(experts.gate_up), x.astype(np.float64))
    act, width = reference.ACTIVATIONS[experts.activation], experts.intermediate_size
    h = act(h[..., :width]) * h[..., width:] if experts.gated else act(h)
    return np.einsum("ehi,tei,te->th", dense(experts.down), h, table)


def weights_of(rng, *shape, dtype=np.float32):
    return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(dtype)


def make(pattern="2:4", gated=True, activation="silu", dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    gate_up, down = weights_of(rng, E, 2 * I if gated else I, H, dtype=dtype), weights_of(rng, E, H, I, dtype=dtype)
    if pattern == "dense":
        return SparseExperts(gate_up, down, activation)
    return SparseExperts.from_dense(gate_up, down, pattern, activation)


def make_tokens(tokens=7, top_k=2, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, H)).astype(dtype)
    return x, *route(rng.standard_normal((tokens, E)), top_k, renormalize=True)


def assert_close(got, want, eps):
    np.testing.assert_allclose(got.astype(np.float64), want, rtol=0, atol=eps * max(1, np.abs(want).max(initial=0)))


@pytest.mark.parametrize("pattern", [*PATTERNS, "dense"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("tokens", [1, 7, 150])
def test_agrees_with_all_experts_on_all_tokens(pattern, gated, tokens):
    experts = make(pattern, gated)
    x, ids, weights = make_tokens(tokens)
    y = experts(x, ids, weights)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert_close(y, all_experts_on_all_tokens(experts, x, ids, weights), 2e-6)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_every_activation(activation):
    experts = make(activation=activation)
    x, ids, weights = make_tokens()
    assert_close(experts(x, ids, weights), all_experts_on_all_tokens(experts, x, ids, weights), 2e-6)


@pytest.mark.parametrize("top_k", [1, 3, E])
@pytest.mark.parametrize("id_dtype", [np.int32, np.int64])
def test_every_number_of_experts_per_token(top_k, id_dtype):
    experts = make("samoyeds:1:2:16")
    x, ids, weights = make_tokens(top_k=top_k)
    y = experts(x, ids.astype(id_dtype), weights)
    assert_close(y, all_experts_on_all_tokens(experts, x, ids, weights), 2e-6)


@pytest.mark.parametrize("x_dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("w_dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("pattern", ["2:4", "dense"])
def test_half_precision_is_storage_only(x_dtype, w_dtype, pattern):
    experts = make(pattern, dtype=w_dtype)
    x, ids, weights = make_tokens(dtype=x_dtype)
    y = experts(x, ids, weights)
    assert y.dtype == x_dtype
    wide = experts(x.astype(np.float32), ids, weights)
    np.testing.assert_array_equal(y, wide.astype(x_dtype))  # rounded once, at the end
    assert_close(wide, all_experts_on_all_tokens(experts, x, ids, weights), 2e-6)


@pytest.mark.parametrize(("x_dtype", "w_dtype"), [(np.float64, np.float64), (np.float64, np.float32)])
def test_float64_is_computed_in_float64(x_dtype, w_dtype):
    experts = make(dtype=w_dtype)
    x, ids, weights = make_tokens(dtype=x_dtype)
    y = experts(x, ids, weights.astype(np.float64))
    assert y.dtype == np.float64
    assert_close(y, all_experts_on_all_tokens(experts, x, ids, weights), 1e-13)


def test_leading_axes_are_kept():
    experts = make()
    x, ids, weights = make_tokens(6)
    want = experts(x, ids, weights)
    batch = x.reshape(2, 3, H)
    np.testing.assert_array_equal(experts(batch, ids, weights), want.reshape(2, 3, H))
    np.testing.assert_array_equal(experts(batch, ids.reshape(2, 3, 2), weights.reshape(2, 3, 2)), want.reshape(2, 3, H))
    assert_close(experts(x[0], ids[0], weights[0]), want[0], 2e-6)


@pytest.mark.parametrize("shape", [(0, H), (2, 0, H)])
def test_no_token(shape):
    y = make()(np.empty(shape, np.float32), np.empty((0, 2), np.int32), np.empty((0, 2), np.float32))
    assert (y.shape, y.dtype) == (shape, np.float32)


def test_one_expert_takes_all_and_the_others_are_idle():
    experts = make()
    x, *_ = make_tokens(9)
    ids, weights = np.full((9, 1), 3, np.int32), np.ones((9, 1), np.float32)
    assert_close(experts(x, ids, weights), all_experts_on_all_tokens(experts, x, ids, weights), 2e-6)


def test_inputs_may_be_read_only_or_strided_and_stay_as_they_are():
    experts = make()
    x, ids, weights = make_tokens(8)
    want = experts(x, ids, weights)
    strided = [np.repeat(a, 2, axis=0)[::2] for a in (x, ids, weights)]
    copies = [a.copy() for a in strided]
    for a in strided:
        a.flags.writeable = False
    np.testing.assert_array_equal(experts(*strided), want)
    for a, copy in zip(strided, copies, strict=True):
        np.testing.assert_array_equal(a, copy)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, E), st.sampled_from(PATTERNS))
def test_it_is_linear_in_the_routing_weights(seed, tokens, top_k, pattern):
    experts = make(pattern)
    x, ids, weights = make_tokens(tokens, top_k, seed)
    np.testing.assert_array_equal(experts(x, ids, 4 * weights), 4 * experts(x, ids, weights))  # a power of 2: exact
    np.testing.assert_array_equal(experts(x, ids, 0 * weights), 0)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, E), st.sampled_from([0.3, 1.0]))
def test_a_dropped_slot_is_one_without_weight(seed, tokens, top_k, share):
    x, ids, weights = make_tokens(tokens, top_k, seed)
    left_out = np.random.default_rng(seed).random(ids.shape) < share
    kept, none = np.where(left_out, 0, weights), np.where(left_out, -1, ids).astype(ids.dtype)
    for experts in (make(), make("dense")):
        assert_close(experts(x, none, weights), all_experts_on_all_tokens(experts, x, ids, kept), 2e-6)
    exact = make(dtype=np.float64)
    assert_close(exact(x, none, weights), all_experts_on_all_tokens(exact, x, ids, kept), 1e-6)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, E))
def test_renaming_the_experts_changes_nothing(seed, tokens, top_k):
    experts = make()
    x, ids, weights = make_tokens(tokens, top_k, seed)
    order = np.random.default_rng(seed).permutation(E)
    renamed = SparseExperts(
        dense(experts.gate_up)[order].astype(np.float32), dense(experts.down)[order].astype(np.float32)
    )
    new_ids = np.argsort(order).astype(np.int32)[ids]
    assert_close(renamed(x, new_ids, weights), experts(x, ids, weights), 2e-6)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 20), st.integers(1, E))
def test_tokens_do_not_see_each_other(seed, tokens, top_k):
    experts = make("vnm:16:2:8")
    x, ids, weights = make_tokens(tokens, top_k, seed)
    order = np.random.default_rng(seed).permutation(tokens)
    y = experts(x, ids, weights)
    assert_close(experts(x[order], ids[order], weights[order]), y[order], 2e-6)
    x[1:] = np.nan
    assert_close(experts(x, ids, weights)[0], y[0], 2e-6)


def test_what_it_says_about_itself():
    experts = make("samoyeds:1:2:16", dtype=ml_dtypes.bfloat16)
    assert (experts.num_experts, experts.hidden_size, experts.intermediate_size) == (E, H, I)
    assert experts.gated
    assert not make(gated=False).gated
    assert experts.dtype == ml_dtypes.bfloat16
    assert str(experts.pattern) == "samoyeds:1:2:16"
    assert experts.nbytes == sum(b.nbytes for w in (experts.gate_up, experts.down) for b in w.buffers().values())
    assert make("dense").pattern is None
    assert make("dense").nbytes == 4 * E * 3 * I * H
    assert "samoyeds:1:2:16" in repr(experts)
    mixed = SparseExperts(experts.gate_up, dense(experts.down).astype(ml_dtypes.bfloat16))
    assert mixed.pattern is None
    assert "samoyeds:1:2:16 and dense" in repr(mixed)


def test_sparse_and_dense_weights_can_be_mixed():
    experts = make("samoyeds:1:2:16")
    x, ids, weights = make_tokens()
    want = experts(x, ids, weights)
    decoded = dense(experts.gate_up).astype(np.float32), dense(experts.down).astype(np.float32)
    assert_close(SparseExperts(experts.gate_up, decoded[1])(x, ids, weights), want, 2e-6)
    assert_close(SparseExperts(decoded[0], experts.down)(x, ids, weights), want, 2e-6)
    assert_close(SparseExperts(array(decoded[0], "4:4"), experts.down)(x, ids, weights), want, 2e-6)


ZEROS = {"gate_up": np.zeros((2, 8, 4), np.float32), "down": np.zeros((2, 4, 4), np.float32)}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"down": np.zeros((3, 4, 4), np.float32)}, "expected gate_up"),
        ({"down": np.zeros((2, 5, 4), np.float32)}, r"and \(2, 5, 4\)"),
        ({"down": np.zeros((2, 4, 3), np.float32)}, "gate before up"),
        ({"down": np.zeros((4, 4), np.float32)}, "down: expected one matrix per expert"),
        ({"gate_up": array(np.eye(8, dtype=np.float32), "2:4")}, "gate_up: expected one matrix per expert"),
        (
            {"gate_up": np.zeros((0, 8, 4), np.float32), "down": np.zeros((0, 4, 4), np.float32)},
            "one matrix per expert",
        ),
        ({"gate_up": np.zeros((2, 8, 4), np.float16)}, "one dtype, got float16 and float32"),
        ({"gate_up": np.zeros((2, 8, 4), np.int8)}, "int8"),
        ({"gate_up": "2:4"}, "gate_up"),
        ({"gate_up": None}, "gate_up"),
        ({"activation": "swish"}, "silu, gelu"),
        ({"activation": None}, "activation"),
    ],
)
def test_weights_that_do_not_fit_are_refused(changes, says):
    with pytest.raises(NMSparseError, match=says):
        SparseExperts(**{**ZEROS, **changes})


X, IDS, WEIGHTS = np.zeros((2, 4), np.float32), np.array([[0, 1], [1, 0]], np.int32), np.ones((2, 2), np.float32)


@pytest.mark.parametrize(
    ("x", "ids", "weights", "says"),
    [
        (np.zeros((2, 5), np.float32), IDS, WEIGHTS, r"x: expected shape \(tokens, 4\), got \(2, 5\)"),
        (np.float32(0), IDS, WEIGHTS, "x: expected shape"),
        (np.zeros((2, 4), np.int32), IDS, WEIGHTS, "int32"),
        (X, IDS[:1], WEIGHTS[:1], r"topk_ids: expected shape \(2, k\), got \(1, 2\)"),
        (X, IDS[None], WEIGHTS[None], "topk_ids: expected shape"),
        (X, IDS[:, :0], WEIGHTS[:, :0], "topk_ids: expected shape"),
        (X, np.int32(0), WEIGHTS, "topk_ids: expected shape"),
        (X, IDS - 2, WEIGHTS, r"expected expert numbers in 0\.\.1, or -1 to leave a slot out, got -2"),
        (X, IDS + 1, WEIGHTS, r"expected expert numbers in 0\.\.1, .* got 2"),
        (X, IDS * 0, WEIGHTS, "names an expert twice"),
        (X, IDS.astype(np.float32), WEIGHTS, "expected int32 or int64"),
        (X, IDS.astype(np.uint8), WEIGHTS, "expected int32 or int64"),
        (X, IDS.astype(bool), WEIGHTS, "expected int32 or int64"),
        (X, IDS, WEIGHTS[:1], "topk_weights"),
        (X, IDS, WEIGHTS[:, :1], r"expected one per id, shape \(2, 2\); got \(2, 1\)"),
        (X, IDS, WEIGHTS.astype(int), "topk_weights"),
        (X, IDS, WEIGHTS * np.nan, "topk_weights: expected finite values, got .*nan, nan.* for token 0"),
        (X, IDS, np.array([[1, 1], [1, np.inf]], np.float32), "for token 1"),
        (X, IDS, np.full((2, 2), 1e300), "topk_weights: expected finite"),
    ],
)
def test_bad_calls_are_refused(x, ids, weights, says):
    with pytest.raises(NMSparseError, match=says):
        SparseExperts(**ZEROS)(x, ids, weights)


def test_a_tensor_on_another_device_is_refused():
    class OnGPU:
        def __dlpack_device__(self):
            return (2, 0)

    with pytest.raises(UnsupportedDeviceError, match="DLPack device type 2"):
        SparseExperts(**ZEROS)(OnGPU(), IDS, WEIGHTS)
