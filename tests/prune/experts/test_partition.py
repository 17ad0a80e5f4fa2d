"""Sub-experts: exact for every router, the traps of repeating router rows, and legal places to cut."""

from __future__ import annotations

import numpy as np
import pytest

from nmsparse import NMSparseError, array
from nmsparse.moe import MoELayer, Router, SparseExperts
from nmsparse.prune.experts import (
    complete,
    interleave,
    neuron_importance,
    neuron_multiple,
    partition,
    reconstruct,
    sub_routing,
)

T, E, H, I = 50, 8, 32, 48  # noqa: E741 (the field's names)
ROUTERS = {
    "softmax": Router(2),
    "softmax, renormalised": Router(2, renormalize=True),
    "softmax, best groups (DeepSeek-V2)": Router(2, num_groups=4, topk_groups=2, scale=16.0),
    "sigmoid": Router(2, "sigmoid"),
    "sigmoid, renormalised, two best of groups, bias (DeepSeek-V3)": Router(
        2, "sigmoid", True, num_groups=4, topk_groups=2, group_score="top2", scale=2.5
    ),
}


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.fixture
def x():
    return random(T, H, seed=1)


@pytest.fixture
def weights():
    return random(E, 2 * I, H, seed=2) / H**0.5, random(E, H, I, seed=3) / I**0.5


def rows():
    return random(E, H, seed=4)


