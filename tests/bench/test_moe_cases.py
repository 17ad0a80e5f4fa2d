"""What `bench moe` feeds to the layers: routings, turns, weights; and the peers themselves, on the host."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmsparse import formats, reference
from nmsparse.bench.moe.cases import MODELS, ROUTINGS, Case, Model, cases_of, route, take_turns

torch = pytest.importorskip("torch", reason="the benchmark runs on torch")

SMALL = Model("small", 6, 64, 128, 3)


@pytest.mark.parametrize("routing", ROUTINGS)
@given(experts=st.integers(1, 40), tokens=st.integers(1, 30), seed=st.integers(0, 3), data=st.data())
def test_a_routing_is_a_routing(routing, experts, tokens, seed, data):
    case = Case(Model("m", experts, 8, 8, data.draw(st.integers(1, experts))), tokens, routing)
    ids, weights = route(case, seed)
    assert ids.shape == weights.shape == (tokens, case.model.top_k)
    assert ids.min() >= 0 and ids.max() < experts
    assert all(len(set(row)) == case.model.top_k for row in ids.tolist())
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
    assert (weights >= 0).all()
    np.testing.assert_array_equal(ids, route(case, seed)[0])


@pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.name)
def test_uniform_is_even_and_skewed_is_not(model):
    counts = {
        routing: np.bincount(route(Case(model, 4096, routing))[0].ravel(), minlength=model.experts)
        for routing in ROUTINGS
    }
    even, uneven = (counts[routing] / counts[routing].mean() for routing in ROUTINGS)
    assert even.min() > 0.7 and even.max() < 1.3
    assert uneven.min() < 0.6 and uneven.max() > 2


@given(experts=st.integers(1, 30), tokens=st.integers(1, 8), calls=st.integers(1, 9), data=st.data())
def test_turns_rename_experts_and_use_the_longest_idle(experts, tokens, calls, data):
    case = Case(Model("m", experts, 8, 8, data.draw(st.integers(1, experts))), tokens, "skewed")
    ids = route(case)[0]
    turns = take_turns(ids, experts, calls)
    assert len(turns) == calls and all(turn.dtype == np.int32 for turn in turns)
    last_used = np.full(experts, -1)
    for call, turn in enumerate(turns):
        pairs = {*zip(ids.ravel().tolist(), turn.ravel().tolist(), strict=True)}
        assert len(pairs) == len({old for old, _ in pairs}) == len({new for _, new in pairs})
        used = np.unique(turn)
        idle = np.setdiff1d(np.arange(experts), used)
        assert not len(idle) or last_used[used].max() <= last_used[idle].min() or call == 0
        last_used[used] = call


def test_cases_count_what_the_layers_do():
    mixtral = MODELS["mixtral-8x7b"]
    listed = list(cases_of(mixtral))
    assert len(listed) == 12 and len(set(listed)) == 12
    case = Case(mixtral, 4096, "uniform")
    assert mixtral.parameters * 2 == 8 * 352321536
    assert case.operations == 2 * 4096 * 2 * 3 * 14336 * 4096


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "samoyeds:1:2:32", "samoyeds:2:3:16", "vnm:16:2:8"])
def test_random_weights_obey_their_pattern(pattern):
    from nmsparse.bench.moe.weights import random_weight

    generator = torch.Generator().manual_seed(0)
    w = random_weight((2, 48, 64), pattern, "cpu", torch.float32, generator).numpy()
    packed = formats.from_dense(w, pattern, strict=True)  # raises where a value has no place
    np.testing.assert_array_equal(packed.todense(), w)
    assert np.count_nonzero(w) / w.size == pytest.approx(packed.pattern.density)
    assert len({tuple(row) for row in (w != 0).reshape(-1, 64).tolist()}) > 8, "the choice has to be random"


def layer(dtype):
    """Tokens, ids, routing weights and expert weights of a small layer."""
    from nmsparse.bench.moe.weights import random_weight

    generator = torch.Generator().manual_seed(0)
    ids, weights = map(torch.from_numpy, route(Case(SMALL, 20, "skewed")))
    x = torch.randn(20, SMALL.hidden, dtype=dtype, generator=generator)
    shapes = (6, 2 * SMALL.intermediate, SMALL.hidden), (6, SMALL.hidden, SMALL.intermediate)
    return x, ids, weights, *(random_weight(shape, "dense", "cpu", dtype, generator) for shape in shapes)


def test_exact_is_the_reference():
    from nmsparse.bench.moe.weights import exact, relative_error

    operands = layer(torch.float32)
    want = reference.moe(*(operand.numpy() for operand in operands))
    assert relative_error(exact(*operands), torch.from_numpy(want)) < 1e-7  # weights times h, in another order
    assert relative_error(torch.full((2, 2), torch.nan), torch.ones(2, 2)) == float("inf")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("peer", ["gathered", "added", "eager", "batched_mm", "grouped_mm"])
def test_peers_are_right(peer, dtype):
    from nmsparse.bench.moe import peers
    from nmsparse.bench.moe.weights import exact, relative_error

    x, ids, weights, gate_up, down = layer(getattr(torch, dtype))
    with torch.inference_mode():
        if peer in peers.IMPLEMENTATIONS:
            pytest.importorskip("transformers", reason="its experts are the peer")
            got = peers.transformers_experts(peer, gate_up, down)(x, ids.long(), weights.to(x.dtype))
        else:
            got = peers.grouped_mm(gate_up, down, add=peer == "added")(x, ids, weights)
    assert got.dtype == x.dtype
    assert relative_error(got, exact(x, ids, weights, gate_up, down)) < {"float32": 1e-6, "bfloat16": 1e-2}[dtype]
