"""Modules behave as modules: state, files, copies, casts, processes, memory that comes and goes."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import nmsparse
import nmsparse.torch as nt
from nmsparse import NMSparseError, formats
from nmsparse.torch import SparseExperts, SparseLinear, SparseWeight, arrays, densify_, sparsify_

PATTERNS = ["2:4", "1:4", "vnm:4:2:8", "samoyeds:1:2:16"]


def model(pattern, seed=0):
    torch.manual_seed(seed)
    experts = SparseExperts.from_dense(torch.randn(4, 48, 32), torch.randn(4, 32, 24), pattern)
    return nn.ModuleDict({"linear": SparseLinear.from_linear(nn.Linear(32, 32), pattern), "experts": experts})


@torch.no_grad()
def run(model):
    dtype = next(model.parameters()).dtype
    x = torch.linspace(-1, 1, 160, dtype=dtype).view(5, 32)
    ids = torch.tensor([[0, 1], [3, 2], [1, 2], [0, 3], [2, 0]])
    return model["experts"](model["linear"](x), ids, torch.full((5, 2), 0.5))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_files(tmp_path, pattern):
    """state_dict through safetensors, torch.save(weights_only=True), and our own reader and writer."""
    source, want = model(pattern), run(model(pattern))
    state = source.state_dict()
    assert all(type(tensor) is torch.Tensor for tensor in state.values())
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.pt")
    for loaded in (load_file(tmp_path / "a.safetensors"), torch.load(tmp_path / "a.pt", weights_only=True)):
        other = model(pattern, seed=1)
        assert not torch.equal(run(other), want)
        other.load_state_dict(loaded)
        assert torch.equal(run(other), want)
    gate_up = source["experts"].gate_up_proj
    nmsparse.save(tmp_path / "b.safetensors", {"experts.gate_up_proj": gate_up.array()})
    assert load_file(tmp_path / "b.safetensors").keys() == {k for k in state if k.startswith("experts.gate_up_proj")}
    again = SparseWeight.from_array(nmsparse.load(tmp_path / "b.safetensors")["experts.gate_up_proj"])
    assert torch.equal(again.todense(), gate_up.todense())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_copies_and_casts(pattern):
    source = model(pattern)
    want = run(source)
    for other in (copy.deepcopy(source), pickle.loads(pickle.dumps(source)), model(pattern).to("cpu")):
        assert torch.equal(run(other), want)
        with torch.no_grad():
            other["linear"].weight.values.mul_(2)
        assert torch.equal(run(source), want)
        assert not torch.equal(run(other), want)
    half = copy.deepcopy(source).half()
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    torch.testing.assert_close(run(half).float(), want, rtol=2e-2, atol=2e-2)
    double = copy.deepcopy(source).double()
    torch.testing.assert_close(run(double).float(), want, rtol=1e-5, atol=1e-5)
    empty = copy.deepcopy(source).to("meta").to_empty(device="cpu")
    empty.load_state_dict(source.state_dict())
    assert torch.equal(run(empty), want)


def _work(connection):
    layer = connection.recv()
    connection.send(run(layer).numpy())


def test_worker_processes():
    source = model("samoyeds:1:2:16")
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    worker = context.Process(target=_work, args=(there,))
    worker.start()
    here.send(source)
    try:
        assert here.poll(120)
        assert (here.recv() == run(source).numpy()).all()
    finally:
        worker.join(60)


def test_every_kind_of_change_is_seen():
    """What is remembered of a weight is never older than the weight."""
    layer = SparseLinear.from_linear(nn.Linear(32, 16, bias=False), "2:4")
    x = torch.randn(3, 32)

    def current():
        return x @ layer.weight.todense().detach().mT

    def check():
        with torch.no_grad():
            torch.testing.assert_close(layer(x), current())
            torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), current())

    check()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x).square().sum().backward()
    optimizer.step()
    check()
    layer.load_state_dict(SparseLinear.from_linear(nn.Linear(32, 16, bias=False), "2:4").state_dict())
    check()
    layer.weight.values.data = torch.randn_like(layer.weight.values)
    check()
    layer.weight = SparseWeight.from_dense(torch.randn(16, 32), "2:4")
    check()
    with torch.inference_mode():
        layer.weight = SparseWeight.from_dense(torch.randn(16, 32), "2:4")
        torch.testing.assert_close(layer(x), current())
        layer.weight.values.mul_(3)
        torch.testing.assert_close(layer(x), current())


def test_nothing_keeps_a_dead_weight_alive():
    arrays.forget()
    for _ in range(5):
        run(model("2:4"))
        gc.collect()
    alive = model("2:4")
    run(alive)
    assert len(arrays._entries) == 3


def test_weights_by_hand():
    """A buffer that is a slice of a known one, in another shape, is another weight."""
    whole = formats.random((32, 64), "2:4", rng=0)
    weight = SparseWeight.from_array(whole)
    x = torch.randn(2, 64)
    with torch.no_grad():
        y = nt.linear(x, weight)
        half = SparseWeight("2:4", (16, 64), device="meta")
        half.values, half.meta = nn.Parameter(weight.values[:16]), weight.meta[:16]
        assert half.values.data_ptr() == weight.values.data_ptr()
        torch.testing.assert_close(nt.linear(x, half), y[:, :16])


def test_sparsify_and_densify_linear_layers():
    dense = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Sequential(nn.Linear(32, 16, bias=False)))
    x = torch.randn(4, 64)
    sparse = sparsify_(copy.deepcopy(dense), "2:4", select=lambda name, module: True)
    assert isinstance(sparse[0], SparseLinear) and isinstance(sparse[2][0], SparseLinear)
    assert sparse[0].bias is not None and sparse[2][0].bias is None
    want = nn.Sequential(*copy.deepcopy(dense))
    with torch.no_grad():
        for layer in (want[0], want[2][0]):
            layer.weight.copy_(torch.from_numpy(nmsparse.array(layer.weight.numpy(), "2:4").todense()))
        torch.testing.assert_close(sparse(x), want(x))
        back = densify_(copy.deepcopy(sparse))
        torch.testing.assert_close(back(x), want(x), rtol=0, atol=0)
    assert back.state_dict().keys() == dense.state_dict().keys()
    for case, select in ((dense, "9"), (nn.ReLU(), None), (dense, lambda name, module: False)):
        with pytest.raises(NMSparseError, match="found no"):
            sparsify_(case, "2:4", select)
    with pytest.raises(NMSparseError, match="in place"):
        sparsify_(nn.Linear(4, 4), "2:4", select="")
    with pytest.raises(NMSparseError, match="activation"):
        SparseExperts(SparseWeight("2:4", (1, 4, 4)), SparseWeight("2:4", (1, 4, 4)), "tanh")


def test_options_of_from_dense():
    w = torch.randn(8, 32)
    assert torch.equal(SparseWeight.from_dense(w, "2:4", scores=-w.abs()).todense() != 0, w != 0) is False
    pruned = SparseWeight.from_dense(w, "2:4").todense()
    assert torch.equal(SparseWeight.from_dense(pruned, "2:4", strict=True).todense(), pruned)
    with pytest.raises(NMSparseError, match="strict"):
        SparseWeight.from_dense(w, "2:4", strict=True)
