"""Routers of transformers by nmsparse::route: the same choice and weights, put in and taken out without a trace."""

from __future__ import annotations

import copy
import functools
import io
import re
from importlib import import_module
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from moe_models import MODELS, make, tokens
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import nmsparse.torch as nt
from nmsparse import NMSparseError
from nmsparse.torch import routing
from nmsparse.torch.hf import routers
from nmsparse.torch.hf.routers import FAMILIES, routed, routed_forward, router_of, wants_gradient

EXPERTS, HIDDEN, TOKENS = 8, 16, 64


@functools.cache
def classes():
    """The routers that we know and this version of transformers has."""
    found = {}
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        for name in set(re.findall(r"^class (\w+)\(", path.read_text(), re.MULTILINE)) & set(FAMILIES):
            found[name] = getattr(import_module(f"transformers.models.{path.parent.name}.{path.stem}"), name)
    return found


def router(name, dtype=torch.float32, **settings):
    """A router with random weights and the attributes that the forward of its class reads."""
    if name not in classes():
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    module = classes()[name].__new__(classes()[name])
    nn.Module.__init__(module)
    generator = torch.Generator().manual_seed(0)
    for part, shape in (("weight", (EXPERTS, HIDDEN)), ("bias", EXPERTS), ("e_score_correction_bias", EXPERTS)):
        module.register_parameter(part, nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))
    standard = {"top_k": 3, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "num_group": 4, "topk_group": 2}
    vars(module).update(num_experts=EXPERTS, hidden_dim=HIDDEN, topk_method="group_limited_greedy")
    vars(module).update(standard | settings)
    return module


def x(dtype=torch.float32):
    return (torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1)) / HIDDEN**0.5).to(dtype)


def dense(weights, ids):
    """Weights (T, E), 0 where nothing was chosen."""
    return weights.new_zeros((len(ids), EXPERTS), dtype=torch.float32).scatter(1, ids.long(), weights.float())


@torch.no_grad()
def compare(module, settings=None, dtype=torch.float32, device="cpu"):
    """Our forward with these settings and the module's own one, for all tokens without a tie."""
    family = FAMILIES[type(module).__name__]
    family = family if settings is None else family._replace(settings=lambda module: settings)
    module, tokens = module.to(device), x(dtype).to(device)
    logits, weights, ids = routed(module, family, tokens)
    want_logits, want_weights, want_ids = module(tokens)
    assert torch.equal(logits, want_logits) and logits.dtype == want_logits.dtype
    assert (weights.dtype, ids.dtype, weights.shape) == (torch.float32, torch.int32, want_weights.shape)
    clear = logits.sort(dim=-1).values.diff(dim=-1).ne(0).all(dim=-1)
    assert clear.sum() > TOKENS / 2
    close = {"rtol": 4 * torch.finfo(want_weights.dtype).eps, "atol": 0}
    torch.testing.assert_close(dense(weights, ids)[clear], dense(want_weights, want_ids)[clear], **close)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_arithmetic_of_every_class(name):
    """The very logits, the same experts, their weights to rounding; and any other settings would be seen."""
    for norm, method in ((True, "group_limited_greedy"), (False, "greedy")):
        module = router(name, norm_topk_prob=norm, topk_method=method)
        compare(module)
        compare(router(name, torch.bfloat16, norm_topk_prob=norm, topk_method=method), dtype=torch.bfloat16)
        found = router_of(module)
        assert found is not None
        settings = FAMILIES[name].settings(module)
        compare(module, settings)
        top_k, scoring, renormalize, groups, kept, score, scale = settings
        limited = (groups, kept) if kept < groups else (4, 2)
        wrong = [
            (top_k - 1, *settings[1:]),
            (top_k, "sigmoid" if scoring == "softmax" else "softmax", *settings[2:]),
            (top_k, scoring, not renormalize, *settings[3:]),
            (*settings[:3], *((1, 1) if kept < groups else (4, 2)), score, scale),
            (*settings[:6], 1.5),
            (*settings[:3], *limited, "max" if score == "top2" else "top2", scale),
        ]
        for other in wrong:
            with pytest.raises(AssertionError):
                compare(module, other)


