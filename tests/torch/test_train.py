"""Mask training: the formulas, the schedule, and that it recovers what one-shot pruning loses."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from moe_models import make, tokens
from strategies import patterns, weights
from torch import nn

import nmsparse.torch as nt
from nmsparse import NMSparseError, formats
from nmsparse.torch.train import Masked, MaskTraining, mask


@given(weights(), patterns())
def test_masks_are_those_of_the_formats(w, pattern):
    assert np.array_equal(mask(nt.as_tensor(w), pattern).numpy(), formats.from_dense(w, pattern).mask())


@pytest.mark.parametrize("decay", [0.0, 0.03])
@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_the_formulas(decay, beta):
    """Forward W(m + (1-m)β); backward dW̃ + λ(1-m)W, in float64, bit for bit."""
    torch.manual_seed(0)
    w = torch.randn(8, 32, dtype=torch.float64, requires_grad=True)
    masked = Masked(w, formats.parse("2:4"), decay, nn.Linear(32, 8), "weight")
    masked.beta.fill_(beta)
    m = masked.kept.double()
    upstream = torch.randn(8, 32, dtype=torch.float64)
    got = masked(w)
    torch.testing.assert_close(got, w * (m + (1 - m) * beta), rtol=1e-15, atol=0)
    (grad,) = torch.autograd.grad(got, w, upstream)
    torch.testing.assert_close(grad, upstream + decay * (1 - m) * w, rtol=1e-15, atol=0)
    masked.frozen.fill_(True)
    (grad,) = torch.autograd.grad(masked(w), w, upstream)
    assert torch.equal(grad, upstream * m)


def test_the_schedule():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(32, 16, bias=False))
    original = layer[0].weight
    training = MaskTraining(layer, "2:4", steps=20, select="0", fade=0.5, refresh=3, frozen=0.25)
    assert layer[0].parametrizations.weight.original is original
    seen, betas = [], []
    for step in range(1, 21):
        assert training.frozen == (step > 15)
        kept = layer[0].parametrizations.weight[0].kept
        assert kept.view(16, 8, 4).sum(-1).eq(2).all()
        with torch.no_grad():
            original.normal_()
        before = kept.clone()
        training.step()
        if not torch.equal(before, kept):
            seen.append(step)
            assert training.flips == (before ^ kept).float().mean()
        betas.append(round(training.beta, 6))
    assert seen == [3, 6, 9, 12, 15]
    assert betas == [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, *[0.0] * 11]
    want = original.detach() * kept
    training.finish()
    assert layer[0].weight is original and torch.equal(original, want)
    assert torch.equal(nt.sparsify_(layer, "2:4", select="0")[0].weight.todense(), want)


def teacher_and_data():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
    x = torch.randn(2048, 32)
    with torch.no_grad():
        return teacher, x, teacher(x)


def test_recovery():
    """Training with masks beats fixed masks, which beat one-shot pruning, and the result is in the pattern."""
    teacher, x, y = teacher_and_data()

    def loss(model):
        with torch.no_grad():
            return nn.functional.mse_loss(model(x), y).item()

    def train(steps=250, **options):
        model = copy.deepcopy(teacher)
        training = MaskTraining(model, "2:4", steps=steps, select=".", **options)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            training.step()
        training.finish()
        return loss(nt.sparsify_(model, "2:4", select="."))

    one_shot = loss(nt.sparsify_(copy.deepcopy(teacher), "2:4", select="."))
    fixed = train(frozen=1.0)
    assert fixed < 0.7 * one_shot
    assert train(decay=5e-2) < fixed
    assert train(fade=0.5) < one_shot


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
@pytest.mark.parametrize("pattern", ["2:4", "samoyeds:1:2:16"])
def test_experts_of_transformers(name, pattern):
    """In the layout that the model keeps, for every implementation of the experts, through copies; nothing lost."""
    model, ids = make(name), tokens()
    names = set(model.state_dict())
    training = MaskTraining(model, pattern, steps=4, decay=1e-2, refresh=1, frozen=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for implementation in ("eager", "grouped_mm", "batched_mm", "eager"):
        model.set_experts_implementation(implementation)
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        training.step()
    with torch.no_grad():
        want = model(ids).logits
        torch.testing.assert_close(copy.deepcopy(model)(ids).logits, want)
        training.finish()
        assert set(model.state_dict()) == names
        torch.testing.assert_close(model(ids).logits, want)
        nt.sparsify_(model, pattern)
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)


# torch's own tracer instantiates every autograd.Function, and warns that one should not.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_training():
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))
    training = MaskTraining(model, "2:4", steps=6, select=".", decay=1e-2, fade=0.3, refresh=2)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(4, 32)
    for _ in range(6):
        torch.testing.assert_close(compiled(x), model(x))
        training.step()
    assert training.frozen and len(graphs) == 1, "the schedule must not make it compile again"


def test_what_is_refused():
    layer = nn.Sequential(nn.Linear(32, 16))
    for options in ({"steps": 0}, {"refresh": 0}, {"frozen": 1.5}, {"fade": 0.8}, {"decay": -1}):
        with pytest.raises(NMSparseError, match="expected steps"):
            MaskTraining(layer, "2:4", **{"steps": 5, "select": "0", **options})
    with pytest.raises(NMSparseError, match="nothing dense"):
        MaskTraining(layer, "2:4", steps=5)
    MaskTraining(layer, "2:4", steps=5, select="0")
    with pytest.raises(NMSparseError, match="finish"):
        nt.sparsify_(layer, "2:4", select="0")
