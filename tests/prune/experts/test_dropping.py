"""1T- and 2T-Drop: modes by their definition, and experts in halves that compute what the modes say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from nmsparse import NMSparseError, RaggedTokens, SparseExperts, array
from nmsparse.moe import Router
from nmsparse.prune.experts import (
    drop_1t,
    drop_2t,
    dropped,
    interleave,
    neuron_multiple,
    partition,
    route_2t,
    sub_routing,
)
from nmsparse.reference import gated, moe

T, E, H, I, K = 40, 6, 16, 64, 3  # noqa: E741 (the field's names)

weights = arrays.arrays(
    np.float32, st.tuples(st.integers(0, 6), st.integers(1, 4)), elements=st.integers(0, 4).map(float)
)
thresholds = st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.5, 0.9, 1.0, 1.1])


@given(weights, thresholds, thresholds)
def test_modes_by_their_definition(w, a, b):
    major, minor = sorted((a, b))
    modes = drop_2t(w, major, minor)
    assert modes.dtype == np.int64 and modes.shape == w.shape
    for t, j in np.ndindex(*w.shape):
        share = w[t, j] / w[t].sum() if w[t].sum() else np.float32(0)
        assert modes[t, j] == (0 if share < major else 1 if share < minor else 2)


@given(weights, thresholds)
def test_2t_with_equal_thresholds_is_1t(w, threshold):
    whole = np.array([[2 if share >= threshold * row.sum() else 0 for share in row] for row in w], int).reshape(w.shape)
    close = np.isclose(w, threshold * w.sum(axis=1, keepdims=True))  # the product rounds differently
    np.testing.assert_array_equal(drop_2t(w, threshold, threshold)[~close], whole[~close])
    np.testing.assert_array_equal(drop_2t(w, threshold, threshold), drop_1t(w, threshold))


@given(weights, st.lists(thresholds, min_size=4, max_size=4))
def test_higher_thresholds_drop_more(w, values):
    low_major, low_minor, more, still_more = sorted(values)
    assert dropped(drop_2t(w, low_major, low_minor)) <= dropped(drop_2t(w, low_minor, more))
    assert dropped(drop_1t(w, more)) <= dropped(drop_1t(w, still_more))


def routing(seed=0, tokens=T):
    return Router(K, renormalize=True)(np.random.default_rng(seed).standard_normal((tokens, E)).astype(np.float32))


def layer(seed=1):
    """Tokens, and the two weights of the experts."""
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(shape, np.float32) for shape in ((T, H), (E, 2 * I, H), (E, H, I)))


def slot_by_slot(x, ids, w, modes, gate_up, down):
    """The layer with each slot's expert cut to the neurons that its mode leaves, in float64."""
    y, (gate_up, down) = np.zeros(x.shape), (a.astype(np.float64) for a in (gate_up, down))
    for t, j in np.ndindex(*ids.shape):
        e, width = ids[t, j], I * modes[t, j] // 2
        a = np.concatenate([gate_up[e, :width], gate_up[e, I : I + width]]) @ x[t]
        y[t] += w[t, j] * (down[e][:, :width] @ gated(a, width, "silu"))
    return y


def assert_close(y, expected):
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))


THRESHOLDS = [(0, 0), (0.2, 0.35), (0.3, 0.3), (0.4, 2.0), (2.0, 2.0)]