def test_the_families_are_there():
    """What the tests above skip is not all of it."""
    known = {"MixtralTopKRouter", "Qwen3MoeTopKRouter", "OlmoeTopKRouter", "DeepseekV2TopkRouter", "GptOssTopKRouter"}
    assert known | {"Qwen2MoeTopKRouter", "DeepseekV3TopkRouter"} <= set(classes())


def test_what_is_not_known():
    class MixtralTopKRouter(nn.Module):
        """Somebody else's."""

    assert router_of(MixtralTopKRouter()) is None and router_of(nn.Linear(4, 4)) is None
    assert router_of(router("DeepseekV2TopkRouter", topk_method="another")) is None
    assert router_of(router("DeepseekV3TopkRouter", num_group=3)) is None
    assert router_of(router("DeepseekV3TopkRouter", top_k=5)) is None, "more than the kept groups have"
    wide = router("MixtralTopKRouter")
    wide.weight = nn.Parameter(torch.ones(513, HIDDEN))
    assert router_of(wide) is None, "more experts than the kernel takes"
    older = router("Qwen3MoeTopKRouter")
    del older.norm_topk_prob
    assert router_of(older) is None


def fused(model):
    """Names of the modules with the replacement."""
    parts = model.named_modules()
    return [name for name, module in parts if getattr(vars(module).get("forward"), "func", None) is routed_forward]


def without(model):
    """A copy with the model's own routers."""
    model = copy.deepcopy(model)
    for module in model.modules():
        vars(module).pop("forward", None)
    return model


def routers_of(model):
    return [name for name, module in model.named_modules() if type(module).__name__ in FAMILIES]


@pytest.fixture
def always(monkeypatch):
    """As on a GPU: every call is one for the replacement. Counts them."""
    calls = []
    monkeypatch.setattr(routers, "fits", lambda module, hidden_states: not wants_gradient(module, hidden_states))

    def counted(*arguments):
        calls.append(arguments)
        return route(*arguments)

    route = routing.route
    monkeypatch.setattr(routing, "route", counted)
    return calls


@pytest.mark.parametrize("name", [name for name in MODELS if name != "GraniteMoe"])
def test_models(name, always):
    """Put in by sparsify_, taken out by densify_; logits of the model and of its routers are those of before."""
    model = make(name)
    found = routers_of(model)
    assert found and not fused(model)
    nt.sparsify_(model, "2:4")
    assert fused(model) == found
    plain = without(model)
    options = {"output_router_logits": True} if "output_router_logits" in model.config.to_dict() else {}
    with torch.no_grad():
        want = plain(tokens(), **options)
        assert not always
        got = model(tokens(), **options)
    assert len(always) == len(found)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-5, atol=1e-5 * want.logits.abs().max().item())
    if options:
        assert len(got.router_logits) == len(found) and torch.equal(got.router_logits[0], want.router_logits[0])
        torch.testing.assert_close(got.router_logits, want.router_logits)
    model(tokens()).logits.sum().backward()
    assert len(always) == len(found), "where a gradient is wanted the router trains"
    assert all(model.get_submodule(path).weight.grad is not None for path in found)
    assert not fused(nt.densify_(model))


def test_on_the_host_nothing_changes():
    """There a model computes bit by bit what it computes without us."""
    model = nt.sparsify_(make("Qwen3Moe"), "2:4")
    plain = without(model)
    assert fused(model) and not fused(plain)
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, plain(tokens()).logits)


def test_which_calls_take_the_kernel():
    """Those on a GPU of which nobody asks a gradient."""
    gate = router("Qwen3MoeTopKRouter")
    for on_gpu, grad, trains, asked in product([False, True], repeat=4):
        gate.requires_grad_(trains)
        with torch.set_grad_enabled(grad):
            ours = routers.fits(gate, SimpleNamespace(is_cuda=on_gpu, requires_grad=asked))
        assert ours == (on_gpu and not (grad and (trains or asked)))


