"""route and Router against a slow double-precision router, and the properties that every router has."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmsparse.errors import NMSparseError
from nmsparse.moe import Router, route


def slow_route(logits, router, bias):
    """One token at a time in Python floats, by sorting."""
    ids, weights = [], []
    for row in logits.tolist():
        if router.scoring == "softmax":
            total = math.fsum(math.exp(z - max(row)) for z in row)
            scores = [math.exp(z - max(row)) / total for z in row]
        else:
            scores = [1 / (1 + math.exp(-z)) for z in row]
        choice = [s + b for s, b in zip(scores, bias.tolist(), strict=True)]
        size = len(row) // router.num_groups
        groups = [sorted(choice[g * size : (g + 1) * size], reverse=True) for g in range(router.num_groups)]
        worth = [g[0] if router.group_score == "max" else sum(g[:2]) for g in groups]
        kept = sorted(range(router.num_groups), key=lambda g: -worth[g])[: router.topk_groups]
        eligible = [e for e in range(len(row)) if e // size in kept]
        chosen = sorted(eligible, key=lambda e: -choice[e])[: router.top_k]
        chosen = sorted(sorted(chosen), key=lambda e: -scores[e])
        total = sum(scores[e] for e in chosen) if router.renormalize else 1.0
        ids.append(chosen)
        weights.append([scores[e] / total * router.scale for e in chosen])
    return np.array(ids).reshape(-1, router.top_k), np.array(weights).reshape(-1, router.top_k)


@st.composite
def routers(draw, **fixed):
    """A router and the number of experts that it can route among."""
    groups = draw(st.integers(1, 5))
    size = draw(st.integers(2, 6))
    kept = draw(st.integers(1, groups))
    settings = {
        "top_k": draw(st.integers(1, kept * size)),
        "scoring": draw(st.sampled_from(["softmax", "sigmoid"])),
        "renormalize": draw(st.booleans()),
        "num_groups": groups,
        "topk_groups": kept,
        "group_score": draw(st.sampled_from(["max", "top2"])),
        "scale": draw(st.sampled_from([1.0, 2.5, 16.0])),
    }
    return Router(**{**settings, **fixed}), groups * size


def random_logits(seed, num_experts, tokens=5, spread=2.0):
    return np.random.default_rng(seed).normal(0, spread, (tokens, num_experts)).astype(np.float32)


def grid_logits(draw, num_experts):
    """Multiples of 1/4, so that ties are common and adding a multiple of 1/4 is exact."""
    quarters = st.lists(st.integers(-32, 32), min_size=num_experts, max_size=num_experts)
    return np.array(draw(st.lists(quarters, max_size=4)), np.float32).reshape(-1, num_experts) / 4


ROW = np.zeros((2, 8), np.float32)
seeds = st.integers(0, 2**32 - 1)


@given(routers(), seeds, st.booleans())
def test_agrees_with_the_slow_router(case, seed, biased):
    router, num_experts = case
    logits = random_logits(seed, num_experts)
    bias = random_logits(seed + 1, num_experts, tokens=1, spread=0.5)[0] if biased else np.zeros(num_experts)
    ids, weights = router(logits, bias if biased else None)
    want_ids, want_weights = slow_route(logits, router, bias)
    assert (ids.dtype, weights.dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_allclose(weights, want_weights, rtol=2e-6)


@given(st.data(), st.integers(1, 6), st.sampled_from(["softmax", "sigmoid"]))
def test_ties_go_to_the_lower_expert(data, num_experts, scoring):
    router = Router(data.draw(st.integers(1, num_experts)), scoring)
    logits = grid_logits(data.draw, num_experts)
    ids, weights = router(logits)
    want_ids, want_weights = slow_route(logits, router, np.zeros(num_experts))
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_allclose(weights, want_weights, rtol=2e-6)


def test_equal_logits_choose_the_first_experts_of_the_first_groups():
    ids, weights = route(np.zeros((2, 8), np.float32), 3, num_groups=4, topk_groups=2, group_score="top2")
    np.testing.assert_array_equal(ids, [[0, 1, 2]] * 2)
    np.testing.assert_array_equal(weights, np.full((2, 3), 0.125, np.float32))


@given(routers(), seeds)
def test_weights_descend_and_experts_are_distinct(case, seed):
    router, num_experts = case
    bias = random_logits(seed + 1, num_experts, tokens=1, spread=0.5)[0]
    ids, weights = router(random_logits(seed, num_experts), bias)
    assert np.all(weights[:, 1:] <= weights[:, :-1])
    assert all(len(set(row)) == router.top_k for row in ids.tolist())
    assert set(ids.ravel()) <= set(range(num_experts))


@given(routers(renormalize=True), seeds)
def test_renormalised_weights_sum_to_the_scale(case, seed):
    router, num_experts = case
    _, weights = router(random_logits(seed, num_experts))
    np.testing.assert_allclose(weights.sum(axis=1), router.scale, rtol=1e-6)


@given(st.data(), st.integers(1, 12), st.integers(-400, 400))
def test_softmax_ignores_a_constant_added_to_the_logits(data, num_experts, quarters):
    top_k = data.draw(st.integers(1, num_experts))
    logits = grid_logits(data.draw, num_experts)
    for got, want in zip(route(logits + np.float32(quarters / 4), top_k), route(logits, top_k), strict=True):
        np.testing.assert_array_equal(got, want)


@given(routers(num_groups=1, topk_groups=1), seeds, st.booleans())
def test_permuting_the_experts_permutes_the_ids(case, seed, biased):
    router, _ = case
    num_experts = router.top_k + seed % 7
    logits, order = random_logits(seed, num_experts), np.random.default_rng(seed).permutation(num_experts)
    bias = random_logits(seed + 1, num_experts, tokens=1)[0] if biased else None
    ids, weights = router(logits, bias)
    permuted_ids, permuted_weights = router(logits[:, order], bias if bias is None else bias[order])
    np.testing.assert_array_equal(order[permuted_ids], ids)
    np.testing.assert_allclose(permuted_weights, weights, rtol=1e-6)  # the softmax sums in another order


@given(routers(), seeds, st.floats(-9, 9))
def test_at_most_topk_groups_are_used(case, seed, offset):
    router, num_experts = case
    bias = random_logits(seed + 1, num_experts, tokens=1)[0] + np.float32(offset)  # also where every choice is negative
    ids, _ = router(random_logits(seed, num_experts), bias)
    size = num_experts // router.num_groups
    assert all(len(set(row)) <= router.topk_groups for row in (ids // size).tolist())


@given(routers(group_score="max"), seeds)
def test_the_best_expert_is_always_chosen_when_groups_are_worth_their_best(case, seed):
    router, num_experts = case
    logits = random_logits(seed, num_experts)
    np.testing.assert_array_equal(router(logits)[0][:, 0], logits.argmax(axis=1))


@given(routers(), seeds)
def test_tokens_are_routed_one_by_one(case, seed):
    router, num_experts = case
    logits = random_logits(seed, num_experts, tokens=4)
    ids, weights = router(logits)
    for t in range(4):
        alone = router(logits[t : t + 1])
        np.testing.assert_array_equal(alone[0][0], ids[t])
        np.testing.assert_array_equal(alone[1][0], weights[t])


@given(seeds, st.sampled_from([np.float16, ml_dtypes.bfloat16, np.float64]))
def test_other_float_dtypes_are_computed_in_float32(seed, dtype):
    logits = random_logits(seed, 8).astype(dtype)
    for got, want in zip(route(logits, 3), route(logits.astype(np.float32), 3), strict=True):
        np.testing.assert_array_equal(got, want)


@given(routers(), seeds)
def test_a_router_does_not_touch_its_input(case, seed):
    router, num_experts = case
    logits, bias = random_logits(seed, num_experts), random_logits(seed, num_experts, tokens=1)[0]
    logits.flags.writeable = bias.flags.writeable = False
    router(logits, bias)


def test_equal_weights_are_in_expert_order_whatever_the_bias():
    ids, _ = route(np.zeros((1, 4), np.float32), 3, bias=np.array([0.0, 1.0, 2.0, 3.0]))
    np.testing.assert_array_equal(ids, [[1, 2, 3]])


def test_a_bias_chooses_and_does_not_weigh():
    ids, weights = route(np.array([[0.0, 1.0, 2.0]], np.float32), 2, scoring="sigmoid", bias=np.array([9.0, 0.0, 0.0]))
    np.testing.assert_array_equal(ids, [[2, 0]])  # expert 0 by its bias; expert 2 weighs more
    np.testing.assert_allclose(weights, [[1 / (1 + math.exp(-2)), 0.5]], rtol=1e-6)


def test_no_token():
    ids, weights = route(np.empty((0, 4), np.float32), 2, num_groups=2, bias=np.zeros(4))
    assert (ids.shape, ids.dtype, weights.shape, weights.dtype) == ((0, 2), np.int32, (0, 2), np.float32)


def test_the_largest_logits_overflow_nowhere():
    huge = np.array([[3e38, -3e38, 0.0]], np.float32)
    np.testing.assert_array_equal(route(huge, 3, renormalize=True)[1], [[1, 0, 0]])
    np.testing.assert_array_equal(route(huge, 3, scoring="sigmoid")[1], [[1, 0.5, 0]])


def test_the_lowest_bias_rules_experts_out():
    bias = np.full(8, np.finfo(np.float32).min)
    bias[6:] = 0
    ids, _ = route(ROW, 3, bias=bias, num_groups=4, topk_groups=2, group_score="top2")
    np.testing.assert_array_equal(np.sort(ids), [[0, 6, 7]] * 2)


def test_weights_that_all_underflow_renormalise_to_zero_not_nan():
    _, weights = route(np.full((1, 4), -200, np.float32), 2, scoring="sigmoid", renormalize=True)
    np.testing.assert_array_equal(weights, 0)


@pytest.mark.parametrize(
    ("logits", "top_k", "settings", "says"),
    [
        (np.array([[0.0, np.nan]]), 1, {}, r"1 NaN or inf, the first at \(0, 1\)"),
        (np.array([[0.0, 1.0], [np.inf, 0.0]]), 1, {}, r"the first at \(1, 0\)"),
        (np.array([[0.0, -np.inf]], np.float16), 1, {}, "finite"),
        (np.array([[0.0, 1e300]]), 1, {}, "finite float32"),
        (np.zeros(8, np.float32), 1, {}, r"shape \(tokens, experts\), got \(8,\)"),
        (np.zeros((1, 2, 4), np.float32), 1, {}, r"got \(1, 2, 4\)"),
        (np.zeros((2, 8), np.int64), 1, {}, "got int64"),
        (np.zeros((2, 8), complex), 1, {}, "got complex128"),
        (np.zeros((2, 8), object), 1, {}, "got object"),
        (np.zeros((2, 8), bool), 1, {}, "got bool"),
        (np.zeros((2, 0), np.float32), 1, {}, "number of experts, 0"),
        (ROW, 0, {}, "top_k: expected an integer of 1 or more, got 0"),
        (ROW, -1, {}, "top_k"),
        (ROW, 1.5, {}, "top_k"),
        (ROW, True, {}, "top_k"),
        (ROW, "2", {}, "top_k"),
        (ROW, None, {}, "top_k"),
        (ROW, 9, {}, "number of experts, 8; got 9"),
        (ROW, 1, {"scoring": "relu"}, "softmax, sigmoid; got 'relu'"),
        (ROW, 1, {"group_score": "mean"}, "max, top2; got 'mean'"),
        (ROW, 1, {"num_groups": 3}, "divisor of the number of experts, 8; got 3"),
        (ROW, 1, {"num_groups": 0}, "num_groups"),
        (ROW, 1, {"num_groups": 2, "topk_groups": 3}, "at most num_groups = 2, got 3"),
        (ROW, 1, {"num_groups": 2, "topk_groups": 0}, "topk_groups"),
        (ROW, 5, {"num_groups": 4, "topk_groups": 2}, "4 experts of the kept groups"),
        (ROW, 1, {"num_groups": 8, "group_score": "top2"}, "groups of two experts or more"),
        (ROW, 1, {"bias": np.zeros(7)}, r"shape \(8,\), got \(7,\)"),
        (ROW, 1, {"bias": np.zeros((1, 8))}, "bias"),
        (ROW, 1, {"bias": np.zeros(8, np.int32)}, "bias: expected float16"),
        (ROW, 1, {"bias": np.full(8, np.nan)}, "bias: expected finite"),
        (ROW, 1, {"bias": np.full(8, -np.inf)}, "bias: expected finite"),
        (ROW, 1, {"bias": np.full(8, 1e39)}, "bias: expected finite"),
        (ROW, 1, {"scale": 0.0}, "scale"),
        (ROW, 1, {"scale": -1.0}, "scale"),
        (ROW, 1, {"scale": math.nan}, "scale"),
        (ROW, 1, {"scale": math.inf}, "scale"),
        (ROW, 1, {"scale": 1e39}, "scale"),
        (ROW, 1, {"scale": "big"}, "scale"),
    ],
)
def test_bad_input_is_refused(logits, top_k, settings, says):
    with pytest.raises(NMSparseError, match=says):
        route(logits, top_k, **settings)
