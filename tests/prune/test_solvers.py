"""Scores and solvers against brute force on small cases."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmsparse import NMSparseError, prune
from nmsparse.formats import parse
from nmsparse.prune.hessian import damped, quadratic_loss, recentred, shrunk
from nmsparse.prune.sparsegpt import choose, joint_costs, removal_costs

PATTERNS = ("2:4", "4:8", "1:3", "vnm:4:2:8", "vnm:3:2:6", "samoyeds:1:2:8", "samoyeds:2:4:4")
CALIBRATED = sorted(set(prune.METHODS) - {"magnitude"})


def problem(rows=12, columns=24, seed=0):
    """A weight, and the inputs (T, K) of it: columns that depend on each other."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((200, columns)) @ rng.standard_normal((columns, columns))
    return rng.standard_normal((rows, columns)), x


def least_squares(w, x, mask):
    """The best values for a mask, by numpy's lstsq on the inputs themselves, row by row."""
    out = np.zeros_like(w)
    for i, kept in enumerate(mask):
        out[i, kept] = np.linalg.lstsq(x[:, kept], x @ w[i], rcond=None)[0]
    return out


@given(st.integers(0, 1000))
def test_scores_are_their_definitions(seed):
    rng = np.random.default_rng(seed)
    w, x = rng.standard_normal((4, 6)), rng.standard_normal((20, 6))
    norms = np.linalg.norm(x, axis=0)
    for i, j in np.ndindex(w.shape):
        alone = np.linalg.norm(np.outer(x[:, j], w[i, j]))  # what the output loses without this weight
        assert prune.wanda(w, norms)[i, j] == pytest.approx(alone)
        relative = abs(w[i, j]) / abs(w[i]).sum() + abs(w[i, j]) / abs(w[:, j]).sum()
        assert prune.ria(w, norms)[i, j] == pytest.approx(relative * norms[j] ** 0.5)


@given(st.integers(0, 1000), st.data())
@settings(max_examples=20)
def test_refit_is_least_squares(seed, data):
    w, x = problem(5, 8, seed)
    mask = np.random.default_rng(seed).random(w.shape) < data.draw(st.floats(0, 1))
    np.testing.assert_allclose(prune.refit(w, x.T @ x, mask), least_squares(w, x, mask), atol=1e-6)


def test_removal_costs_are_what_the_best_compensation_loses():
    w, x = problem(3, 6)
    hessian = x.T @ x
    sets = np.array(list(combinations(range(6), 2)))
    costs = removal_costs(w, np.linalg.inv(hessian), sets)
    for s, dropped in enumerate(sets):
        mask = np.ones(w.shape, bool)
        mask[:, dropped] = False
        expected = quadratic_loss(w, least_squares(w, x, mask), hessian)
        np.testing.assert_allclose(costs[:, s], expected, rtol=1e-6)
        np.testing.assert_allclose(joint_costs(w, np.linalg.inv(hessian), ~mask), expected, rtol=1e-6)


def cost(w, inverse, mask, weights):
    return float(weights @ joint_costs(w, inverse, ~mask))


def test_pairs_columns_and_sub_rows_are_the_cheapest():
    """Each pattern's choice in one block of columns, against every alternative."""
    w, x = problem(4, 8)
    inverse, weights = np.linalg.inv(x.T @ x), np.array([1.0, 3.0, 0.5, 2.0])

    pair = choose(w[:, :4], inverse[:4, :4], parse("2:4"), weights)
    for i in range(4):
        alone = [
            cost(w[i : i + 1, :4], inverse[:4, :4], np.isin(np.arange(4), keep)[None], np.ones(1))
            for keep in combinations(range(4), 2)
        ]
        assert cost(w[i : i + 1, :4], inverse[:4, :4], pair[i : i + 1], np.ones(1)) == pytest.approx(min(alone))

    kept = choose(w, inverse, parse("vnm:4:2:8"), weights)
    columns = np.flatnonzero(kept.any(axis=0))
    assert len(columns) <= 4 and (kept.sum(axis=1) == 2).all()
    blocks = {
        keep: cost(w, inverse, np.tile(np.isin(np.arange(8), keep), (4, 1)), weights)
        for keep in combinations(range(8), 4)
    }
    best = min(blocks, key=blocks.get)
    assert set(columns) <= set(best)

    kept = choose(w, inverse, parse("samoyeds:1:2:8"), weights)
    pairs = np.hstack([choose(w[:, s], inverse[s, s], parse("2:4"), weights) for s in (slice(0, 4), slice(4, 8))])
    for top in (0, 2):
        rows, options = slice(top, top + 2), []
        for stays in (0, 1):
            mask = pairs[rows].copy()
            mask[1 - stays] = False
            options.append((cost(w[rows], inverse, mask, weights[rows]), mask))
        np.testing.assert_array_equal(kept[rows], min(options, key=lambda option: option[0])[1])