def test_fakes_of_a_gpu_take_the_op():
    gate = nt.sparsify_(make("Qwen3Moe", torch.bfloat16), "2:4").model.layers[0].mlp.gate
    with FakeTensorMode(), torch.no_grad():
        weight, here = (torch.empty(rows, 32, dtype=torch.bfloat16, device="cuda") for rows in (3, 18))
        logits, weights, ids = torch.func.functional_call(gate, {"weight": weight}, (here,))
    assert (logits.shape, weights.shape, ids.shape) == ((18, 3), (18, 2), (18, 2))
    assert (logits.dtype, weights.dtype, ids.dtype) == (torch.bfloat16, torch.float32, torch.int32)


def test_only_beside_sparse_experts(always):
    model = nt.sparsify_(make("Mixtral"), "2:4", select=r"layers\.1\.mlp\.experts")
    assert fused(model) == ["model.layers.1.mlp.gate"]
    with torch.no_grad():
        model(tokens())
    assert len(always) == 1
    block = make("Mixtral").model.layers[0].mlp  # a part of a model is no PreTrainedModel
    assert fused(nt.sparsify_(block, "2:4")) == ["gate"]
    assert not fused(nt.densify_(block))
    linear = nt.sparsify_(make("Mixtral"), "2:4", select="q_proj")
    assert not fused(linear)


def test_loading(tmp_path):
    model = nt.sparsify_(make("DeepseekV3"), "2:4")
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert fused(again) == fused(model) and fused(model)


def by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_torch_save])
def test_copies_have_their_own(duplicate, always):
    model = nt.sparsify_(make("Qwen3Moe"), "2:4")
    other = duplicate(model)
    assert fused(other) == fused(model) and fused(model)
    for name in fused(other):
        module = other.get_submodule(name)
        assert module.forward.args[0] is module
    with torch.no_grad():
        assert torch.equal(other(tokens()).logits, model(tokens()).logits)
        for name in fused(other):
            other.get_submodule(name).weight.zero_()
        assert not torch.equal(other(tokens()).logits, model(tokens()).logits)
    nt.densify_(other)
    assert fused(model) and not fused(other)


def test_settings_are_read_at_each_call(always):
    model = nt.sparsify_(make("Qwen3Moe"), "2:4")
    gate = model.model.layers[0].mlp.gate
    with torch.no_grad():
        assert gate(torch.ones(5, 32))[1].shape == (5, 2)
        gate.top_k = 3
        assert gate(torch.ones(5, 32))[1].shape == (5, 3)
        gate.top_k = 4
        with pytest.raises(NMSparseError, match="top_k"):
            gate(torch.ones(5, 32))


