"""The ops of torch.library: results, fakes, gradients, compile, export."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

import nmsparse.torch as nt
from nmsparse import NMSparseError, formats, reference
from nmsparse.torch import SparseWeight, library
from nmsparse.torch.gradients import ACTIVATIONS

PATTERNS = ["2:4", "1:4", "3:7", "vnm:4:2:8", "samoyeds:1:2:16", "samoyeds:3:5:12"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_weight(shape, pattern, dtype=torch.float32, seed=0):
    array = formats.random(shape, pattern, rng=seed)
    return SparseWeight.from_array(array).to(dtype)


def routing(tokens, experts, top_k, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(tokens, experts, generator=generator)
    weights, ids = scores.topk(top_k)
    return ids, weights.to(dtype)


def dense_experts(x, ids, weights, gate_up, down, activation):
    """The same in dense torch, expert by expert, for autograd."""
    y = torch.zeros_like(x)
    for e in range(down.shape[0]):
        token, slot = (ids == e).nonzero(as_tuple=True)
        h = x[token] @ gate_up[e].mT
        width = down.shape[2]
        h = ACTIVATIONS[activation](h[:, :width]) * h[:, width:] if h.shape[1] > width else ACTIVATIONS[activation](h)
        y = y.index_add(0, token, weights[token, slot, None].to(x.dtype) * (h @ down[e].mT))
    return y


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_against_dense_autograd(pattern, dtype):
    """fp32 gradients to 1e-5 and 16-bit ones to their rounding, in every op, at every place."""
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 6e-2}
    torch.manual_seed(0)

    def compare(sparse, dense, tensors, weight_pairs):
        got, want = sparse(), dense()
        torch.testing.assert_close(got, want.to(got.dtype), **close)
        leaves = [t for t in tensors if t.requires_grad]
        upstream = torch.randn_like(want)
        sparse_grads = torch.autograd.grad(got, [*leaves, *(w.values for w, _ in weight_pairs)], upstream.to(got.dtype))
        dense_grads = torch.autograd.grad(want, [*leaves, *(d for _, d in weight_pairs)], upstream)
        for a, b in zip(sparse_grads[: len(leaves)], dense_grads[: len(leaves)], strict=True):
            torch.testing.assert_close(a.to(b.dtype), b, **close)
        for (w, _), a, b in zip(weight_pairs, sparse_grads[len(leaves) :], dense_grads[len(leaves) :], strict=True):
            kept = nt.decode.gather(b, w.meta, w.indices, w.pattern)
            torch.testing.assert_close(a.to(b.dtype), kept, **close)

    def leaf(*shape):
        return (torch.randn(shape) / shape[-1] ** 0.5).to(dtype).requires_grad_()

    def dense_of(w):
        return w.todense().detach().float().requires_grad_()

    w, x, bias = random_weight((24, 40), pattern, dtype), leaf(3, 5, 40), leaf(24)
    d = dense_of(w)
    compare(lambda: nt.linear(x, w, bias), lambda: x.float() @ d.mT + bias.float(), [x, bias], [(w, d)])

    w, x, offsets = random_weight((3, 24, 40), pattern, dtype), leaf(7, 40), torch.tensor([2, 2, 7], dtype=torch.int32)
    d = dense_of(w)
    compare(
        lambda: nt.grouped_linear(x, w, offsets),
        lambda: torch.cat([x[:2].float() @ d[0].mT, x[2:].float() @ d[2].mT]),
        [x],
        [(w, d)],
    )

    for activation, rows in (("silu", 48), ("gelu", 24), ("relu2", 48)):
        gate_up, down = random_weight((4, rows, 40), pattern, dtype), random_weight((4, 40, 24), pattern, dtype, 1)
        with torch.no_grad():  # of the size of trained weights, so that the tolerance means something
            for weight in (gate_up, down):
                weight.values /= weight.shape[-1] ** 0.5
        x = leaf(6, 40)
        ids, weights = routing(6, 3, 2)
        weights.requires_grad_()
        g, d = dense_of(gate_up), dense_of(down)
        compare(
            lambda a=activation, g=gate_up, d=down, i=ids, w=weights, x=x: nt.experts(x, i, w, g, d, a),
            lambda a=activation, g=g, d=d, i=ids, w=weights, x=x: dense_experts(x.float(), i, w, g, d, a),
            [x, weights],
            [(gate_up, g), (down, d)],
        )


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "vnm:4:2:8", "samoyeds:1:2:16"])
def test_gradcheck_and_opcheck(pattern):
    """Numerical gradients in float64, and torch's own checks of schema, fakes, autograd and AOT dispatch."""
    torch.manual_seed(0)

    def double(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    w, x, bias = random_weight((10, 20), pattern, torch.float64), double(2, 3, 20), double(10)
    cases = [(library.linear_op, (x, *w(), bias), (0, 1, 6))]
    w, offsets = random_weight((3, 10, 20), pattern, torch.float64), torch.tensor([2, 2, 5], dtype=torch.int32)
    cases.append((library.grouped_linear_op, (double(5, 20), offsets, *w()), (0, 2)))
    gate_up, down = (random_weight(s, pattern, torch.float64) for s in ((3, 16, 20), (3, 20, 8)))
    ids, weights = routing(5, 3, 2, torch.float64)
    arguments = double(5, 20), ids, weights.requires_grad_(), *gate_up(), *down(), "silu"
    cases.append((library.experts_op, arguments, (0, 2, 3, 8)))
    for op, arguments, places in cases:

        def of_leaves(*leaves, op=op, arguments=arguments, places=places):
            full = list(arguments)
            for place, leaf in zip(places, leaves, strict=True):
                full[place] = leaf
            return op(*full)

        assert torch.autograd.gradcheck(of_leaves, [arguments[place] for place in places], fast_mode=True)
        assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


class Layer(torch.nn.Module):
    """Both modules and the op that neither uses."""

    def __init__(self, pattern="samoyeds:1:2:16"):
        super().__init__()
        self.linear = nt.SparseLinear(random_weight((40, 40), pattern), torch.zeros(40))
        self.experts = nt.SparseExperts(random_weight((4, 48, 40), pattern), random_weight((4, 40, 24), pattern))
        self.grouped = random_weight((4, 40, 40), "2:4")

    def forward(self, x, ids, weights):
        y = self.experts(self.linear(x), ids, weights)
        offsets = torch.arange(1, 5, device=x.device) * (x.shape[0] // 4)
        return nt.grouped_linear(y, self.grouped, offsets)


def case(tokens=8):
    torch.manual_seed(0)
    return (torch.randn(tokens, 40), *routing(tokens, 4, 2))


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


# inductor itself still uses what torch has deprecated
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, needs_compiler])])
def test_compile_without_a_graph_break(train, backend):
    layer, arguments = Layer(), case()
    with torch.set_grad_enabled(train):
        want = layer(*arguments)
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(*arguments), want, rtol=0, atol=0)
        longer = case(16)
        torch.testing.assert_close(compiled(*longer), layer(*longer), rtol=0, atol=0)
    if train:
        expected = torch.autograd.grad(want.square().sum(), list(layer.parameters()))
        got = torch.autograd.grad(compiled(*arguments).square().sum(), list(layer.parameters()))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_export(tmp_path):
    layer, arguments = Layer(), case()
    tokens = torch.export.Dim("tokens", min=4, max=64)
    program = torch.export.export(layer, arguments, dynamic_shapes=({0: tokens}, {0: tokens}, {0: tokens}))
    names = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert {library.linear_op, library.experts_op, library.grouped_linear_op} <= names
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    longer = case(12)
    torch.testing.assert_close(loaded(*longer), layer(*longer), rtol=0, atol=0)


