"""Compact experts: one packed copy, found by the ops. Packing needs a GPU; what finds it again does not."""

from __future__ import annotations

import copy

import pytest
import torch
from moe_models import make, tokens

import nmsparse.torch as nt
from nmsparse import NMSparseError
from nmsparse.torch import SparseExperts, arrays
from nmsparse.torch.compact import hold


def case(device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    layer = SparseExperts.from_dense(
        torch.randn(4, 256, 128, device=device, dtype=dtype),
        torch.randn(4, 128, 128, device=device, dtype=dtype) / 16,
        "samoyeds:1:2:128",
    )
    weights, ids = torch.rand(9, 4, device=device).topk(2)
    return layer, torch.randn(9, 128, device=device, dtype=dtype), ids, weights


@torch.no_grad()
def test_ops_find_what_stands_for_the_buffers():
    layer, *inputs = case()
    want = layer(*inputs)
    canonical = copy.deepcopy(layer)  # owns what the arrays below borrow
    experts = arrays.experts_of(canonical.gate_up_proj(), canonical.down_proj(), "silu")
    for weight, array, held in (
        (layer.gate_up_proj, experts.gate_up, {"silu": experts}),
        (layer.down_proj, experts.down, {}),
    ):
        hold(weight, torch.zeros(64, dtype=torch.uint8), array, held)
        assert weight.is_compact and weight.nbytes == 64 + weight.indices.nbytes
    assert torch.equal(layer(*inputs), want)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(*inputs), want)
    for forbidden in (layer.state_dict, layer.down_proj.todense, lambda: copy.deepcopy(layer)):
        with pytest.raises(NMSparseError, match="before compact_"):
            forbidden()
    layer.down_proj.values.data = layer.down_proj.values.data.clone()  # as if it had moved
    with pytest.raises(NMSparseError, match="before compact_"):
        layer(*inputs)


@torch.no_grad()
def test_on_the_host_nothing_happens():
    layer, *inputs = case()
    want = layer(*inputs)
    assert nt.compact_(layer) is layer and not layer.down_proj.is_compact
    assert torch.equal(layer(*inputs), want)
    with pytest.raises(NMSparseError, match="found no sparse experts"):
        nt.compact_(make("Mixtral"))
    model = nt.sparsify_(make("Mixtral"), "2:4")
    assert torch.equal(nt.compact_(model)(tokens()).logits, model(tokens()).logits)


@pytest.mark.gpu
@pytest.mark.parametrize("inference", [False, True])
def test_on_a_gpu_one_copy_is_left(inference):
    layer, *inputs = case("cuda", torch.bfloat16)
    stored = layer.gate_up_proj.nbytes + layer.down_proj.nbytes
    with torch.no_grad():
        want = layer(*inputs)
    with torch.inference_mode(inference), torch.no_grad():
        nt.compact_(layer)
        assert layer.gate_up_proj.is_compact and layer.down_proj.is_compact
        assert layer.gate_up_proj.nbytes + layer.down_proj.nbytes <= 1.1 * stored
        assert torch.equal(layer(*inputs), want)
        nt.forget()  # of canonical weights only
        assert torch.equal(layer(*inputs), want)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True)(*inputs), want)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(*inputs)
        inputs[0].normal_()
        graph.replay()
        assert torch.equal(out, layer(*inputs))
    assert nt.compact_(layer) is layer
    with pytest.raises(NMSparseError, match="before compact_"):
        layer.state_dict()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
@torch.no_grad()
def test_models_on_a_gpu(name):
    model = nt.sparsify_(make(name, torch.bfloat16).cuda(), "2:4")
    want = model(tokens().cuda()).logits
    assert torch.equal(nt.compact_(model)(tokens().cuda()).logits, want)