# inductor itself still uses what torch has deprecated
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", ["Qwen3Moe", "DeepseekV3", "GptOss"])
def test_compile_without_a_graph_break(name, always):
    """With the op in the graph where it may be, and without it where a gradient is wanted."""
    model = nt.sparsify_(make(name), "2:4")
    block, arguments = model.model.layers[-1].mlp, torch.randn(2, 9, 32)
    seen = []

    def backend(graph, inputs):
        seen.extend(node.target for node in graph.graph.nodes)
        return graph

    def first(result):
        return result[0] if isinstance(result, tuple) else result

    compiled = torch.compile(block, fullgraph=True, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(first(compiled(arguments)), first(block(arguments)), rtol=0, atol=0)
    assert routing.route_op in seen or torch.ops.nmsparse.route in seen
    seen.clear()
    torch.testing.assert_close(first(compiled(arguments)), first(block(arguments)), rtol=0, atol=0)
    assert seen and not {routing.route_op, torch.ops.nmsparse.route} & set(seen)


def test_compile_on_the_host():
    block = nt.sparsify_(make("Qwen3Moe"), "2:4").model.layers[0].mlp
    compiled, arguments = torch.compile(block, fullgraph=True, backend="aot_eager"), torch.randn(2, 9, 32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(arguments), block(arguments), rtol=0, atol=0)


def test_frozen_routers_beside_experts_that_train(always):
    """Weights that need no gradient may come from the op; the experts' gradients do not mind int32 ids."""
    block = nt.sparsify_(make("Qwen3Moe"), "2:4").model.layers[0].mlp
    block.gate.requires_grad_(False)
    values = block.experts.down_proj.values
    arguments = torch.randn(2, 9, 32)
    (got,) = torch.autograd.grad(block(arguments).square().sum(), [values])
    assert len(always) == 1
    routers._take(block.gate)
    (want,) = torch.autograd.grad(block(arguments).square().sum(), [values])
    torch.testing.assert_close(got, want)


def test_hooks_of_accelerate(always):
    """They wrap a forward, whatever it is, before or after; taken away, they leave ours, and ours leaves theirs."""
    hooks = pytest.importorskip("accelerate.hooks")

    class Count(hooks.ModelHook):
        calls = 0

        def pre_forward(self, module, *arguments, **options):
            self.calls += 1
            return arguments, options

    def hooked(module):
        hooks.add_hook_to_module(module, hook)
        return module

    def run(block, calls, ours):
        hook.calls = 0
        always.clear()
        with torch.no_grad():
            block(torch.ones(1, 3, 32))
        assert (hook.calls, len(always)) == (calls, ours)

    for before in (False, True):
        hook, block = Count(), make("Qwen3Moe").model.layers[0].mlp
        if before:
            hooked(block.gate)
        nt.sparsify_(block, "2:4")
        if not before:
            hooked(block.gate)
        run(block, 1, 1)
        run(copy.deepcopy(block), 0, 1)  # the copy has a hook of its own
        nt.densify_(block)
        run(block, 1, 0)
        nt.sparsify_(block, "2:4")
        hooks.remove_hook_from_module(block.gate)
        run(block, 0, 1)
        nt.densify_(block)
        run(block, 0, 0)


def test_a_forward_of_somebody_else_stays():
    block = make("Qwen3Moe").model.layers[0].mlp
    block.gate.forward = functools.partial(type(block.gate).forward, block.gate)
    theirs = block.gate.forward
    nt.sparsify_(block, "2:4")
    assert block.gate.forward is theirs
    nt.densify_(block)
    assert block.gate.forward is theirs


@pytest.mark.parametrize("bias", [False, True])
def test_the_op(bias):
    """torch's own checks of schema, fake and AOT dispatch; and no gradient without a word."""
    logits = torch.randn(TOKENS, EXPERTS)
    arguments = logits, torch.randn(EXPERTS) if bias else None, 3, "sigmoid", True, 4, 2, "top2", 2.5
    assert set(torch.library.opcheck(routing.route_op, arguments).values()) == {"SUCCESS"}
    assert torch.ops.nmsparse.route.default is routing.route_op
    weights, ids = routing.route_op(*arguments)
    assert torch.equal(weights, routing.route(*arguments)[0]) and torch.equal(ids, routing.route(*arguments)[1])
    weights, _ = routing.route_op(logits.requires_grad_(), *arguments[1:])
    with pytest.raises(NMSparseError, match="has no gradient"):
        weights.sum().backward()
    with pytest.raises(NMSparseError, match="expected logits"):
        routing.route_op(torch.ones(3, device="meta"), *arguments[1:])


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAMILIES)
def test_every_class_on_a_gpu(name):
    for dtype in (torch.float32, torch.bfloat16):
        compare(router(name, dtype), dtype=dtype, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "DeepseekV3", "GptOss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_models_on_a_gpu(name, dtype):
    """One token a sequence: where rounding turns a choice between two near scores, it is this token's only."""
    model = nt.sparsify_(make(name, dtype).cuda(), "2:4")
    plain, ids = without(model), torch.arange(64, device="cuda")[:, None]
    assert fused(model) and not fused(plain)
    got, want = model(ids).logits.float(), plain(ids).logits.float()
    same = (got - want).abs().amax(dim=(1, 2)) <= 2e-2 * want.abs().max()
    assert same.float().mean() > 0.9


@pytest.mark.gpu
@torch.no_grad()
def test_captured_and_compiled_on_a_gpu():
    """A CUDA graph holds the router: replayed with other tokens it routes these."""
    block = nt.sparsify_(make("Qwen3Moe", torch.bfloat16).cuda(), "2:4").model.layers[0].mlp
    here = torch.randn(1, 16, 32, device="cuda", dtype=torch.bfloat16)
    want = block(here)
    compiled = torch.compile(block, fullgraph=True)
    torch.testing.assert_close(compiled(here), want, rtol=2e-2, atol=2e-2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block(here)
    for _ in range(3):
        here.normal_()
        graph.replay()
        assert torch.equal(out, block(here))
