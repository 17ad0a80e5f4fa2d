"""MoELayer apart from the published models: its parts, its dtypes, and what it refuses."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from nmsparse import NMSparseError
from nmsparse.moe import MoELayer, Router, SparseExperts, route

E, H, I = 4, 16, 8  # noqa: E741 (the field's names)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def experts(num=E, hidden=H, seed=1):
    return SparseExperts.from_dense(random(num, 2 * I, hidden, seed=seed), random(num, hidden, I, seed=seed), "2:4")


def make(**changes):
    parts = {"router_weight": random(E, H), "experts": experts(), "router": Router(2, renormalize=True)}
    return MoELayer(**{**parts, **changes})


def test_it_is_routing_then_experts():
    layer, x = make(), random(5, H, seed=2)
    ids, weights = route(x @ layer.router_weight.T, 2, renormalize=True)
    np.testing.assert_array_equal(layer.route(x)[0], ids)
    np.testing.assert_array_equal(layer(x), layer.experts(x, ids, weights))


def test_the_bias_is_used():
    bias = np.array([-9, -9, 9, 9], np.float32)
    ids, _ = make(bias=bias).route(random(5, H, seed=2))
    np.testing.assert_array_equal(np.sort(ids), [[2, 3]] * 5)


@pytest.mark.parametrize("shape", [(H,), (1, H)])
def test_shared_experts_are_added_through_their_gate(shape):
    x, shared, gate = random(5, H, seed=2), experts(1, seed=3), random(*shape, seed=4)
    everyone = np.zeros((5, 1), np.int32), np.ones((5, 1), np.float32)
    plain, alone = make()(x), shared(x, *everyone)
    opened = 1 / (1 + np.exp(-(x @ gate.reshape(H, 1))))
    np.testing.assert_allclose(make(shared=shared)(x), plain + alone, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(make(shared=shared, shared_gate=gate)(x), plain + opened * alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_the_sum_is_rounded_once(dtype):
    layer, x = make(shared=experts(1, seed=3)), random(6, H, seed=2).astype(dtype)
    y = layer(x)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, layer(x.astype(np.float32)).astype(dtype))


def test_float64_tokens():
    layer, x = make(shared=experts(1, seed=3)), random(6, H, seed=2)
    y = layer(x.astype(np.float64))
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, layer(x), rtol=1e-5, atol=1e-5)


def test_leading_axes_and_no_token():
    layer, x = make(shared=experts(1)), random(6, H, seed=2)
    np.testing.assert_array_equal(layer(x.reshape(2, 3, H)), layer(x).reshape(2, 3, H))
    assert layer(x[:0]).shape == (0, H)
    assert layer(x[:0].reshape(2, 0, H)).shape == (2, 0, H)


def test_the_input_is_left_alone():
    x = random(6, H, seed=2)
    x.flags.writeable = False
    make(shared=experts(1), shared_gate=random(H))(x)


def test_repr_names_the_parts():
    assert all(part in repr(make()) for part in ("Router(top_k=2", "SparseExperts(4 experts", "shared=None"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"router_weight": random(H, E)}, r"router_weight: expected shape \(4, 16\), got \(16, 4\)"),
        ({"router_weight": random(E, H).astype(int)}, "router_weight"),
        ({"router_weight": random(E, H) * np.nan}, "router_weight: expected finite"),
        ({"router": Router(5)}, "number of experts, 4; got 5"),
        ({"router": Router(1, num_groups=3)}, "num_groups"),
        ({"bias": np.zeros(3, np.float32)}, r"bias: expected shape \(4,\)"),
        ({"bias": np.full(4, np.inf)}, "bias: expected finite"),
        ({"shared": experts(2)}, "shared: expected one expert of hidden size 16"),
        ({"shared": experts(1, hidden=H + 4)}, "shared: expected one expert of hidden size 16"),
        ({"shared_gate": random(H)}, "only together with shared"),
        ({"shared": experts(1), "shared_gate": random(H + 1)}, "shared_gate: expected shape"),
        ({"shared": experts(1), "shared_gate": np.full(H, np.nan)}, "shared_gate: expected finite"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, says):
    with pytest.raises(NMSparseError, match=says):
        make(**changes)


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (random(3, H + 1), "x: expected shape"),
        (np.float32(1), "x: expected shape"),
        (np.ones((3, H), int), "int64"),
        (np.full((3, H), np.nan, np.float32), "logits: expected finite"),
    ],
)
def test_bad_tokens_are_refused(x, says):
    with pytest.raises(NMSparseError, match=says):
        make()(x)
