"""Routers and whole MoE layers on a GPU: launches counted on an emulated one, results against NumPy on both."""

from __future__ import annotations

import types
import warnings
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

import nmsparse
from nmsparse import NMSparseError, UnsupportedDeviceError
from nmsparse.cuda import array, experts, launch
from nmsparse.cuda.array import DeviceArray, from_host
from nmsparse.cuda.config_route import CombineConfig, DispatchConfig, RouteConfig
from nmsparse.moe import MoELayer, Router, SparseExperts, route

# Experts, config, and whether there is a bias, a shared expert, a gate of it: small layers of the published kinds.
DEEPSEEK_V2 = {"model_type": "deepseek_v2", "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
DEEPSEEK_V3 = {"model_type": "deepseek_v3", "n_group": 4, "topk_group": 2}
MODELS = {
    "mixtral": (8, {"model_type": "mixtral", "num_experts_per_tok": 2}, ""),
    "qwen2-moe": (60, {"model_type": "qwen2_moe", "num_experts_per_tok": 4}, "shared gate"),
    "qwen3-moe": (128, {"model_type": "qwen3_moe", "num_experts_per_tok": 8, "norm_topk_prob": True}, ""),
    "olmoe": (64, {"model_type": "olmoe", "num_experts_per_tok": 8}, ""),
    "deepseek-v2": (64, {**DEEPSEEK_V2, "num_experts_per_tok": 6, "routed_scaling_factor": 16.0}, "shared"),
    "deepseek-v3": (32, {**DEEPSEEK_V3, "num_experts_per_tok": 8}, "bias shared"),
}
HIDDEN, WIDTH = 72, 40
BF16 = np.dtype(ml_dtypes.bfloat16)


def parts(model, dtype=BF16, pattern=None, hidden=HIDDEN, width=WIDTH, seed=0):
    """Of a layer on the host: the arguments of MoELayer, experts of ``pattern`` or dense."""
    experts, config, has = MODELS[model]
    rng = np.random.default_rng(seed)

    def weight(*shape):
        return (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(dtype)

    def feed_forward(number):
        dense = weight(number, 2 * width, hidden), weight(number, hidden, width)
        return SparseExperts(*(nmsparse.array(w, pattern) if pattern else w for w in dense))

    found = {
        "router_weight": rng.standard_normal((experts, hidden)).astype(dtype),
        "experts": feed_forward(experts),
        "router": Router.from_config(config),
    }
    if "bias" in has:
        found["bias"] = rng.standard_normal(experts).astype(np.float32) / 4
    if "shared" in has:
        found["shared"] = feed_forward(1)
    if "gate" in has:
        found["shared_gate"] = rng.standard_normal(hidden).astype(dtype) / 8
    return found


def there(experts):
    """The same experts on the GPU."""

    def move(weight):
        return from_host(weight) if isinstance(weight, np.ndarray) else weight.to_device("cuda:0")

    return SparseExperts(move(experts.gate_up), move(experts.down), experts.activation)


def on_gpu(parts):
    return MoELayer(**{name: there(part) if isinstance(part, SparseExperts) else part for name, part in parts.items()})


def tokens_of(number, dtype=BF16, hidden=HIDDEN, seed=1):
    return np.random.default_rng(seed).standard_normal((number, hidden)).astype(dtype)


def close(got, want, tolerance=0.02):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


# --- on the emulated GPU: every line of the host, the texts of routing and combining ---------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16], ids=["f32", "f16", "bf16"])
@pytest.mark.parametrize("model", MODELS)
def test_a_router_on_the_gpu_is_the_router(launched, model, dtype):
    experts, config, has = MODELS[model]
    router = Router.from_config(config)
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((9, experts)).astype(dtype)
    bias = rng.standard_normal(experts).astype(np.float32) if "bias" in has else None
    ids, weights = router(from_host(logits), None if bias is None else from_host(bias))
    assert all(isinstance(result, DeviceArray) for result in (ids, weights))
    assert (ids.dtype, weights.dtype) == (np.int32, np.float32)
    want_ids, want_weights = router(logits, bias)
    np.testing.assert_array_equal(ids.numpy(), want_ids)
    np.testing.assert_allclose(weights.numpy(), want_weights, rtol=1e-6)
    assert [type(config) for config in launched] == [RouteConfig]


def test_route_on_the_gpu_takes_its_options(launched):
    logits = np.random.default_rng(0).standard_normal((5, 12)).astype(np.float32)
    options = {"scoring": "sigmoid", "renormalize": True, "num_groups": 3, "topk_groups": 2, "scale": 1.5}
    for got, want in zip(route(from_host(logits), 3, **options), route(logits, 3, **options), strict=True):
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-6)
    assert [result.shape for result in route(from_host(logits[:0]), 3)] == [(0, 3), (0, 3)]


@pytest.mark.parametrize("model", MODELS)
def test_a_layer_on_the_gpu_is_the_layer(launched, model):
    made, x = parts(model), tokens_of(11)
    here, layer = MoELayer(**made), on_gpu(made)
    y = layer(from_host(x))
    assert isinstance(y, DeviceArray) and (y.shape, y.dtype) == (x.shape, BF16)
    close(y.numpy(), here(x))
    sets = 2 if "shared" in made else 1
    assert [isinstance(config, RouteConfig) for config in launched] == [True, False, False, False] * sets
    last = [config for config in launched if isinstance(config, CombineConfig)]
    assert [config.base for config in last] == [False, True][-sets:] if sets == 2 else [False]
    for got, want in zip(layer.route(from_host(x)), here.route(x), strict=True):
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-5)


