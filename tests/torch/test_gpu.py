"""The bridge on a GPU: shared memory, results and gradients, compiled and captured calls."""

from __future__ import annotations

import copy

import pytest
import torch
from moe_models import MODELS, make, tokens
from torch import nn

import nmsparse.torch as nt
from nmsparse import formats
from nmsparse.formats import SparseArray
from nmsparse.torch import SparseExperts, SparseLinear, arrays
from nmsparse.torch.train import mask

pytestmark = pytest.mark.gpu

DTYPES = [torch.float16, torch.bfloat16]
PATTERNS = ["2:4", "samoyeds:1:2:128"]


def close(got, want, tolerance=2e-2):
    torch.testing.assert_close(got.float(), want.float(), rtol=tolerance, atol=tolerance * want.abs().max().item())


def experts_case(pattern, dtype, tokens=64, top_k=2):
    torch.manual_seed(0)
    gate_up, down = (torch.randn(s, device="cuda", dtype=dtype) / s[-1] ** 0.5 for s in ((8, 768, 256), (8, 256, 384)))
    layer = SparseExperts.from_dense(gate_up, down, pattern)
    x = torch.randn(tokens, 256, device="cuda", dtype=dtype)
    weights, ids = torch.rand(tokens, 8, device="cuda").topk(top_k)
    return layer, x, ids, weights


def dense_experts(layer, x, ids, weights):
    gate_up, down = layer.gate_up_proj.todense(), layer.down_proj.todense()
    y = torch.zeros(x.shape, device=x.device)
    for e in range(len(down)):
        token, slot = (ids == e).nonzero(as_tuple=True)
        gate, up = (x[token] @ gate_up[e].mT).chunk(2, -1)
        term = weights[token, slot, None] * ((nn.functional.silu(gate) * up) @ down[e].mT).float()
        y = y.index_add(0, token, term)
    return y.to(x.dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "vnm:64:2:8", "samoyeds:1:2:128"])
def test_buffers_are_shared(pattern, dtype):
    host = formats.random((2, 128, 256), pattern, rng=0).astype(
        nt.as_array(torch.ones(1, dtype=getattr(torch, dtype))).dtype
    )
    A = host.to_device("cuda")
    parts = A.to_torch()
    for name, buffer in A.buffers().items():
        assert parts[name].data_ptr() == buffer.pointer and str(parts[name].dtype) == f"torch.{buffer.dtype.name}"
    B = SparseArray.from_torch(parts, pattern, A.shape)
    parts["values"].mul_(2)
    torch.cuda.synchronize()
    assert (B.to_device("cpu").todense() == 2 * host.todense()).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", ["2:4", "vnm:64:2:8"])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(pattern, dtype, bias):
    torch.manual_seed(0)
    layer = SparseLinear.from_linear(nn.Linear(256, 512, bias=bias).to("cuda", dtype), pattern)
    dense = layer.weight.todense().detach().requires_grad_()
    for lead in ((3,), (64,), (2, 5)):
        x = torch.randn(*lead, 256, device="cuda", dtype=dtype, requires_grad=True)
        want = nn.functional.linear(x, dense, layer.bias)
        upstream = torch.randn_like(want)
        with torch.no_grad():
            close(layer(x), want)
        got = layer(x)
        close(got, want)
        leaves = [x, *([layer.bias] if bias else [])]
        grads = torch.autograd.grad(got, [*leaves, layer.weight.values], upstream)
        wanted = torch.autograd.grad(want, [*leaves, dense], upstream)
        for a, b in zip(grads[:-1], wanted[:-1], strict=True):
            close(a, b)
        w = layer.weight
        close(grads[-1], nt.decode.gather(wanted[-1], w.meta, w.indices, w.pattern))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("count", [1, 64, 700])
def test_experts(pattern, dtype, count):
    layer, x, ids, weights = experts_case(pattern, dtype, count)
    with torch.no_grad():
        close(layer(x, ids, weights), dense_experts(layer, x, ids, weights))
    x.requires_grad_()
    weights.requires_grad_()
    got, want = layer(x, ids, weights), dense_experts(layer, x, ids, weights)
    values = [layer.gate_up_proj.values, layer.down_proj.values]
    upstream = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(got, [x, weights, *values], upstream),
        torch.autograd.grad(want, [x, weights, *values], upstream),
        strict=True,
    ):
        close(a, b, 4e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_grouped_linear(pattern, dtype):
    layer, x, _, _ = experts_case(pattern, dtype)
    offsets = torch.tensor([0, 5, 5, 20, 21, 40, 64, 64], device="cuda", dtype=torch.int32)
    with torch.no_grad():
        got = nt.grouped_linear(x, layer.gate_up_proj, offsets)
        dense, first = layer.gate_up_proj.todense(), 0
        for e, end in enumerate(offsets.tolist()):
            close(got[first:end], x[first:end] @ dense[e].mT) if end > first else None
            first = end


@pytest.mark.parametrize("pattern", PATTERNS)
def test_graph_capture_and_streams(pattern):
    layer, x, ids, weights = experts_case(pattern, torch.bfloat16)
    linear = SparseLinear.from_linear(nn.Linear(256, 256, bias=False).to("cuda", torch.bfloat16), "2:4")

    def step():
        return layer(linear(x), ids, weights)

    with torch.no_grad():
        want = step().clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            assert torch.equal(step(), want)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        for _ in range(3):
            x.normal_()
            ids.copy_(torch.rand(64, 8, device="cuda").topk(2).indices)
            graph.replay()
            assert torch.equal(out, step())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_compiled(pattern):
    layer, x, ids, weights = experts_case(pattern, torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x, ids, weights), layer(x, ids, weights))
        known = len(arrays._entries)
        for _ in range(3):
            compiled(x, ids, weights)
        assert len(arrays._entries) == known, "a compiled call must find the packed weight"


def test_an_optimisers_step_is_seen():
    layer = SparseLinear.from_linear(nn.Linear(256, 128, bias=False).to("cuda", torch.bfloat16), "2:4")
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        y = layer(x)
        close(y, x @ layer.weight.todense().mT)
        y.float().square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("pattern", ["2:4", "vnm:64:2:8", "samoyeds:1:2:128"])
def test_masks(pattern):
    w = torch.randn(2, 128, 512)
    assert torch.equal(mask(w.cuda(), pattern).cpu(), mask(w, pattern))


@pytest.mark.parametrize("name", ["Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "DeepseekV2", "DeepseekV3", "GptOss"])
@pytest.mark.parametrize("pattern", ["2:4", "samoyeds:1:2:16"])
def test_models_of_transformers(name, pattern):
    assert name in MODELS
    model = nt.sparsify_(make(name, torch.bfloat16).cuda(), pattern)
    dense = nt.densify_(copy.deepcopy(model))
    dense.set_experts_implementation("eager")
    with torch.no_grad():
        close(model(tokens().cuda()).logits, dense(tokens().cuda()).logits, 6e-2)