@pytest.mark.parametrize(("major", "minor"), THRESHOLDS)
def test_halves_compute_the_dropped_layer(major, minor):
    x, gate_up, down = layer()
    ids, w = routing()
    halves = interleave(partition((gate_up, down), [I // 2]))
    dual = route_2t(ids, w, major, minor)
    expected = slot_by_slot(x, ids, w, drop_2t(w, major, minor), gate_up, down)
    np.testing.assert_allclose(moe(x, *dual, *halves), expected, rtol=1e-10, atol=1e-10)
    assert_close(SparseExperts(*halves)(x, *dual), expected)
    if minor == 0:
        assert_close(SparseExperts(*halves)(x, *dual), moe(x, ids, w, gate_up, down))
    if major == minor:  # 1T-Drop on whole experts
        kept = sub_routing(ids, w, 1, drop_1t(w, major))
        assert_close(SparseExperts(gate_up, down)(x, *kept), expected)


@pytest.mark.parametrize("pattern", ["2:4", "vnm:16:2:8", "samoyeds:1:2:16"])
def test_halves_may_be_sparse(pattern):
    """Cut where the pattern allows it and then pruned, the halves run on the kernels as the pruned whole does."""
    x, gate_up, down = layer()
    ids, w = routing()
    halves = interleave(partition((gate_up, down), [I // 2], multiple=neuron_multiple(pattern)))
    experts = SparseExperts(*(array(a, pattern) for a in halves))
    whole = [array(a, pattern).todense() for a in (gate_up, down)]
    expected = slot_by_slot(x, ids, w, drop_2t(w, 0.2, 0.35), *whole)
    assert_close(experts(x, *route_2t(ids, w, 0.2, 0.35)), expected)


def test_the_major_half_reads_all_rows_and_the_minor_half_the_full_ones():
    ids, w = routing()
    modes = drop_2t(w, 0.2, 0.35)
    assert {0, 1, 2} == set(modes.ravel().tolist())
    rows = np.split((ragged := RaggedTokens.from_topk(route_2t(ids, w, 0.2, 0.35)[0], 2 * E)).token_ids, ragged.offsets)
    for e in range(E):
        for half, least in ((0, 1), (1, 2)):
            assert rows[2 * e + half].tolist() == np.nonzero((ids == e) & (modes >= least))[0].tolist()
    assert len(rows[-1]) == 0 and ragged.offsets[-1] == modes.sum()


def test_nothing_is_dropped_at_threshold_0():
    ids, w = routing()
    assert dropped(drop_2t(w, 0, 0)) == 0
    for got, want in zip(route_2t(ids, w, 0, 0), sub_routing(ids, w, 2), strict=True):
        np.testing.assert_array_equal(got, want, strict=True)


def test_a_token_may_lose_all_its_experts():
    x, gate_up, down = layer()
    ids, w = routing()
    assert dropped(drop_2t(w, 2, 2)) == 1
    assert not SparseExperts(gate_up, down)(x, *sub_routing(ids, w, 1, drop_1t(w, 2))).any()


def test_thresholds_in_the_wrong_order():
    with pytest.raises(NMSparseError, match=r"expected major <= minor, got 0\.5 and 0\.2"):
        drop_2t(np.ones((1, 2)), 0.5, 0.2)


@pytest.mark.parametrize("ids_dtype", ["int32", "int64"])
@pytest.mark.parametrize("weights_dtype", ["float32", "bfloat16"])
def test_tensors_give_the_same_tensors(ids_dtype, weights_dtype):
    torch = pytest.importorskip("torch")
    ids, w = (torch.from_numpy(a) for a in routing())
    ids, w = ids.to(getattr(torch, ids_dtype)), w.to(getattr(torch, weights_dtype))
    got = route_2t(ids, w, 0.2, 0.35)
    assert [t.dtype for t in got] == [ids.dtype, w.dtype]
    if weights_dtype == "float32":
        for mine, want in zip(got, route_2t(ids.numpy(), w.numpy(), 0.2, 0.35), strict=True):
            np.testing.assert_array_equal(mine.numpy(), want, strict=True)
    assert dropped(drop_2t(w, 0.2, 0.35)) == pytest.approx((got[0] == -1).float().mean().item())
    x, *halves = layer()[0], *interleave(partition(layer()[1:], [I // 2]))
    y = SparseExperts(*halves)(torch.from_numpy(x), *got)
    assert_close(y.numpy(), moe(x, got[0].numpy(), w.float().numpy().repeat(2, axis=1), *halves))