@pytest.mark.parametrize("tokens", [0, 1, 4, 40])
@pytest.mark.parametrize("pattern", ["2:4", "samoyeds:1:2:64"])
def test_sparse_layers_of_any_number_of_tokens(launched, pattern, tokens):
    made, x = parts("deepseek-v3", pattern=pattern), tokens_of(tokens)
    close(on_gpu(made)(from_host(x)).numpy(), MoELayer(**made)(x))


def test_leading_axes(launched):
    made, x = parts("qwen2-moe"), tokens_of(6)
    layer = on_gpu(made)
    np.testing.assert_array_equal(
        layer(from_host(x.reshape(2, 3, HIDDEN))).numpy(), layer(from_host(x)).numpy().reshape(2, 3, HIDDEN)
    )
    close(layer(from_host(x[0])).numpy(), layer(from_host(x)).numpy()[0])


def test_wide_experts_copy_their_tokens_when_they_route(launched, monkeypatch):
    """Few experts and many tokens: the launch that routes also copies the tokens into order."""
    monkeypatch.setitem(experts.MANY, "samoyeds", 100)
    made, x = parts("mixtral", pattern="samoyeds:1:2:64", hidden=16, width=2048), tokens_of(420, hidden=16)
    made["router"] = Router(4, renormalize=True)
    close(on_gpu(made)(from_host(x)).numpy(), MoELayer(**made)(x))
    assert launched[0].copies and not launched[1].gather


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a", "sm_120"])
def test_launches_overlap_where_they_can(launched, monkeypatch, arch):
    monkeypatch.setattr(launch, "model_of", lambda device: replace(launch.H200, arch=arch))
    on_gpu(parts("mixtral", pattern="2:4"))(from_host(tokens_of(1)))
    assert [config.overlaps for config in launched] == 4 * [arch in ("sm_90a", "sm_120")]


KINDS = ["2:4", "dense", "samoyeds:1:2:64", "drop", "2:4", "dense", "drop", "2:4"]


def mixed(dtype=BF16, hidden=HIDDEN, width=WIDTH, kinds=KINDS):
    """Experts of ``kinds``."""
    rng, made = np.random.default_rng(0), []
    for shape in ((2 * width, hidden), (hidden, width)):
        dense = [(rng.standard_normal(shape) * shape[1] ** -0.5).astype(dtype) for _ in kinds]
        rare = {"drop": lambda w: None, "dense": lambda w: w}
        made.append(
            [
                rare.get(kind, lambda w, kind=kind: nmsparse.array(w, kind))(w)
                for kind, w in zip(kinds, dense, strict=True)
            ]
        )
    return SparseExperts(*made)


@pytest.mark.parametrize("tokens", [0, 1, 5, 60])
def test_experts_of_several_patterns(launched, tokens):
    """One sort and one sum, and two products for each of the three kinds."""
    here, rng = mixed(), np.random.default_rng(tokens)
    experts, x = there(here), tokens_of(tokens)
    logits = rng.standard_normal((tokens, len(KINDS))).astype(np.float32)
    ids, weights = Router(4)(logits)
    close(experts(*map(from_host, (x, ids, weights))).numpy(), here(x, ids, weights))
    y = experts.from_logits(from_host(x), from_host(logits), Router(4))
    close(y.numpy(), here(x, ids, weights))
    assert len(launched) == (2 * (2 + 2 * 3) if tokens else 0)
    assert all(config.part for config in launched if hasattr(config, "part"))


