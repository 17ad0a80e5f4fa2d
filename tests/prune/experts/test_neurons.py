"""Neurons of experts: HEAPr's score against its definition, widths against brute force, pruning against masking."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmsparse import NMArray, NMSparseError
from nmsparse.prune import refit
from nmsparse.prune.experts import best_neurons, heapr, take_neurons, tile_widths
from nmsparse.reference import ACTIVATIONS, moe

silu = ACTIVATIONS["silu"]

T, H, I = 40, 12, 16  # noqa: E741 (the field's names)


@pytest.fixture
def expert():
    """One expert with tokens, its h, and the gradient of the loss ½ mean ‖y − target‖² at its output."""
    rng = np.random.default_rng(0)
    x, gate, up = rng.standard_normal((T, H)), rng.standard_normal((I, H)), rng.standard_normal((I, H))
    down, target = rng.standard_normal((H, I)), rng.standard_normal((T, H))
    h = silu(x @ gate.T) * (x @ up.T)
    return x, np.concatenate([gate, up]), down, h, h @ down.T - target


def test_heapr_is_the_hessian_form_of_the_paper(expert):
    _, _, down, h, gradient = expert
    hessian = gradient.T @ gradient / T
    explicit = [
        np.mean([(h[t, k] * down[:, k]) @ hessian @ (h[t, k] * down[:, k]) / 2 for t in range(T)]) for k in range(I)
    ]
    at_h = gradient @ down
    np.testing.assert_allclose(heapr((h**2).sum(0), (at_h**2).sum(0), np.array(T)), explicit, rtol=1e-12)


def test_heapr_ranks_neurons_as_their_removal_does():
    """At a minimum of the loss, where the gradients that remain are noise, as the method assumes."""
    rng = np.random.default_rng(1)
    tokens, noise = 4000, 0.5
    x, gate, up = rng.standard_normal((tokens, H)), rng.standard_normal((I, H)), rng.standard_normal((I, H))
    down = rng.standard_normal((H, I)) * rng.uniform(0.1, 2, I)
    h = silu(x @ gate.T) * (x @ up.T)
    target = h @ down.T + noise * rng.standard_normal((tokens, H))

    def loss(y):
        return ((y - target) ** 2).sum(axis=1).mean() / 2

    gradient = (h @ down.T - target) @ down
    score = heapr((h**2).sum(0), (gradient**2).sum(0), np.array(tokens))
    rise = [loss(h @ down.T - np.outer(h[:, k], down[:, k])) - loss(h @ down.T) for k in range(I)]

    def rank(values):
        return np.argsort(np.argsort(values))

    spearman = np.corrcoef(rank(score), rank(rise))[0, 1]
    assert spearman > 0.8
    # The gradient is white noise here, so the score even is the rise, times the variance of that noise.
    np.testing.assert_allclose(score / noise**2, rise, rtol=0.2)


def test_heapr_without_tokens_is_zero():
    score = heapr(np.zeros((2, 3, I)), np.zeros((2, 3, I)), np.zeros((2, 3), int))
    np.testing.assert_array_equal(score, np.zeros((2, 3, I)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_heapr_refuses_what_no_sum_of_squares_is(bad):
    with pytest.raises(NMSparseError, match=r"gradient_squares: expected finite numbers of 0 or more, .* at \(1,\)"):
        heapr(np.ones(3), np.array([1, bad, 1]), np.array(2))


@pytest.mark.parametrize("gated", [True, False])
def test_a_pruned_expert_is_a_masked_expert(expert, gated):
    x, gate_up, down, *_ = expert
    gate_up = gate_up if gated else gate_up[:I]
    kept = best_neurons(np.random.default_rng(3).random(I), 10)
    small_gate_up, small_down = take_neurons((gate_up, down), kept)
    assert small_gate_up.shape == ((20 if gated else 10), H)

    mask = np.isin(np.arange(I), kept)
    one = np.zeros((T, 1), int), np.ones((T, 1))
    masked = moe(x, *one, gate_up[None], (down * mask)[None])
    np.testing.assert_allclose(moe(x, *one, small_gate_up[None], small_down[None]), masked, atol=1e-13)


def test_refit_makes_up_for_pruned_neurons(expert):
    """The composition with the solver that the docstring names, against least squares on the neurons that are left."""
    _, gate_up, down, h, _ = expert
    kept = best_neurons(np.random.default_rng(3).random(I), 10)
    mask = np.broadcast_to(np.isin(np.arange(I), kept), down.shape)
    _, fitted = take_neurons((gate_up, refit(down, h.T @ h / T, mask)), kept)
    exact = np.linalg.lstsq(h[:, kept], h @ down.T, rcond=None)[0].T
    np.testing.assert_allclose(fitted, exact, rtol=1e-6, atol=1e-8)


def test_a_neuron_that_never_fires_is_free(expert):
    x, gate_up, down, *_ = expert
    gate_up = gate_up.copy()
    gate_up[I + 5] = 0  # its up projection
    rest = np.delete(np.arange(I), 5)
    one = np.zeros((T, 1), int), np.ones((T, 1))
    small = take_neurons((gate_up, down), rest)
    np.testing.assert_allclose(
        moe(x, *one, small.gate_up[None], small.down[None]), moe(x, *one, gate_up[None], down[None]), atol=1e-13
    )


def test_each_stacked_expert_has_its_own_neurons():
    rng = np.random.default_rng(4)
    gate_up, down = rng.standard_normal((3, 2 * I, H)), rng.standard_normal((3, H, I))
    order = np.stack([rng.permutation(I) for _ in range(3)])[:, :7]
    together = take_neurons((gate_up, down), order)
    for e in range(3):
        alone = take_neurons((gate_up[e], down[e]), order[e])
        np.testing.assert_array_equal(together.gate_up[e], alone.gate_up)
        np.testing.assert_array_equal(together.down[e], alone.down)


def test_pruned_to_a_pattern_is_too_late():
    gate_up, down = np.ones((8, 16)), NMArray.random((16, 4), rng=0)
    with pytest.raises(NMSparseError, match=r"down: expected a dense weight, .* prune to a pattern last"):
        take_neurons((gate_up, down), np.arange(2))


@pytest.mark.parametrize(
    ("neurons", "message"),
    [
        ([0, I], r"in 0\.\.15, got 0\.\.16"),
        ([-1], r"in 0\.\.15, got -1\.\.-1"),
        ([0.5], r"expected integers of shape \(n,\)"),
        ([[0, 1]], r"expected integers of shape \(n,\)"),
    ],
)
def test_neurons_that_do_not_exist(expert, neurons, message):
    with pytest.raises(NMSparseError, match=message):
        take_neurons(expert[1:3], np.array(neurons))


def test_weights_that_do_not_fit():
    with pytest.raises(NMSparseError, match=r"expected gate_up .* got \(5, 4\) and \(4, 3\)"):
        take_neurons((np.zeros((5, 4)), np.zeros((4, 3))), np.arange(1))


@st.composite
def rankings(draw):
    units, tile, tiles = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    values = st.integers(0, 6) | st.floats(0, 10, allow_subnormal=False)
    scores = draw(st.lists(values, min_size=units * tile * tiles, max_size=units * tile * tiles))
    minimum = tile * draw(st.integers(0, 1))
    keep = draw(st.integers(units * minimum, units * tile * tiles + 2))
    return np.array(scores, float).reshape(units, -1), keep, tile, minimum


def kept_score(scores, widths):
    return sum(np.sort(row)[::-1][:width].sum() for row, width in zip(scores, widths, strict=True))


@given(rankings())
def test_widths_are_the_best_there_are(case):
    scores, keep, tile, minimum = case
    units, neurons = scores.shape
    widths = tile_widths(scores, keep, tile=tile, minimum=minimum)
    assert widths.sum() <= keep
    assert widths.sum() == min(keep // tile * tile, scores.size)
    assert (widths % tile == 0).all() and (widths >= minimum).all()
    options = itertools.product(range(minimum, neurons + 1, tile), repeat=units)
    best = max(kept_score(scores, option) for option in options if sum(option) <= keep)
    assert kept_score(scores, widths) == pytest.approx(best, rel=1e-12)


def test_protected_experts_keep_their_width():
    scores = np.array([[0.0, 0.0], [9.0, 8.0], [7.0, 6.0]])
    assert tile_widths(scores, 4, protected=[True, False, False]).tolist() == [2, 2, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 4, "tile": 3}, "expected a divisor of the 4 neurons"),
        ({"keep": 4, "tile": 2, "minimum": 1}, "expected a divisor"),
        ({"keep": 3, "minimum": 2}, "expected at least the 4 neurons that minimum and protected experts need, got 3"),
    ],
)
def test_widths_that_cannot_be(settings, message):
    with pytest.raises(NMSparseError, match=message):
        tile_widths(np.ones((2, 4)), **settings)
