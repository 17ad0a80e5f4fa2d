"""Allocation under a budget against brute force, and bytes against what the formats really take."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmsparse import NMSparseError, SparseExperts
from nmsparse.prune.experts import allocate, expert_bytes, output_loss

CHOICES = ["dense", "2:4", "vnm:16:2:8", "samoyeds:1:2:16", "drop"]


def brute_force(losses, costs, budget):
    """The least loss of all choices within the budget, or None."""
    units, choices = losses.shape
    totals = (
        sum(losses[u, c] for u, c in enumerate(choice))
        for choice in itertools.product(range(choices), repeat=units)
        if sum(costs[u, c] for u, c in enumerate(choice)) <= budget
    )
    return min((total for total in totals if np.isfinite(total)), default=None)


@st.composite
def programs(draw):
    units, choices = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    size = {"min_size": units * choices, "max_size": units * choices}
    loss = st.integers(-3, 20).map(float) | st.just(np.inf)
    losses = np.array(draw(st.lists(loss, **size))).reshape(units, choices)
    costs = np.array(draw(st.lists(st.integers(0, 9) | st.floats(0, 9, width=16), **size)), float).reshape(
        units, choices
    )
    return losses, costs, draw(st.integers(0, 9 * units))


@given(programs())
def test_it_is_the_optimum(program):
    losses, costs, budget = program
    best = brute_force(losses, costs, budget)
    if best is None:
        with pytest.raises(NMSparseError, match=r"budget: expected at least|expected a choice that is not forbidden"):
            allocate(losses, costs, budget)
        return
    choice = allocate(losses, costs, budget)
    units = np.arange(len(losses))
    assert costs[units, choice].sum() <= budget * (1 + 1e-9)
    assert losses[units, choice].sum() == pytest.approx(best)


def test_more_budget_never_loses_more():
    rng = np.random.default_rng(0)
    losses = np.sort(rng.lognormal(0, 1.5, (24, 1)) * rng.random((24, 5)), axis=1)
    costs, units = np.array([16, 9, 4.6, 4.5, 0]), np.arange(24)
    totals = [losses[units, allocate(losses, costs, budget)].sum() for budget in range(0, 24 * 17, 24)]
    assert (np.diff(totals) <= 1e-12).all() and totals[-1] == pytest.approx(losses[:, 0].sum())


def test_bytes_of_a_real_model_never_exceed_the_budget():
    """A budget of a gigabyte that a solver's tolerance could overrun by a kilobyte."""
    rng = np.random.default_rng(1)
    costs = np.array([expert_bytes(choice, 2048, 768, np.float16) for choice in CHOICES])
    losses = rng.lognormal(0, 1.5, (256, 1)) * np.array([0, 0.1, 0.5, 0.5, 2])
    budget = 256 * costs[3] + 12345
    assert costs[allocate(losses, costs, budget)].sum() <= budget


def test_the_tolerance_of_the_solver_is_not_ours():
    """HiGHS accepts a constraint that is overrun by a millionth."""
    assert allocate(np.array([[0.0, 1.0]]), np.array([[1.0000004, 0.5]]), 1.0).tolist() == [1]


def test_what_all_choices_of_a_unit_lose_does_not_matter():
    losses, costs = np.random.default_rng(3).random((8, 3)), np.array([4, 2, 1])
    far = losses + 10.0 ** np.arange(8)[:, None]  # offsets that would drown the differences in the solver's tolerance
    np.testing.assert_array_equal(allocate(far, costs, 17), allocate(losses, costs, 17))


def test_the_guard_stays_dense():
    losses = np.tile([0.0, 1.0, 1.1], (6, 1))
    guard = np.array([0, 0, 1, 0, 1, 0], bool)
    losses[guard, 1:] = np.inf
    choice = allocate(losses, np.array([16, 9, 4]), 16 * 2 + 4 * 4)
    assert (choice[guard] == 0).all() and (choice[~guard] == 2).all()


def test_an_infeasible_budget_says_what_it_takes():
    with pytest.raises(NMSparseError, match="budget: expected at least 18, the cheapest choice of every unit; got 17"):
        allocate(np.zeros((2, 2)), np.array([16, 9]), 17)
    with pytest.raises(NMSparseError, match="unit 1: expected a choice that is not forbidden"):
        allocate(np.array([[0.0], [np.inf]]), np.array([1]), 17)
    with pytest.raises(NMSparseError, match="losses: expected numbers"):
        allocate(np.array([[np.nan]]), np.array([1]), 17)
    with pytest.raises(NMSparseError, match="costs: expected numbers of 0 or more"):
        allocate(np.zeros((1, 2)), np.array([1, -1]), 17)


def test_at_the_least_budget_the_cheapest_are_taken():
    losses, costs = np.array([[5.0, 1.0, 2.0], [3.0, 9.0, 4.0]]), np.array([[0.1, 0.7, 0.1], [0.3, 0.2, 0.2]])
    assert allocate(losses, costs, 0.1 + 0.2).tolist() == [2, 2]
    assert allocate(losses, np.zeros((2, 3)), 0).tolist() == [1, 0]


@pytest.mark.parametrize("choice", CHOICES[:-1])
@pytest.mark.parametrize(("hidden", "width", "gated"), [(32, 48, True), (40, 20, True), (36, 64, False)])
def test_bytes_are_those_of_the_formats(choice, hidden, width, gated):
    gate_up, down = (
        np.ones((1, (2 if gated else 1) * width, hidden), np.float16),
        np.ones((1, hidden, width), np.float16),
    )
    experts = SparseExperts(gate_up, down) if choice == "dense" else SparseExperts.from_dense(gate_up, down, choice)
    assert expert_bytes(choice, hidden, width, np.float16, gated=gated) == experts.nbytes


def test_output_loss_by_its_definition():
    rng = np.random.default_rng(2)
    gradient, y, pruned = rng.standard_normal((3, 7, 5))
    expected = sum((gradient[t, i] * (y[t, i] - pruned[t, i])) ** 2 for t in range(7) for i in range(5))
    assert output_loss(gradient, y, pruned) == pytest.approx(expected)