def test_wide_experts_of_several_patterns_copy_their_tokens(launched, monkeypatch):
    monkeypatch.setitem(experts.MANY, "samoyeds", 100)
    here, x = mixed(hidden=16, width=2048), tokens_of(210, hidden=16)
    logits = np.random.default_rng(0).standard_normal((210, len(KINDS))).astype(np.float32)
    y = there(here).from_logits(from_host(x), from_host(logits), Router(4))
    close(y.numpy(), here.from_logits(x, logits, Router(4)))
    assert launched[0].copies and launched[0].kept == 6


def test_a_layer_of_experts_of_several_patterns(launched):
    made = {**parts("mixtral"), "experts": mixed()}
    x = tokens_of(30)
    close(on_gpu(made)(from_host(x)).numpy(), MoELayer(**made)(x))


def test_dropped_experts_of_one_pattern(launched):
    kinds = ["2:4", "drop", "2:4"]
    here, x = mixed(kinds=kinds), tokens_of(9)
    routing = np.tile([0, 1], (9, 1)), np.full((9, 2), 0.5, np.float32)
    experts = there(here)
    close(experts(*map(from_host, (x, *routing))).numpy(), here(x, *routing))
    assert len(launched) == 4
    experts.compact()
    assert "2 x 2:4, 1 x drop, bfloat16" in repr(experts)
    close(experts(*map(from_host, (x, *routing))).numpy(), here(x, *routing))


def test_projections_mixed_apart_are_refused_on_a_gpu(launched):
    here, other = mixed(), mixed(kinds=KINDS[::-1])
    with pytest.raises(NMSparseError, match="let an expert have one pattern"):
        SparseExperts(here.gate_up.to_device("cuda"), other.down.to_device("cuda"))


def test_experts_from_logits_or_from_what_they_say(launched):
    made, x = parts("deepseek-v3"), tokens_of(9)
    here, experts = made["experts"], there(made["experts"])
    logits = np.random.default_rng(0).standard_normal((9, 32)).astype(BF16)
    given = made["router"], made["bias"]
    y = experts.from_logits(from_host(x), from_host(logits), given[0], from_host(given[1]))
    close(y.numpy(), here.from_logits(x, logits, *given))
    again = experts(from_host(x), *map(from_host, given[0](logits, given[1])))
    close(again.numpy(), y.numpy(), 1e-3)
    assert [type(config) for config in launched[::4]] == [RouteConfig, DispatchConfig]
    np.testing.assert_array_equal(here.from_logits(x, logits, *given), here(x, *given[0](logits, given[1])))


def test_parts_may_be_on_either_side(launched):
    made, x = parts("qwen2-moe"), from_host(tokens_of(5))
    moved = {name: from_host(part) if isinstance(part, np.ndarray) else part for name, part in made.items()}
    np.testing.assert_array_equal(on_gpu(moved)(x).numpy(), on_gpu(made)(x).numpy())
    assert (made["experts"].device, on_gpu(made).experts.device) == ("cpu", "cuda:0")


def test_what_does_not_fit_is_refused(launched):
    made, x = parts("qwen2-moe"), tokens_of(5)
    layer, router = on_gpu(made), made["router"]
    logits, bias = np.zeros((5, 60), np.float32), np.zeros(60, np.float32)
    with pytest.raises(UnsupportedDeviceError, match="in one place, got cuda:0 and cpu"):
        MoELayer(**{**made, "experts": there(made["experts"])})
    for bad in (x.astype(np.float32), x[:, :64].copy()):
        with pytest.raises(NMSparseError, match="expected x as bfloat16"):
            layer(from_host(bad))
    with pytest.raises(UnsupportedDeviceError):
        layer(x)
    with pytest.raises(NMSparseError, match=r"logits: expected shape \(tokens, experts\)"):
        router(from_host(bias))
    with pytest.raises(NMSparseError, match="logits: expected float32 or float16"):
        router(from_host(logits.astype(np.float64)))
    with pytest.raises(NMSparseError, match="top_k: expected at most the number of experts, 3"):
        router(from_host(logits[:, :3].copy()))
    with pytest.raises(NMSparseError, match="bias: expected float32"):
        router(from_host(logits), from_host(bias[:5]))
    with pytest.raises(UnsupportedDeviceError):
        router(from_host(logits), bias)
    with pytest.raises(NMSparseError, match=r"logits: expected float32 .*\[5, 60\]"):
        layer.experts.from_logits(from_host(x), from_host(logits[:4]), router)


