"""Whole experts: the super-expert guard, EASY-EP, REAP, removal, and STUN's clusters, each against its definition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmsparse import NMSparseError
from nmsparse.moe import Router
from nmsparse.prune.experts import (
    best_experts,
    cluster,
    easy_ep,
    expert_distances,
    expert_sums,
    mean_norm,
    mix_domains,
    reap,
    remove_experts,
    representatives,
    super_experts,
    turn,
)
from nmsparse.reference import moe

T, E, H, I, K = 30, 6, 8, 10, 2  # noqa: E741 (the field's names)


@pytest.fixture
def layer():
    """Tokens, a routing, weights, and the output of each slot before its routing weight (T, K, H)."""
    rng = np.random.default_rng(0)
    x, router = rng.standard_normal((T, H)), rng.standard_normal((E, H))
    gate_up, down = rng.standard_normal((E, 2 * I, H)), rng.standard_normal((E, H, I))
    ids, weights = Router(K, renormalize=True)((x @ router.T).astype(np.float32))
    outputs = np.stack([moe(x, ids[:, [j]], np.ones((T, 1)), gate_up, down) for j in range(K)], axis=1)
    return x, router, gate_up, down, ids, weights, outputs


# --- super experts -----------------------------------------------------------------------------------------------


def test_planted_super_experts_are_found():
    """48 layers of 128 experts as in Qwen3-30B-A3B; what the last quarter of the layers writes does not count."""
    largest = np.random.default_rng(0).uniform(1, 5, (48, 128))
    largest[2, 68], largest[3, 30], largest[35, 9], largest[36, 1], largest[47, 5] = 900, 400, 201, 800, 2000
    assert np.argwhere(super_experts(largest)).tolist() == [[2, 68], [3, 30], [35, 9]]


@pytest.mark.parametrize(("value", "found"), [(100.0, False), (100.1, True)])
def test_a_super_expert_is_above_a_tenth_of_the_largest(value, found):
    largest = np.ones((8, 100))
    largest[0, 0], largest[1, 1] = 1000, value
    assert super_experts(largest)[1, 1] == found


def test_equal_experts_are_not_super():
    assert not super_experts(np.ones((4, 4))).any()
    assert super_experts(np.zeros((0, 4))).shape == (0, 4)


# --- scores ------------------------------------------------------------------------------------------------------


def test_easy_ep_by_its_definition(layer):
    x, _, _, _, ids, weights, outputs = layer
    after = x + (weights[:, :, None] * outputs).sum(axis=1)
    expected = np.zeros(E)
    for t, j in itertools.product(range(T), range(K)):
        cosine = x[t] @ after[t] / np.linalg.norm(x[t]) / np.linalg.norm(after[t])
        expected[ids[t, j]] += weights[t, j] * np.linalg.norm(outputs[t, j]) * max(1 - cosine, 0)
    norms = np.linalg.norm(outputs, axis=2)
    np.testing.assert_allclose(easy_ep(ids, weights, norms, x, after, E), expected, rtol=1e-12)
    halves = [
        easy_ep(ids[rows], weights[rows], norms[rows], x[rows], after[rows], E) for rows in np.split(np.arange(T), 2)
    ]
    np.testing.assert_allclose(sum(halves), expected, rtol=1e-12)


def test_easy_ep_gives_nothing_to_an_expert_that_only_scales():
    x = np.random.default_rng(1).standard_normal((T, H))
    score = easy_ep(np.zeros((T, 1), int), np.ones((T, 1)), np.linalg.norm(x, axis=1)[:, None] / 2, x, 1.5 * x, 2)
    assert score[0] == pytest.approx(0, abs=1e-12)


def test_easy_ep_gives_nothing_to_a_closed_gate(layer):
    x, _, _, _, ids, weights, outputs = layer
    weights = np.where(ids == 2, 0, weights)
    after = x + (weights[:, :, None] * outputs).sum(axis=1)
    score = easy_ep(ids, weights, np.linalg.norm(outputs, axis=2), x, after, E)
    assert score[2] == 0 and (np.delete(score, 2) > 0).all()


def test_three_by_three_by_hand():
    """Three tokens, three experts, one choice each; the second token is turned by 90 degrees, the others by none."""
    before = np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    after = np.array([[4.0, 0.0], [0.0, 5.0], [0.0, 1.0]])
    ids, weights, norms = np.array([[0], [1], [1]]), np.array([[0.5], [0.25], [1.0]]), np.array([[3.0], [4.0], [2.0]])
    assert turn(before, after).tolist() == [0, 1, 0]
    assert easy_ep(ids, weights, norms, before, after, 3).tolist() == [0, 1, 0]
    assert reap(expert_sums(ids, weights * norms, 3), expert_sums(ids, np.ones((3, 1)), 3)).tolist() == [1.5, 1.5, 0]


def test_reap_and_means_by_their_definition(layer):
    *_, ids, weights, outputs = layer
    norms = np.linalg.norm(outputs, axis=2)
    count = expert_sums(ids, np.ones((T, K)), E)
    np.testing.assert_array_equal(count, [np.count_nonzero(ids == e) for e in range(E)])
    for e in range(E):
        mine = ids == e
        assert reap(expert_sums(ids, weights * norms, E), count)[e] == pytest.approx(np.mean((weights * norms)[mine]))
        assert mean_norm(expert_sums(ids, norms, E), count)[e] == pytest.approx(np.mean(norms[mine]))
        assert mean_norm(expert_sums(ids, norms**2, E), count)[e] == pytest.approx(np.mean(norms[mine] ** 2))


def test_domains_weigh_alike():
    code, prose = np.array([[1.0, 3.0], [2.0, 2.0]]), np.array([[900.0, 100.0], [0.0, 0.0]])
    np.testing.assert_allclose(mix_domains(code, prose), [[1.15, 0.85], [0.5, 0.5]])
    np.testing.assert_allclose(mix_domains(code, 1000 * prose), mix_domains(code, prose))


@pytest.mark.parametrize("ids", [[[0, 6]], [[-1, 0]]])
def test_ids_of_no_expert(ids):
    with pytest.raises(NMSparseError, match=r"ids: expected expert numbers in 0\.\.5"):
        expert_sums(np.array(ids), np.ones((1, 2)), E)


# --- removal -----------------------------------------------------------------------------------------------------


def test_the_best_of_each_layer_stay():
    scores = np.array([[3.0, 1.0, 2.0, 2.0], [90.0, 80.0, 70.0, 60.0]])
    assert best_experts(scores, 2).astype(int).tolist() == [[1, 0, 1, 0], [1, 1, 0, 0]]
    guard = np.array([[0, 1, 0, 0], [0, 0, 0, 1]], bool)
    assert best_experts(scores, 2, guard=guard).astype(int).tolist() == [[1, 1, 0, 0], [1, 0, 0, 1]]
    with pytest.raises(NMSparseError, match=r"guard: expected a mask .* with at most 1 experts"):
        best_experts(scores, 1, guard=np.array([[1, 1, 0, 0], [0, 0, 0, 0]], bool))
    with pytest.raises(NMSparseError, match=r"keep: expected 1\.\.4"):
        best_experts(scores, 5)


@pytest.mark.parametrize("router", [Router(K, renormalize=True), Router(K, "sigmoid"), Router(K, "sigmoid", True)])
def test_the_rest_routes_as_if_the_removed_could_not_be_chosen(layer, router):
    x, rows, gate_up, down, *_ = layer
    kept = np.array([1, 0, 1, 1, 0, 1], bool)
    small_rows, small, _ = remove_experts(kept, rows, (gate_up, down))
    logits = (x @ rows.T).astype(np.float32)
    y = moe(x, *router(logits[:, kept]), *small)
    masked = moe(x, *router(np.where(kept, logits, np.float32(-1e4))), gate_up, down)
    np.testing.assert_allclose(y, masked, rtol=1e-5, atol=1e-6)

    before = router(logits)
    untouched = kept[before[0]].all(axis=1)
    assert 0 < untouched.sum() < T
    np.testing.assert_allclose(y[untouched], moe(x, *before, gate_up, down)[untouched], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(small_rows, rows[kept])


def test_a_bias_goes_with_its_expert():
    weights = np.zeros((3, 4, 5)), np.zeros((3, 5, 2))
    *_, bias = remove_experts(np.array([False, True, True]), np.eye(3, 5), weights, np.array([1.0, 2.0, 3.0]))
    assert bias.tolist() == [2, 3]
    with pytest.raises(NMSparseError, match=r"kept: expected bool\[3\]"):
        remove_experts(np.array([0, 1, 1]), np.eye(3, 5), weights)


# --- clusters ----------------------------------------------------------------------------------------------------


def test_distances_by_their_definition():
    rng = np.random.default_rng(2)
    rows, together = rng.standard_normal((5, 7)), rng.integers(0, 9, (5, 5))
    together = together + together.T
    pairs = list(itertools.combinations(range(5), 2))
    gap = {pair: np.linalg.norm(rows[pair[0]] - rows[pair[1]]) for pair in pairs}
    mean_gap, mean_together = np.mean(list(gap.values())), np.mean([together[pair] for pair in pairs])
    distance = expert_distances(rows, together, router_scale=2, coactivation_scale=3)
    for i, j in pairs:
        expected = 2 * gap[i, j] / mean_gap - 3 * together[i, j] / mean_together
        assert distance[i, j] == distance[j, i] == pytest.approx(expected)
    assert (np.diag(distance) == 0).all()


def widest(labels, distances):
    """The largest distance inside a cluster, over all layers."""
    return max(
        distances[layer][i, j]
        for layer in range(len(labels))
        for i, j in itertools.combinations_with_replacement(range(labels.shape[1]), 2)
        if labels[layer, i] == labels[layer, j]
    )


@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(2, 5), st.data())
def test_clusters_are_those_of_complete_linkage(seed, layers, experts, data):
    distances = np.stack(
        [expert_distances(r) for r in np.random.default_rng(seed).standard_normal((layers, experts, 3))]
    )
    minimum = data.draw(st.integers(1, 2))
    total = data.draw(st.integers(layers * minimum, layers * experts))
    labels = cluster(distances, total, minimum=minimum)

    # The same by hand: again and again, of the whole model, join the two clusters whose farthest members are nearest.
    groups = [[[e] for e in range(experts)] for _ in range(layers)]
    while sum(map(len, groups)) > total:
        _, layer, a, b = min(
            (max(distances[layer][i, j] for i in a for j in b), layer, a, b)
            for layer in range(layers)
            if len(groups[layer]) > minimum
            for a, b in itertools.combinations(groups[layer], 2)
        )
        groups[layer] = sorted(sorted([g for g in groups[layer] if g not in (a, b)] + [a + b], key=min))
    for layer in range(layers):
        mine = {frozenset(np.flatnonzero(labels[layer] == label).tolist()) for label in range(labels[layer].max() + 1)}
        assert mine == {frozenset(group) for group in groups[layer]}
    assert sum(row.max() + 1 for row in labels) == total


def test_planted_duplicates_cluster_and_stay_close(layer):
    _, rows, *_ = layer
    doubled = np.concatenate([rows, rows[[0, 3]] + 1e-3])
    distance = expert_distances(doubled)
    labels = cluster(distance[None], E)
    assert labels[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 3]
    assert widest(labels, distance[None]) < distance[np.triu_indices(E, 1)].min()


def test_coactivation_draws_experts_together():
    rows = np.eye(4)  # all equally far
    together = np.zeros((4, 4))
    together[1, 2] = together[2, 1] = 5
    assert cluster(expert_distances(rows, together)[None], 3)[0].tolist() == [0, 1, 1, 2]


def test_removed_duplicates_are_free_only_with_their_gate_mass(layer):
    x, rows, gate_up, down, *_ = layer
    twin = np.concatenate([np.arange(E), [1, 4]])  # experts 6 and 7 are 1 and 4 again
    router = Router(3, renormalize=True)
    whole = router((x @ rows[twin].T).astype(np.float32))
    y = moe(x, *whole, gate_up[twin], down[twin])

    labels = cluster(expert_distances(rows[twin])[None], E)[0]
    kept = representatives(labels, (gate_up[twin], down[twin]))
    assert kept.tolist() == list(range(E))
    redirected = kept[labels][whole[0]], whole[1]  # a slot of a removed expert goes to the expert that stands for it
    np.testing.assert_allclose(moe(x, *redirected, gate_up, down), y, rtol=1e-12)

    small_rows, small, _ = remove_experts(np.isin(np.arange(E + 2), kept), rows[twin], (gate_up[twin], down[twin]))
    forgotten = moe(x, *router((x @ small_rows.T).astype(np.float32)), *small)
    hit = np.isin(whole[0], [1, 4, 6, 7]).any(axis=1)
    assert hit.any() and np.abs(forgotten - y)[hit].max() > 0.1 * np.abs(y).max()


def test_the_representative_is_nearest_to_the_mean():
    rng = np.random.default_rng(5)
    weights = rng.standard_normal((6, 4, 3)), rng.standard_normal((6, 3, 2))
    labels = np.array([0, 1, 0, 1, 1, 0])
    flat = np.concatenate([w.reshape(6, -1) for w in weights], axis=1)
    for label, kept in enumerate(representatives(labels, weights)):
        members = np.flatnonzero(labels == label)
        gaps = np.linalg.norm(flat[members] - flat[members].mean(axis=0), axis=1)
        assert kept == members[gaps.argmin()]


def test_clusters_that_cannot_be():
    with pytest.raises(NMSparseError, match=r"total: expected 4\.\.6 clusters for 2 layers of 3 experts"):
        cluster(np.zeros((2, 3, 3)), 3, minimum=2)
    assert cluster(np.zeros((2, 1, 1)), 2).tolist() == [[0], [0]]