def test_transforms_and_modes_still_see_the_op():
    """The short way past the dispatcher is not taken where somebody listens."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    weight = random_weight((24, 40), "2:4").requires_grad_(False)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert nt.linear(mode.from_tensor(torch.ones(3, 40)), weight).shape == (3, 24)
    graph = make_fx(lambda x: nt.linear(x, weight))(torch.ones(3, 40))
    assert any(node.target is library.linear_op for node in graph.graph.nodes)
    x = torch.randn(2, 3, 40)
    torch.testing.assert_close(torch.vmap(lambda x: nt.linear(x, weight))(x), nt.linear(x, weight), rtol=0, atol=0)


def test_shapes_that_do_not_fit():
    weight = random_weight((24, 40), "2:4")
    with pytest.raises(NMSparseError, match="dimension mismatch"):
        nt.linear(torch.ones(3, 41), weight)
    with pytest.raises(NMSparseError, match="expected w as a sparse array"):
        nt.grouped_linear(torch.ones(3, 40), weight, torch.tensor([3]))
    with pytest.raises(NMSparseError, match="contiguous"):
        library.linear_op(torch.ones(3, 40), weight.values.mT, *weight()[1:], None)
    with pytest.raises(NMSparseError, match="expected values as"):
        library.linear_op(torch.ones(3, 40), weight.values[:, :8].contiguous(), *weight()[1:], None)
    bytes_outside = random_weight((24, 40), "1:4")
    bytes_outside.meta[0, 0] = 200
    with pytest.raises(NMSparseError, match="corrupt"):
        nt.linear(torch.ones(3, 40), bytes_outside)
    with pytest.raises(NMSparseError, match=r"expected x \(…, K\)"):
        nt.linear(torch.ones(3, 41, device="meta"), SparseWeight("2:4", (24, 40), device="meta"))


def test_frozen_experts():
    """What does not train costs no gradient, and leaves those of the rest what they are."""
    gate_up, down = random_weight((4, 48, 40), "2:4"), random_weight((4, 40, 24), "2:4")
    x, ids, weights = case()
    x.requires_grad_()
    y = nt.experts(x, ids, weights, gate_up, down)
    z = nt.grouped_linear(y, gate_up, torch.tensor([1, 3, 8, 8]))
    (want,) = torch.autograd.grad(z.square().sum(), [x])
    for weight in (gate_up, down):
        weight.requires_grad_(False)
    y = nt.experts(x, ids, weights, gate_up, down)
    z = nt.grouped_linear(y, gate_up, torch.tensor([1, 3, 8, 8]))
    (got,) = torch.autograd.grad(z.square().sum(), [x])
    assert torch.equal(got, want)


def test_empty_batches():
    gate_up, down = random_weight((4, 48, 40), "2:4"), random_weight((4, 40, 24), "2:4")
    ids, weights = routing(0, 4, 2)
    y = nt.experts(torch.ones(0, 40, requires_grad=True), ids, weights, gate_up, down)
    assert y.shape == (0, 40)
    (grad,) = torch.autograd.grad(y.sum(), [gate_up.values])
    assert not grad.any()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast(dtype, stored):
    """As with nn.Linear: computed and returned in autocast's dtype, gradients in that of each leaf."""
    weight = random_weight((24, 40), "2:4", stored)
    x = torch.ones(3, 40, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = nt.linear(x, weight)
    assert y.dtype == torch.bfloat16
    want = reference.matmul(np.ones((3, 40)), weight.todense().detach().float().numpy().T)
    np.testing.assert_allclose(y.detach().float().numpy(), want, rtol=2e-2, atol=5e-2)
    y.sum().backward()
    assert x.grad.dtype == dtype and weight.values.grad.dtype == stored