def test_a_library_without_a_product_is_told(launched, monkeypatch):
    kind = array.kind_of(from_host(np.zeros(1)))
    monkeypatch.setitem(array._kinds, DeviceArray, kind._replace(linear=array._no_product))
    with pytest.raises(UnsupportedDeviceError, match="call from_logits"):
        on_gpu(parts("mixtral"))(from_host(tokens_of(2)))


def test_the_product_of_torch_is_float32(launched, monkeypatch):
    """Exports say that the memory is the host's, which here it is, so that torch's CPU build can take it."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(DeviceArray, "__dlpack_device__", lambda self: (1, 0))
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((5, 64), np.float32), torch.randn(2, 3, 64).bfloat16()
    logits = array._torch_kind(torch).linear(from_host(weight))(x)
    assert (logits.shape, logits.dtype) == ((2, 3, 5), torch.float32)
    np.testing.assert_allclose(logits.numpy(), x.float().numpy() @ weight.T, rtol=1e-5, atol=1e-5)


def test_the_product_of_cupy_is_float32(launched, monkeypatch):
    """Of an array like cupy's, which NumPy's is."""
    weight, x = np.eye(5, 64, dtype=np.float32), np.ones((3, 64), np.float16)
    cupy = types.SimpleNamespace(asarray=lambda a: a.numpy())
    logits = array._cupy_kind(cupy).linear(from_host(weight))(x)
    assert (logits.shape, logits.dtype) == ((3, 5), np.float32) and (logits == 1).all()


# --- on a GPU --------------------------------------------------------------------------------------------------------


def cuda(torch, values):
    """A NumPy array as a tensor on the GPU."""
    return torch.from_dlpack(from_host(values)).clone()


def host(tensor):
    """A tensor as float64 on the host."""
    return tensor.double().cpu().numpy()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [0, 1, 7, 64, 1000])
@pytest.mark.parametrize("model", MODELS)
def test_gpu_router(torch, model, tokens):
    experts, config, has = MODELS[model]
    router, rng = Router.from_config(config), np.random.default_rng(tokens)
    logits = rng.standard_normal((tokens, experts)).astype(np.float32)
    bias = rng.standard_normal(experts).astype(np.float32) if "bias" in has else None
    given = cuda(torch, logits) if tokens else torch.empty(0, experts, device="cuda")
    operands = given, None if bias is None else cuda(torch, bias)
    ids, weights = router(*operands)
    assert (ids.dtype, weights.dtype, ids.device) == (torch.int32, torch.float32, given.device)
    want_ids, want_weights = router(logits, bias)
    assert ids.shape == weights.shape == want_ids.shape
    # Scores that agree but for the last bits may change places.
    assert (ids.cpu().numpy() == want_ids).mean() > 0.99 if tokens else True
    np.testing.assert_allclose(weights.cpu().numpy(), want_weights, rtol=1e-5, atol=1e-7)
    for first, second in zip((ids, weights), router(*operands), strict=True):
        assert torch.equal(first, second), "another run gave other bits"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_gpu_router_of_any_dtype_and_library(torch, dtype):
    logits = torch.randn(33, 40, device="cuda").to(getattr(torch, dtype))
    ids, weights = route(logits[:, :32], 4, renormalize=True)  # rows at a pitch
    want_ids, want_weights = route(logits[:, :32].float().cpu().numpy(), 4, renormalize=True)
    assert (ids.cpu().numpy() == want_ids).mean() > 0.97
    np.testing.assert_allclose(weights.cpu().numpy(), want_weights, rtol=1e-5, atol=1e-7)
    mine = route(from_host(np.eye(8, dtype=np.float32)), 1)[0]
    assert isinstance(mine, DeviceArray) and mine.numpy().ravel().tolist() == list(range(8))
    with torch.cuda.stream(torch.cuda.Stream()):
        assert torch.equal(route(logits, 4)[0], route(logits.clone(), 4)[0])


@pytest.mark.gpu
def test_gpu_a_nan_stays_with_its_token(torch):
    logits = torch.randn(50, 16, device="cuda")
    want = route(logits, 2)
    logits[7, 3] = torch.nan
    ids, weights = route(logits, 2)
    others = torch.arange(50, device="cuda") != 7
    assert weights[7].isnan().all() and ((ids >= 0) & (ids < 16)).all()
    assert torch.equal(ids[others], want[0][others]) and torch.equal(weights[others], want[1][others])


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", [None, "2:4", "samoyeds:1:2:64"])
@pytest.mark.parametrize("model", MODELS)
def test_gpu_layer(torch, model, pattern):
    made = parts(model, pattern=pattern, hidden=256, width=192)
    here, layer = MoELayer(**made), on_gpu(made)
    for tokens in (1, 9, 130):
        x = tokens_of(tokens, hidden=256, seed=tokens)
        given = cuda(torch, x)
        y = layer(given)
        assert (y.shape, y.dtype, y.device) == (given.shape, given.dtype, given.device)
        close(host(y), here(x.astype(np.float32)))
        assert torch.equal(y, layer(given)), "another run gave other bits"
        ids, weights = layer.route(given)
        want_ids, want_weights = here.route(x)
        np.testing.assert_allclose(weights.cpu().numpy(), want_weights, rtol=1e-3, atol=1e-5)
        assert (ids.cpu().numpy() == want_ids).mean() > 0.99
    assert layer(given[:0]).shape == (0, 256)
    assert torch.equal(layer(given.view(2, 65, 256)), y.view(2, 65, 256))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [192, 2048])
@pytest.mark.parametrize("tokens", [1, 6, 130, 2000])
def test_gpu_experts_of_several_patterns(torch, tokens, width):
    here = mixed(hidden=256, width=width)
    experts, x = there(here), tokens_of(tokens, hidden=256)
    logits = np.random.default_rng(tokens).standard_normal((tokens, len(KINDS))).astype(np.float32)
    ids, weights = Router(4)(logits)
    given = cuda(torch, x), cuda(torch, ids), cuda(torch, weights)
    y = experts(*given)
    close(host(y), here(x.astype(np.float32), ids, weights))
    assert torch.equal(y, experts(*given)), "another run gave other bits"
    close(host(experts.from_logits(given[0], cuda(torch, logits), Router(4))), host(y), 1e-3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = experts(*given)
    given[1].copy_(given[1].flip(0))
    graph.replay()
    assert torch.equal(captured, experts(*given))
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        experts(*given)
        torch.cuda.synchronize()
    assert sum(event.count for event in profile.key_averages() if event.self_device_time_total) == 2 + 2 * 3


@pytest.mark.gpu
def test_gpu_tokens_copied_by_the_launch_that_routes(torch):
    made = parts("mixtral", pattern="2:4", hidden=256, width=2048)
    x = tokens_of(2000, hidden=256)
    close(host(on_gpu(made)(cuda(torch, x))), MoELayer(**made)(x.astype(np.float32)))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [4, 300])
@pytest.mark.parametrize("model", ["mixtral", "qwen2-moe", "deepseek-v3"])
def test_gpu_graph_follows_the_logits(torch, model, tokens):
    """Captured once; replayed with other tokens and logits, beside calls outside the graph."""
    made = parts(model, pattern="samoyeds:1:2:64", hidden=256, width=192)
    layer, router = on_gpu(made), made["router"]
    bias = cuda(torch, made["bias"]) if "bias" in made else None
    x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
    logits = torch.randn(tokens, layer.experts.num_experts, device="cuda")

    def run():
        return layer(x), layer.experts.from_logits(x, logits, router, bias), *router(logits, bias)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn_like(x))
        logits.copy_(torch.randn_like(logits) + 4 * seed * (torch.arange(logits.shape[1], device="cuda") < 9))
        graph.replay()
        whole, *rest = zip(captured, run(), strict=True)
        assert all(torch.equal(replayed, direct) for replayed, direct in rest)
        close(host(whole[0]), host(whole[1]), 1e-3)  # cuBLAS may choose another kernel for the logits


@pytest.mark.gpu
@pytest.mark.parametrize(("model", "launches"), [("mixtral", 4), ("qwen2-moe", 8)])
def test_gpu_layer_never_waits(torch, model, launches):
    layer = on_gpu(parts(model, pattern="2:4", hidden=256, width=192))
    x = torch.randn(50, 256, device="cuda", dtype=torch.bfloat16)
    layer(x), layer.route(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(x), layer.route(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    logits = layer._gpu.logits(x)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        y = None
        for part, given in reversed(list(zip(layer._gpu.sets, logits, strict=True))):
            y = part.experts.run(x, given, y)
        torch.cuda.synchronize()
    assert sum(event.count for event in profile.key_averages() if event.self_device_time_total) == launches
    assert torch.equal(y, layer(x))
