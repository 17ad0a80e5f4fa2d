"""The forward pass of a layer of experts: against ``nmsparse.reference``, with weights of every kind."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from strategies import DTYPES, bits

from nmsparse import formats, reference
from nmsparse.cpu import fused
from nmsparse.cpu.activations import NUMBERS, activate
from nmsparse.cpu.fused import suits_fused
from nmsparse.cpu.moe import moe_forward
from nmsparse.formats import RaggedTokens
from nmsparse.testing import assert_close

HIDDEN, INNER, EXPERTS = 96, 80, 5


def weight(kind, shape, dtype, rng):
    if kind == "dense":
        return (rng.standard_normal(shape, np.float32) / 8).astype(dtype)
    return formats.from_dense((rng.standard_normal(shape, np.float32) / 8).astype(dtype), kind)


def layer(kinds, tokens, k, *, gated=True, inner=INNER, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    gate_up = weight(kinds[0], (EXPERTS, (1 + gated) * inner, HIDDEN), dtype, rng)
    down = weight(kinds[1], (EXPERTS, HIDDEN, inner), dtype, rng)
    ids = np.argsort(rng.random((tokens, EXPERTS)), axis=1)[:, :k].astype(np.int32)
    x, weights = rng.standard_normal((tokens, HIDDEN), np.float32), rng.random((tokens, k), np.float32)
    return x, ids, weights, gate_up, down


def assert_right(x, ids, weights, gate_up, down, activation="silu"):
    y = moe_forward(x, RaggedTokens.from_topk(ids, EXPERTS), weights, gate_up, down, activation)
    assert y.dtype == np.float32
    assert_close(y, reference.moe(x, ids, weights, gate_up, down, activation), HIDDEN + down.shape[2], scale=4)
    return y


@pytest.mark.parametrize("tokens", [0, 1, 3, 40, 150])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_tokens_and_choices(tokens, k):
    assert_right(*layer(("2:4", "2:4"), tokens, k))


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_activations(activation, gated):
    assert_right(*layer(("2:4", "2:4"), 20, 2, gated=gated), activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "kinds",
    [
        ("samoyeds:1:2:32", "vnm:16:2:8"),
        ("1:4", "2:4"),
        ("dense", "samoyeds:1:2:16"),
        ("2:4", "dense"),
        ("dense", "dense"),
    ],
)
def test_weights_of_two_kinds(kinds, dtype):
    assert_right(*layer(kinds, 30, 2, dtype=dtype))


def test_experts_that_no_token_chose():
    x, ids, weights, gate_up, down = layer(("2:4", "2:4"), 12, 1)
    ids[:] = 3
    assert_right(x, ids, weights, gate_up, down)


@pytest.fixture
def one_thread(monkeypatch):
    """So few that 64 tokens for each of 6 tiles are many."""
    monkeypatch.setattr(fused, "count", lambda: 1)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("inner", [80, 300])
@pytest.mark.parametrize(
    "kinds", [("2:4", "vnm:16:2:8"), ("samoyeds:1:3:32", "2:4"), ("vnm:16:2:8", "samoyeds:1:2:20")]
)
def test_both_projections_at_once(kinds, inner, gated, one_thread):
    made = layer(kinds, 250, 2, gated=gated, inner=inner)
    _, ids, _, gate_up, down = made
    assert suits_fused(gate_up, down, RaggedTokens.from_topk(ids, EXPERTS))
    assert_right(*made, "gelu_tanh" if inner == 80 else "silu")


def test_both_projections_at_once_with_16_bit_weights_of_two_kinds(one_thread):
    assert_right(*layer(("1:4", "2:4"), 250, 2, dtype=ml_dtypes.bfloat16))


def test_when_both_projections_at_once_are_worth_it(one_thread):
    def suits(tokens, kinds=("2:4", "2:4"), k=2):
        _, ids, _, gate_up, down = layer(kinds, tokens, k)
        return suits_fused(gate_up, down, RaggedTokens.from_topk(ids, EXPERTS))

    assert [suits(tokens) for tokens in (0, 1, 191, 192)] == [False, False, False, True]
    assert not suits(192, ("2:4", "dense")) and not suits(192, ("dense", "2:4"))


@pytest.mark.parametrize("share", [0.4, 1.0])
@pytest.mark.parametrize("tokens", [40, 700])
def test_slots_that_are_left_out(share, tokens):
    x, ids, weights, gate_up, down = layer(("samoyeds:1:2:32", "2:4"), tokens, 3)
    ids[np.random.default_rng(1).random(ids.shape) < share] = -1
    weights[ids == -1] = np.nan  # nobody looks
    assert_right(x, ids, weights, gate_up, down)


def test_the_same_bits_every_time():
    x, ids, weights, gate_up, down = layer(("samoyeds:1:2:32", "2:4"), 150, 5)
    ragged = RaggedTokens.from_topk(ids, EXPERTS)
    first, second = (moe_forward(x, ragged, weights, gate_up, down, "silu") for _ in range(2))
    np.testing.assert_array_equal(bits(first), bits(second))


def test_a_nan_stays_with_its_token():
    x, ids, weights, gate_up, down = layer(("2:4", "2:4"), 40, 2)
    x[7] = np.nan
    y = moe_forward(x, RaggedTokens.from_topk(ids, EXPERTS), weights, gate_up, down, "silu")
    np.testing.assert_array_equal(np.isnan(y).any(axis=1), np.arange(40) == 7)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations_at_the_ends_of_float32(activation):
    x = np.float32([[0.0, -0.0, 1e-30, -1e-30, 88.0, -88.0, 104.0, -104.0, 1e4, -1e4, np.inf, np.nan]])
    with np.errstate(all="ignore"):
        want = reference.ACTIVATIONS[activation](x.astype(np.float64))
    got = activate(x, x.shape[1], activation)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-30)


def test_every_activation_has_a_number():
    assert list(NUMBERS) == list(reference.ACTIVATIONS)