def error(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("gated", [True, False])
def test_the_partial_transformation_is_exact_for_every_router(x, weights, name, parts, gated):
    gate_up, down = weights if gated else (weights[0][:, :I], weights[1])
    bias = random(E, seed=5) / 10 if "bias" in name else None
    layer = MoELayer(rows(), SparseExperts(gate_up, down), ROUTERS[name], bias=bias)
    split = interleave(partition((gate_up, down), [I * p // parts for p in range(1, parts)]))
    y = SparseExperts(*split)(x, *sub_routing(*layer.route(x), parts))
    assert error(y, layer(x)) < 1e-6


@pytest.mark.parametrize("name", ["softmax", "softmax, renormalised", "softmax, best groups (DeepSeek-V2)", "sigmoid"])
@pytest.mark.parametrize("parts", [2, 4])
def test_the_complete_transformation_is_exact_and_the_factor_is_needed(x, weights, name, parts):
    router = ROUTERS[name]
    y = MoELayer(rows(), SparseExperts(*weights), router)(x)
    new = complete(rows(), weights, router, parts)
    assert new.router.top_k == 2 * parts
    assert error(MoELayer(new.router_weight, SparseExperts(*new.experts), new.router)(x), y) < 1e-6

    other = 1 / parts if name != "sigmoid" else parts  # the factor forgotten, or wrongly applied
    wrong = SparseExperts(new.experts.gate_up, new.experts.down * np.float32(other))
    assert error(MoELayer(new.router_weight, wrong, new.router)(x), y) > 0.4


def test_the_complete_transformation_with_a_bias(x, weights):
    router, bias = Router(2, "sigmoid", True, scale=2.5), random(E, seed=5) / 10
    y = MoELayer(rows(), SparseExperts(*weights), router, bias=bias)(x)
    new = complete(rows(), weights, router, 2, bias=bias)
    assert error(MoELayer(new.router_weight, SparseExperts(*new.experts), new.router, bias=new.bias)(x), y) < 1e-6


@pytest.mark.parametrize(
    ("router", "bias", "message"),
    [
        (Router(2, "sigmoid", True, 4, 2, "top2"), None, "ranks groups by their two best experts"),
        (Router(2), np.zeros(E), "adds a bias to softmax scores"),
    ],
)
def test_routers_that_repeated_rows_would_change(weights, router, bias, message):
    with pytest.raises(NMSparseError, match=f"{message}; leave the router as it is"):
        complete(rows(), weights, router, 2, bias=bias)


def test_why_the_two_best_of_a_group_are_refused(x):
    """Repeated, a group of one strong and one weak expert beats a group of two good ones."""
    logits = np.array([[3.0, -9.0, 2.0, 2.0]], np.float32)
    router = Router(2, "sigmoid", num_groups=2, topk_groups=1, group_score="top2")
    assert set(router(logits)[0][0]) == {2, 3}
    twice = Router(4, "sigmoid", num_groups=2, topk_groups=1, group_score="top2")
    assert set(twice(np.repeat(logits, 2, axis=1))[0][0] // 2) == {0, 1}


def test_experts_that_tie_stay_whole(weights):
    """Two experts with one router row tie for the last place: all parts of the lower one are taken."""
    logits = np.zeros((T, E), np.float32)
    logits[:, 6] = 1
    whole, _ = Router(2)(logits)
    parts, _ = Router(4)(np.repeat(logits, 2, axis=1))
    np.testing.assert_array_equal(np.sort(parts), np.sort(sub_routing(whole, whole, 2)[0]))


@pytest.mark.parametrize("cuts", [[24], [8, 20], [1, 2, 47]])
def test_uneven_parts_sum_to_the_whole(x, weights, cuts):
    routing = MoELayer(rows(), SparseExperts(*weights), Router(2)).route(x)
    y = sum(SparseExperts(*part)(x, *routing) for part in partition(weights, cuts))
    assert error(y, SparseExperts(*weights)(x, *routing)) < 1e-6
    if len(set(np.diff([0, *cuts, I]))) > 1:
        with pytest.raises(NMSparseError, match=r"expected parts .* of one width"):
            interleave(partition(weights, cuts))


@pytest.mark.parametrize("cuts", [[0], [48], [30, 20], [24, 24], [-8]])
def test_cuts_that_are_none(weights, cuts):
    with pytest.raises(NMSparseError, match=r"cuts: expected ascending multiples of 1 in 1\.\.47 of a width of 48"):
        partition(weights, cuts)


@pytest.mark.parametrize("pattern", ["2:4", "vnm:12:2:8", "samoyeds:1:2:8", "samoyeds:1:3:4", "samoyeds:2:4:12"])
def test_legal_cuts_keep_the_pattern(weights, pattern):
    """Pruned whole and then cut at a legal place, both parts are what they are when cut first; elsewhere not."""
    multiple = neuron_multiple(pattern)
    assert I % (2 * multiple) == 0

    def prune(parts):
        return [(array(g, pattern).todense(), array(d, pattern).todense()) for g, d in parts]

    ((whole),) = prune([weights])
    for cut, legal in ((multiple, True), (I // 2, True), (multiple // 2 + 1, False)):
        cut_first, cut_last = prune(partition(weights, [cut])), partition(whole, [cut])
        same = all(
            np.array_equal(a, b) for p, q in zip(cut_first, cut_last, strict=True) for a, b in zip(p, q, strict=True)
        )
        assert same == legal
    with pytest.raises(NMSparseError, match=f"expected ascending multiples of {multiple}"):
        partition(weights, [multiple // 2 + 1], multiple=multiple)


# --- reconstruction ----------------------------------------------------------------------------------------------


def test_importance_by_its_definition(x, weights):
    gate_up, _ = weights
    gate = x @ gate_up[0, :I].T
    gate = gate / (1 + np.exp(-gate))
    h = gate * (x @ gate_up[0, I:].T)
    for k in (0, 7):
        expected = {
            "gate": sum(gate[t, k] for t in range(T)),
            "abs_gate": sum(abs(gate[t, k]) for t in range(T)),
            "h": sum(h[t, k] for t in range(T)),
            "abs_h": sum(abs(h[t, k]) for t in range(T)),
        }
        for kind, value in expected.items():
            assert neuron_importance(gate, h, kind)[k] == pytest.approx(value, rel=1e-5)
    with pytest.raises(NMSparseError, match="kind: expected one of gate, abs_gate, h, abs_h; got 'l2'"):
        neuron_importance(gate, h, "l2")


def test_reconstruction_changes_the_order_and_nothing_else(x, weights):
    importance = np.random.default_rng(6).random((E, I))
    ordered, order = reconstruct(weights, importance)
    sorted_importance = np.take_along_axis(importance, order, axis=1)
    assert (np.diff(sorted_importance, axis=1) <= 0).all()
    routing = MoELayer(rows(), SparseExperts(*weights), Router(2)).route(x)
    assert error(SparseExperts(*ordered)(x, *routing), SparseExperts(*weights)(x, *routing)) < 1e-6


@pytest.mark.parametrize("pattern", ["2:4", "samoyeds:1:2:16"])
def test_reordering_after_pruning_is_refused_because_it_breaks_the_pattern(weights, pattern):
    importance = np.random.default_rng(6).random((E, I))
    sparse = array(weights[0], pattern), array(weights[1], pattern)
    with pytest.raises(NMSparseError, match="gate_up: expected a dense weight"):
        reconstruct(sparse, importance)
    shuffled, _ = reconstruct((sparse[0].todense(), sparse[1].todense()), importance)
    with pytest.raises(NMSparseError, match="does not fit the pattern"):
        array(shuffled.down, pattern, strict=True)


def test_importance_of_another_shape(weights):
    with pytest.raises(NMSparseError, match=r"importance: expected numbers \(no NaN\) of shape \(8, 48\), got \(48,\)"):
        reconstruct(weights, np.ones(I))
