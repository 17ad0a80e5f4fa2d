"""1T- and 2T-Drop: modes by their definition, and row ranges that compute what the modes say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from nmsparse import NMSparseError
from nmsparse.formats import RaggedTokens
from nmsparse.moe import Router
from nmsparse.prune.experts import FULL, DualTokens, drop_1t, drop_2t, dropped, interleave, partition, sub_routing
from nmsparse.reference import gated, moe

T, E, H, I, K = 40, 6, 8, 12, 3  # noqa: E741 (the field's names)

weights = arrays.arrays(
    np.float32, st.tuples(st.integers(0, 6), st.integers(1, 4)), elements=st.integers(0, 4).map(float)
)
thresholds = st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.5, 0.9, 1.0, 1.1])


@given(weights, thresholds, thresholds)
def test_modes_by_their_definition(w, a, b):
    major, minor = sorted((a, b))
    modes = drop_2t(w, major, minor)
    assert modes.dtype == np.uint8 and modes.shape == w.shape
    for t, j in np.ndindex(*w.shape):
        share = w[t, j] / w[t].sum() if w[t].sum() else np.float32(0)
        assert modes[t, j] == (0 if share < major else 1 if share < minor else 2)


@given(weights, thresholds)
def test_2t_with_equal_thresholds_is_1t(w, threshold):
    np.testing.assert_array_equal(drop_2t(w, threshold, threshold), drop_1t(w, threshold))


@given(weights, st.lists(thresholds, min_size=4, max_size=4))
def test_higher_thresholds_drop_more(w, values):
    low_major, low_minor, more, still_more = sorted(values)
    assert dropped(drop_2t(w, low_major, low_minor)) <= dropped(drop_2t(w, low_minor, more))
    assert dropped(drop_1t(w, more)) <= dropped(drop_1t(w, still_more))


def test_nothing_is_dropped_at_threshold_0():
    ids, w = routing()
    modes = drop_2t(w, 0, 0)
    assert dropped(modes) == 0
    dual, ragged = DualTokens.from_modes(ids, modes, E), RaggedTokens.from_topk(ids, E)
    for name in ("token_ids", "slots", "offsets"):
        np.testing.assert_array_equal(getattr(dual, name), getattr(ragged, name), strict=True)
    np.testing.assert_array_equal(dual.full_ends, ragged.offsets)


def test_thresholds_in_the_wrong_order():
    with pytest.raises(NMSparseError, match=r"expected major <= minor, got 0\.5 and 0\.2"):
        drop_2t(np.ones((1, 2)), 0.5, 0.2)


def routing(seed=0, tokens=T):
    return Router(K, renormalize=True)(np.random.default_rng(seed).standard_normal((tokens, E)).astype(np.float32))


def by_row_ranges(x, dual, w, gate_up, down, cut):
    """What a grouped kernel does with the ranges: major neurons for all rows, minor neurons for the FULL rows."""
    y, start = np.zeros_like(x), 0
    for e in range(E):
        for rows, part in (
            (slice(start, dual.offsets[e]), slice(0, cut)),
            (slice(start, dual.full_ends[e]), slice(cut, I)),
        ):
            gate, up = gate_up[e, :I][part], gate_up[e, I:][part]
            h = gated(x[dual.token_ids[rows]] @ np.concatenate([gate, up]).T, len(gate), "silu")
            terms = w.ravel()[dual.slots[rows], None] * (h @ down[e][:, part].T)
            np.add.at(y, dual.token_ids[rows], terms)
        start = dual.offsets[e]
    return y


@pytest.mark.parametrize(("major", "minor"), [(0, 0), (0.2, 0.35), (0.3, 0.3), (0.4, 2.0), (2.0, 2.0)])
def test_row_ranges_compute_the_dropped_layer(major, minor):
    rng = np.random.default_rng(1)
    x, gate_up, down = rng.standard_normal((T, H)), rng.standard_normal((E, 2 * I, H)), rng.standard_normal((E, H, I))
    ids, w = routing()
    modes = drop_2t(w, major, minor)
    dual = DualTokens.from_modes(ids, modes, E)
    assert dual.offsets[-1] == np.count_nonzero(modes)
    assert (np.diff(dual.full_ends, prepend=0) >= 0).all() and (dual.full_ends <= dual.offsets).all()
    halves = interleave(partition((gate_up, down), [I // 2]))
    expected = moe(x, *sub_routing(ids, w, 2, modes), *halves)
    np.testing.assert_allclose(by_row_ranges(x, dual, w, gate_up, down, I // 2), expected, rtol=1e-10, atol=1e-12)
    if minor == 0:
        np.testing.assert_allclose(expected, moe(x, ids, w, gate_up, down), rtol=1e-10)


@given(st.integers(0, 2**32), st.integers(0, 9))
def test_rows_are_full_then_major_and_tokens_in_order(seed, tokens):
    ids, _ = routing(seed, tokens)
    modes = np.random.default_rng(seed).integers(0, 3, ids.shape)
    dual = DualTokens.from_modes(ids.astype(np.int64), modes, E)
    assert dual.token_ids.dtype == dual.full_ends.dtype == np.int64
    start = 0
    for e in range(E):
        full, major = (
            [t for t in range(tokens) for j in range(K) if ids[t, j] == e and modes[t, j] == mode] for mode in (2, 1)
        )
        assert dual.token_ids[start : dual.full_ends[e]].tolist() == full
        assert dual.token_ids[dual.full_ends[e] : dual.offsets[e]].tolist() == major
        start = dual.offsets[e]
    assert (ids.ravel()[dual.slots] == np.repeat(np.arange(E), np.diff(dual.offsets, prepend=0))).all()
    np.testing.assert_array_equal(dual.slots // K, dual.token_ids)


def test_modes_that_are_none():
    ids, _ = routing()
    for modes in (np.full(ids.shape, 3), np.full(ids.shape, FULL)[:, :1]):
        with pytest.raises(NMSparseError, match=r"modes: expected 0 \(skip\), 1 \(major half\) or 2 \(full\)"):
            DualTokens.from_modes(ids, modes, E)