def test_sparsegpt_settles_columns_as_obs_does():
    """Each dropped weight moves the columns to its right to where they lose least, those to the left being settled."""
    w, x = problem(3, 8)
    hessian = x.T @ x
    new, mask = prune.sparsegpt(w, hessian, "2:4")
    expected = w.copy()
    for i in range(3):
        for j in range(8):
            if not mask[i, j]:
                rest = np.arange(8) > j
                # argmin over the rest of the loss with columns up to j as they are now and column j at 0
                change = hessian[np.ix_(rest, rest)]
                expected[i, rest] += np.linalg.solve(change, hessian[rest, j] * expected[i, j])
                expected[i, j] = 0
    np.testing.assert_allclose(new, expected, atol=1e-8)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", CALIBRATED)
@pytest.mark.parametrize("shape", [(12, 24), (7, 21), (3, 5)])
def test_every_method_fits_every_pattern(pattern, method, shape):
    w, x = problem(*shape)
    pruned = prune.prune_weight(w, pattern, method, hessian=x.T @ x / 200)
    pruned.check_format(full=True)
    assert str(pruned.pattern) == pattern and pruned.shape == shape
    if method.endswith("refit") or method == "admm":
        again = prune.refit(w, damped(x.T @ x / 200), pruned.mask())
        np.testing.assert_allclose(pruned.todense(), again, atol=1e-6)


@pytest.mark.parametrize("pattern", ["2:4", "vnm:4:2:8", "samoyeds:1:2:8"])
def test_better_methods_lose_less(pattern):
    losses = dict.fromkeys(prune.METHODS, 0.0)
    for seed in range(5):
        w, x = problem(16, 32, seed)
        hessian = x.T @ x / 200
        for method in losses:
            pruned = prune.prune_weight(w, pattern, method, hessian=hessian).todense()
            losses[method] += quadratic_loss(w, pruned, hessian).sum()
    assert losses["admm"] < losses["sparsegpt+refit"] < losses["sparsegpt"] < losses["magnitude"]
    assert losses["wanda+refit"] < losses["wanda"]


def test_one_group_by_admm_is_nearly_the_best_of_all_masks():
    better = 0
    for seed in range(40):
        w, x = problem(1, 4, seed)
        hessian = damped(x.T @ x / 200)

        def loss(mask, w=w, hessian=hessian):
            return quadratic_loss(w, prune.refit(w, hessian, mask), hessian)[0]

        masks = [np.isin(np.arange(4), keep)[None] for keep in combinations(range(4), 2)]
        ranked = sorted(map(loss, masks))
        found = loss(prune.admm_mask(w, hessian, "2:4"))
        assert found <= ranked[-2]
        better += found <= ranked[0] * (1 + 1e-9)
    assert better >= 30


def test_row_weights_decide_between_rows():
    w, x = problem(2, 8)
    for method in ("admm", "sparsegpt"):
        for row in (0, 1):
            weights = np.where(np.arange(2) == row, 1e6, 1.0)
            mask = prune.prune_weight(w, "samoyeds:1:2:8", method, hessian=x.T @ x, row_weights=weights).mask()
            assert mask[row].any() and not mask[1 - row].any()


@given(st.integers(0, 100))
def test_recentred_is_the_ridge_solution(seed):
    rng = np.random.default_rng(seed)
    old, new, w = rng.standard_normal((30, 5)), rng.standard_normal((30, 4)), rng.standard_normal((3, 4))
    y = old @ rng.standard_normal((5, 3))
    found = recentred(w, new.T @ new / 30, y.T @ new / 30, 0.1)
    stacked = np.vstack([new / 30**0.5, 0.1**0.5 * np.eye(4)])
    expected = np.linalg.lstsq(stacked, np.vstack([y / 30**0.5, 0.1**0.5 * w.T]), rcond=None)[0].T
    np.testing.assert_allclose(found, expected, atol=1e-8)


def test_shrinking_moves_from_the_shared_to_the_own():
    own, shared = np.eye(2), 3 * np.eye(2)
    assert shrunk(own, 0, shared, 8)[0, 0] == 3
    assert 1 < shrunk(own, 8, shared, 8)[0, 0] == 2
    assert shrunk(own, 1e9, shared, 8)[0, 0] == pytest.approx(1)


def test_what_is_refused():
    w = np.ones((4, 8))
    with pytest.raises(NMSparseError, match="expected one of magnitude"):
        prune.prune_weight(w, "2:4", "obd")
    with pytest.raises(NMSparseError, match="wanda needs hessian="):
        prune.prune_weight(w, "2:4", "wanda")
    with pytest.raises(NMSparseError, match="finite"):
        prune.prune_weight(w, "2:4", "admm", hessian=np.full((8, 8), np.nan))
    with pytest.raises(NMSparseError, match=r"\(4, 8\) and \(4, 4\)"):
        prune.prune_weight(w, "2:4", "admm", hessian=np.eye(4))
    with pytest.raises(NMSparseError, match="input columns"):
        prune.wanda(w, np.ones(4))


def test_inputs_that_were_never_active_break_nothing():
    for method in CALIBRATED:
        pruned = prune.prune_weight(np.ones((4, 8)), "2:4", method, hessian=np.zeros((8, 8)))
        assert np.isfinite(pruned.todense()).all()
