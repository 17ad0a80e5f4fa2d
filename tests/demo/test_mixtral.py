"""The NumPy Mixtral against transformers, and its parts against their definitions."""

from __future__ import annotations

import json

import numpy as np
import pytest

from nmsparse import NMSparseError, demo
from nmsparse.demo import mixtral

pytestmark = pytest.mark.skipif(not demo.MODEL.exists(), reason="needs examples/tiny-moe of a checkout")


@pytest.fixture(scope="module")
def model() -> mixtral.Mixtral:
    return demo.load_model(demo.MODEL)


@pytest.fixture(scope="module")
def windows() -> np.ndarray:
    return demo.read_windows(demo.MODEL / "heldout.txt", 4)


@pytest.fixture(scope="module")
def expected(windows: np.ndarray) -> np.ndarray:
    """Logits by transformers, in float32, of the same checkpoint."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = transformers.MixtralForCausalLM.from_pretrained(demo.MODEL, dtype=torch.float32).eval()
    with torch.no_grad():
        return theirs(input_ids=torch.from_numpy(windows.astype(np.int64))).logits.numpy()


def test_logits_are_those_of_transformers(model, windows, expected):
    np.testing.assert_allclose(model(windows), expected, rtol=0, atol=3e-4)  # logits reach 20: 1.5e-5 of the largest
    assert np.abs(expected).max() > 10


def test_bits_per_byte_is_the_cross_entropy_of_torch(windows, expected):
    torch = pytest.importorskip("torch")
    logits, following = torch.from_numpy(expected[:, :-1]), torch.from_numpy(windows[:, 1:].astype(np.int64))
    nats = torch.nn.functional.cross_entropy(logits.reshape(-1, 256).double(), following.reshape(-1)).item()
    assert mixtral.bits_per_byte(expected, windows) == pytest.approx(nats / np.log(2), rel=1e-6)


def test_a_byte_does_not_see_those_behind_it(model, windows):
    changed = windows.copy()
    changed[:, 300:] = 0
    before, after = model(windows), model(changed)
    np.testing.assert_allclose(before[:, :300], after[:, :300], atol=2e-4)
    assert np.abs(before[:, 300:] - after[:, 300:]).max() > 1


def test_windows_of_odd_lengths(model, windows):
    whole = model(windows[:1])
    for length in (1, 127, 129):
        np.testing.assert_allclose(model(windows[:1, :length]), whole[:, :length], atol=2e-4)


@pytest.mark.parametrize("length", [1, 5, 128, 200])
def test_attention_is_its_definition(length):
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, length, 16))
    scores = q @ k.swapaxes(-1, -2) / 4
    scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    np.testing.assert_allclose(mixtral.causal_attention(q, k, v), weights / weights.sum(-1, keepdims=True) @ v)


def test_a_rotated_product_depends_on_the_distance_only():
    q, k = np.random.default_rng(0).standard_normal((2, 1, 64))
    cos, sin = mixtral.rotary_angles(40, 64, 10000.0)
    products = mixtral.rotate(q, cos, sin) @ mixtral.rotate(k, cos, sin).T
    for distance in (0, 3, 20):
        np.testing.assert_allclose(np.ptp(np.diagonal(products, distance)), 0, atol=1e-5)


def test_config_of_older_transformers(model):
    config = json.loads((demo.MODEL / "config.json").read_text())
    older = {**config, "rope_theta": config["rope_parameters"]["rope_theta"]}
    del older["rope_parameters"], older["head_dim"]
    assert mixtral.Config.from_dict(older) == model.config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "olmoe"}, "'mixtral'"),
        ({"hidden_act": "gelu"}, "'silu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type"),
        ({"rope_parameters": None}, "rope_theta"),
        ({"vocab_size": 32000}, "256"),
    ],
)
def test_config_that_is_not_understood(change, message):
    config = json.loads((demo.MODEL / "config.json").read_text())
    with pytest.raises(NMSparseError, match=message):
        mixtral.Config.from_dict({**config, **change})


def test_a_tensor_that_is_missing_is_named():
    config = json.loads((demo.MODEL / "config.json").read_text())
    with pytest.raises(NMSparseError, match=r"experts\.0\.w1\.weight"):
        mixtral.load(config, {}.__getitem__)


def test_sliding_window_is_refused(model, windows):
    narrow = mixtral.replace(model.config, sliding_window=256)
    other = mixtral.Mixtral(narrow, model.embedding, model.blocks, model.norm, model.head)
    with pytest.raises(NMSparseError, match="sliding window"):
        other(windows)
