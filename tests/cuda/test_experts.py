"""Experts of an MoE layer on a GPU: against float64, with any routing, from no tokens up, in graphs; bad operands."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import nmsparse
from nmsparse import NMSparseError, reference
from nmsparse.cuda.experts import active_experts, tile_of
from nmsparse.moe import SparseExperts
from nmsparse.prune.experts import route_2t, sub_routing

PATTERNS = ["2:4", "samoyeds:1:2:128", "samoyeds:1:2:64", "dense", "vnm:64:2:8", "samoyeds:1:2:32"]


def layer(torch, pattern, experts=6, hidden=264, width=200, gated=True, activation="silu", dtype="bfloat16", down=None):
    """Experts on the GPU, and their dense weights in float64."""
    kind, made, exact = getattr(torch, dtype), [], []
    for shape, chosen in (
        ((experts, width * (1 + gated), hidden), pattern),
        ((experts, hidden, width), down or pattern),
    ):
        w = torch.randn(shape, device="cuda", dtype=kind) * shape[-1] ** -0.5
        held = w if chosen == "dense" else nmsparse.array(w, chosen)
        made.append(held)
        dense = w if chosen == "dense" else held.to_device("cpu").todense()
        exact.append(dense.double().cpu().numpy() if chosen == "dense" else dense.astype(np.float64))
    return SparseExperts(*made, activation), exact


def routing(torch, tokens, top_k, experts, skewed=False):
    scores = torch.rand(tokens, experts, device="cuda")
    if skewed:
        scores[:, : experts // 2] += 1
    return scores.topk(top_k, -1).indices, torch.rand(tokens, top_k, device="cuda")


def check(torch, experts, exact, tokens, ids, weights, dtype=None):
    x = torch.randn(tokens, experts.hidden_size, device="cuda").to(dtype or torch.bfloat16)
    y = experts(x, ids, weights)
    assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
    given = x.double().cpu().numpy(), ids.cpu().numpy(), weights.double().cpu().numpy()
    want = reference.moe(*given, *exact, experts.activation)
    got = y.double().cpu().numpy()
    assert np.linalg.norm(got - want) <= 0.02 * np.linalg.norm(want) + 1e-6
    assert torch.equal(y, experts(x, ids, weights)), "another run gave other bits"


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 40, 333])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_gpu_any_number_of_tokens(torch, pattern, tokens):
    experts, exact = layer(torch, pattern)
    check(torch, experts, exact, tokens, *routing(torch, tokens, 3, 6, skewed=tokens % 2 == 1))


# On the twin each kernel has all of them; here one each, for a kernel is compiled for every combination.
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("pattern", "activation", "gated", "dtype"),
    [
        ("samoyeds:1:2:128", "gelu", True, "float16"),
        ("2:4", "relu2", False, "bfloat16"),
        ("dense", "gelu_tanh", True, "float16"),
        ("samoyeds:1:2:128", "identity", False, "float16"),
    ],
)
def test_gpu_activations(torch, pattern, activation, gated, dtype):
    experts, exact = layer(torch, pattern, gated=gated, activation=activation, dtype=dtype)
    check(torch, experts, exact, 70, *routing(torch, 70, 2, 6), dtype=getattr(torch, dtype))


@pytest.mark.gpu
def test_gpu_projections_may_differ(torch):
    for pattern, down in (("samoyeds:1:2:128", "2:4"), ("2:4", "dense"), ("dense", "samoyeds:1:2:64")):
        experts, exact = layer(torch, pattern, down=down)
        check(torch, experts, exact, 50, *routing(torch, 50, 2, 6))


@pytest.mark.gpu
@pytest.mark.parametrize("top_k", [1, 2, 5, 6])
def test_gpu_any_number_of_choices(torch, top_k):
    experts, exact = layer(torch, "samoyeds:1:2:128")
    check(torch, experts, exact, 100, *routing(torch, 100, top_k, 6))


@pytest.mark.gpu
def test_gpu_all_tokens_to_one_expert(torch):
    experts, exact = layer(torch, "samoyeds:1:2:128")
    for tokens in (1, 130, 700):
        ids = torch.full((tokens, 1), 4, device="cuda")
        check(torch, experts, exact, tokens, ids, torch.rand(tokens, 1, device="cuda"))


@pytest.mark.gpu
def test_gpu_no_tokens(torch):
    experts, _ = layer(torch, "2:4")
    y = experts(torch.empty(0, 264, device="cuda", dtype=torch.bfloat16), *routing(torch, 0, 2, 6))
    assert y.shape == (0, 264)


@pytest.mark.gpu
def test_gpu_ids_outside_are_left_out(torch):
    experts, _ = layer(torch, "2:4")
    ids, weights = routing(torch, 60, 2, 6)
    x = torch.randn(60, 264, device="cuda", dtype=torch.bfloat16)
    some = torch.rand(60, 2, device="cuda") < 0.3
    left = experts(x, ids.masked_fill(some, -1), weights)
    assert torch.equal(left, experts(x, ids, weights.masked_fill(some, 0.0))) or torch.allclose(
        left.float(), experts(x, ids, weights.masked_fill(some, 0.0)).float(), atol=1e-2
    )


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [5, 130])
@pytest.mark.parametrize("pattern", ["2:4", "samoyeds:1:2:64"])
def test_gpu_2t_drop(torch, pattern, tokens):
    """Experts in halves: by its weight a token takes both, the first or none, and the host never waits."""
    experts, exact = layer(torch, pattern, experts=12, width=64)  # halves of 6 experts, interleaved
    ids, weights = routing(torch, tokens, 3, 6)
    dual = route_2t(ids, weights, 0.2, 0.4)
    assert all(t.is_cuda for t in dual)
    for mine, want in zip(dual, route_2t(ids.cpu().numpy(), weights.cpu().numpy(), 0.2, 0.4), strict=True):
        np.testing.assert_array_equal(mine.cpu().numpy(), want, strict=True)
    check(torch, experts, exact, tokens, *dual)
    x = torch.randn(tokens, 264, device="cuda", dtype=torch.bfloat16)
    everything = experts(x, *route_2t(ids, weights, 0.0, 0.0))
    assert torch.equal(everything, experts(x, *sub_routing(ids, weights, 2)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            experts(x, *route_2t(ids, weights, 0.2, 0.4))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("ids_dtype", ["int32", "int64"])
@pytest.mark.parametrize("weights_dtype", ["float32", "bfloat16", "float16"])
def test_gpu_dtypes_of_a_routing(torch, ids_dtype, weights_dtype):
    experts, exact = layer(torch, "samoyeds:1:2:128")
    ids, weights = routing(torch, 33, 2, 6)
    check(torch, experts, exact, 33, ids.to(getattr(torch, ids_dtype)), weights.to(getattr(torch, weights_dtype)))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [4, 300])
def test_gpu_graph_follows_the_routing(torch, tokens):
    """A captured call is replayed with other tokens and another routing, beside calls outside the graph."""
    experts, _ = layer(torch, "samoyeds:1:2:128")
    x = torch.randn(tokens, 264, device="cuda", dtype=torch.bfloat16)
    ids, weights = routing(torch, tokens, 2, 6)
    experts(x, ids, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = experts(x, ids, weights)
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn_like(x))
        for mine, new in zip((ids, weights), routing(torch, tokens, 2, 6, skewed=seed == 2), strict=True):
            mine.copy_(new)
        graph.replay()
        assert torch.equal(y, experts(x, ids, weights))


@pytest.mark.gpu
def test_gpu_never_waits(torch):
    experts, _ = layer(torch, "2:4")
    x = torch.randn(50, 264, device="cuda", dtype=torch.bfloat16)
    given = routing(torch, 50, 2, 6)
    experts(x, *given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            experts(x, *given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        experts(x, *given)
        torch.cuda.synchronize()
    assert sum(event.count for event in profile.key_averages() if event.self_device_time_total) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["2:4", "samoyeds:1:2:128"])
def test_gpu_grouped_matmul(torch, pattern):
    w = nmsparse.array(torch.randn(5, 200, 264, device="cuda", dtype=torch.bfloat16), pattern)
    dense = torch.from_numpy(w.to_device("cpu").todense().astype(np.float64)).cuda()
    for counts in ([0, 7, 0, 130, 3], [1, 0, 0, 0, 0], [300, 200, 100, 50, 25]):
        ends = torch.tensor(np.cumsum(counts), device="cuda", dtype=torch.int32)
        x = torch.randn(sum(counts), 264, device="cuda", dtype=torch.bfloat16)
        y = nmsparse.grouped_matmul(x, w, ends)
        want = torch.cat([rows.double() @ dense[e].T for e, rows in enumerate(x.split(counts))])
        assert (y.double() - want).norm() <= 0.01 * want.norm()


@pytest.mark.gpu
def test_gpu_bad_operands(torch):
    experts, _ = layer(torch, "2:4")
    x = torch.randn(5, 264, device="cuda", dtype=torch.bfloat16)
    ids, weights = routing(torch, 5, 2, 6)
    for bad in ((x.half(), ids, weights), (x[:, :200], ids, weights), (x, ids[:4], weights), (x, ids.float(), weights),
                (x, ids, weights[:, :1]), (x, ids.t().contiguous().t(), weights)):  # fmt: skip
        with pytest.raises(NMSparseError):
            experts(*bad)
    with pytest.raises(nmsparse.UnsupportedDeviceError):
        experts(x.cpu(), ids, weights)


@pytest.mark.gpu
@pytest.mark.parametrize("model", [(8, 14336, 4096, 2), (60, 1408, 2048, 4), (64, 1024, 2048, 8), (128, 768, 2048, 8)])
def test_gpu_published_shapes(torch, model):
    """Some tokens of layers of their real size, against float64 on the GPU."""
    experts_, width, hidden, top_k = model
    w = torch.randn(experts_, 2 * width, hidden, device="cuda", dtype=torch.bfloat16) * hidden**-0.5
    d = torch.randn(experts_, hidden, width, device="cuda", dtype=torch.bfloat16) * width**-0.5
    gate_up, down = nmsparse.array(w, "2:4"), nmsparse.array(d, "2:4")
    dense = [torch.from_dlpack(a.todense()) for a in (gate_up, down)]
    experts = SparseExperts(gate_up, down)
    for tokens, skewed in ((1, False), (64, True), (1024, False), (2048, True)):
        x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
        ids, weights = routing(torch, tokens, top_k, experts_, skewed)
        y = experts(x, ids, weights)
        for t in {0, tokens // 2, tokens - 1}:
            want = 0
            for e, weight in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
                gate, up = (dense[0][e].double() @ x[t].double()).chunk(2)
                want = want + weight * (dense[1][e].double() @ (torch.nn.functional.silu(gate) * up))
            assert (y[t].double() - want).norm() <= 0.02 * want.norm()


def test_tiles_hold_what_experts_usually_get():
    for tokens in (1, 7, 64, 500, 4096):
        for top_k, experts in ((2, 8), (8, 64), (1, 512), (8, 8)):
            mean = tokens * top_k / active_experts(tokens, top_k, experts)
            for kind in ("samoyeds", "2:4", "dense"):
                tile = tile_of(tokens, top_k, experts, kind)
                assert tile in (8, 16, 32, 64, 96, 128, 160, 192, 256)
                assert tile >= min(mean, 128)
