"""The Triton layer of `bench moe`: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import importlib
import os
import sys

import numpy as np
import pytest

from nmsparse.bench.moe.cases import Case, Model, route
from nmsparse.bench.moe.weights import exact, random_weight, relative_error

torch = pytest.importorskip("torch", reason="Triton's kernels take its tensors")
ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    if "triton" in sys.modules:
        pytest.skip("Triton chooses its interpreter when it is first imported", allow_module_level=True)
    if tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip("Triton's interpreter makes numbers of arrays with an axis: NumPy < 2.4", allow_module_level=True)
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="the kernels are written in it")
triton_moe = importlib.import_module("nmsparse.bench.moe.triton_moe")

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # by the interpreter

DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE, LIMIT = (torch.bfloat16, 1e-2) if ON_GPU else (torch.float32, 1e-6)
MODELS = [Model("few", 6, 128, 256, 3), Model("many", 60, 64, 128, 4)]


def operands(model: Model, tokens: int):
    generator = torch.Generator(DEVICE).manual_seed(0)
    ids, weights = (torch.from_numpy(a).to(DEVICE) for a in route(Case(model, tokens, "skewed")))
    x = torch.randn(tokens, model.hidden, dtype=DTYPE, device=DEVICE, generator=generator)
    shapes = (
        (model.experts, 2 * model.intermediate, model.hidden),
        (model.experts, model.hidden, model.intermediate),
    )
    return x, ids, weights, *(random_weight(shape, "dense", DEVICE, DTYPE, generator) for shape in shapes)


@pytest.mark.parametrize("tokens", [1, 5, 40, 700], ids="T={}".format)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize("rows", [16, 64])
def test_schedule(model, tokens, rows):
    _, ids, _, gate_up, down = operands(model, tokens)
    schedule = triton_moe.TritonExperts(gate_up, down).schedule(ids, rows)
    pairs = ids.cpu().numpy().ravel()
    counts = np.bincount(pairs, minlength=model.experts)
    first = np.cumsum(counts) - counts
    blocks = [
        (e, first[e] + start, first[e] + counts[e]) for e in range(model.experts) for start in range(0, counts[e], rows)
    ]
    np.testing.assert_array_equal(schedule.order.cpu(), np.argsort(pairs, kind="stable"))
    assert int(schedule.num_blocks) == len(blocks) <= len(schedule.blocks)
    np.testing.assert_array_equal(schedule.blocks[: len(blocks)].cpu(), blocks)


@pytest.mark.parametrize("tokens", [1, 5, 40], ids="T={}".format)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize("rows", [16, 64])
def test_layer(model, tokens, rows):
    x, ids, weights, gate_up, down = operands(model, tokens)
    experts = triton_moe.TritonExperts(gate_up, down)
    for by_expert, persistent in ((True, False), (True, True), (tokens > 1, False)):
        tile = triton_moe.Tile(rows, 64, 64, 4, 3, 3, persistent)
        experts.plan = triton_moe.Plan(tile, tile, by_expert)
        got = experts(x, ids, weights)
        assert relative_error(got, exact(x, ids, weights, gate_up, down)) < LIMIT
        assert torch.equal(got, experts(x, ids, weights))


def test_tuning_keeps_the_quickest_that_fits(monkeypatch):
    x, ids, weights, gate_up, down = operands(MODELS[0], 40)
    experts = triton_moe.TritonExperts(gate_up, down)
    monkeypatch.setattr(triton_moe, "compile_all", lambda launches: None)
    timed = []

    def seconds(runs):
        constants = runs[0].constants
        timed.append(constants)
        return abs(constants["COLUMNS"] - 64) + abs(constants["ROWS"] - 32) + constants["num_stages"]

    plan = triton_moe.tune(experts, x, [ids], weights, seconds, limit=100)
    assert experts.plan == plan and plan.sorted
    assert plan.gate_up == triton_moe.Tile(32, 64, 128, 4, 3) and plan.down == triton_moe.Tile(32, 64, 128, 4, 4)
    assert {constants["ROWS"] for constants in timed} == {16, 32, 64}
    assert all(MODELS[0].intermediate % 128 == 0 or constants["COLUMNS"] < 128 for constants in timed)
    timed.clear()
    triton_moe.tune(experts, x, [ids], weights, seconds, limit=0)
    assert len(timed) == 2, "with no time left: one candidate for each product"
    assert not triton_moe.tune(experts, x[:1], [ids[:1]], weights[:1], seconds, limit=0).sorted
