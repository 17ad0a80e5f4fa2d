from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmsparse import NMSparseError, RaggedTokens
from nmsparse.formats import DROPPED


@st.composite
def routings(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    experts = draw(st.integers(1, 20))
    top_k = draw(st.integers(1, experts))
    tokens = draw(st.integers(0, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k]
    ids[rng.random(ids.shape) < draw(st.sampled_from([0, 0, 0.3, 1]))] = DROPPED
    return ids.astype(draw(st.sampled_from([np.int32, np.int64]))), experts


@given(routings())
def test_offsets_are_cumulative_counts(routing):
    ids, experts = routing
    r = RaggedTokens.from_topk(ids, experts)
    np.testing.assert_array_equal(r.counts, [(ids == e).sum() for e in range(experts)])
    np.testing.assert_array_equal(r.offsets, np.cumsum(r.counts))
    assert r.token_ids.dtype == r.slots.dtype == r.offsets.dtype == ids.dtype
    assert (r.num_tokens, r.top_k) == ids.shape


@given(routings())
def test_each_expert_reads_its_tokens_in_order(routing):
    ids, experts = routing
    r = RaggedTokens.from_topk(ids, experts)
    for e, tokens in enumerate(np.split(r.token_ids, r.offsets[:-1])):
        np.testing.assert_array_equal(tokens, np.flatnonzero((ids == e).any(axis=1)))


@given(routings())
def test_slots_lead_back_to_the_routing(routing):
    ids, experts = routing
    r = RaggedTokens.from_topk(ids, experts)
    np.testing.assert_array_equal(np.sort(r.slots), np.flatnonzero(ids != DROPPED))
    np.testing.assert_array_equal(ids.ravel()[r.slots], np.repeat(np.arange(experts), r.counts))
    np.testing.assert_array_equal(r.token_ids, r.slots // max(1, ids.shape[1]))


@given(routings(), st.integers(-3, 30), st.data())
def test_ids_out_of_range_or_named_twice_are_refused(routing, bad, data):
    ids, experts = routing
    if not ids.size:
        return
    where = tuple(data.draw(st.integers(0, size - 1)) for size in ids.shape)
    broken = ids.copy()
    broken[where] = bad
    duplicate = any(len(set(row)) < len(row) for row in ([e for e in row if e != DROPPED] for row in broken.tolist()))
    if DROPPED <= bad < experts and not duplicate:
        RaggedTokens.from_topk(broken, experts)
    else:
        with pytest.raises(
            NMSparseError, match="names an expert twice" if DROPPED <= bad < experts else "expected expert numbers"
        ):
            RaggedTokens.from_topk(broken, experts)


@pytest.mark.parametrize(
    "ids", [np.zeros((3, 2)), np.zeros(3, int), np.zeros((3, 2), np.uint8), np.zeros((1, 2, 2), int)]
)
def test_ids_of_another_kind_are_refused(ids):
    with pytest.raises(NMSparseError, match="int32 or int64"):
        RaggedTokens.from_topk(ids, 4)


def test_no_tokens_and_no_experts():
    r = RaggedTokens.from_topk(np.zeros((0, 2), np.int32), 3)
    assert r.offsets.tolist() == [0, 0, 0] and r.token_ids.size == 0
    assert RaggedTokens.from_topk(np.zeros((4, 0), np.int64), 0).offsets.shape == (0,)
