"""Products on a GPU, through the public functions: against float64, on odd shapes, streams, graphs and bad operands."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

import nmsparse
from nmsparse import NMSparseError

pytestmark = pytest.mark.gpu

SHAPES = [
    (256, 512, 256),
    (1408, 333, 2048),
    (2048, 5, 1408),
    (4096, 1024, 1024),
    (200, 77, 1408),
    (129, 33, 520),
    (1, 1, 4),
    (64, 8, 64),
    (100, 4097, 72),
    (5120, 64, 2048),
]


def operands(torch, rows, tokens, columns, dtype, pattern="2:4"):
    w = torch.randn(rows, columns, device="cuda", dtype=dtype)
    weight = nmsparse.array(w, pattern)
    return weight, torch.from_dlpack(weight.todense()), torch.randn(tokens, columns, device="cuda", dtype=dtype)


def error(got, want):
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("pattern", ["2:4", "samoyeds:1:2:64", "samoyeds:1:2:128", "samoyeds:1:2:1024"])
@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gpu_product(torch, shape, kind, pattern):
    rows, tokens, columns = shape
    dtype = getattr(torch, kind)
    weight, dense, x = operands(torch, rows, tokens, columns, dtype, pattern)
    exact = x.double() @ dense.double().t()
    y = torch.full((tokens, rows), math.nan, device="cuda", dtype=dtype)
    assert nmsparse.matmul(x, weight.T, out=y) is y
    reference = error(torch.matmul(x, dense.t()), exact)
    assert error(y, exact) <= 1.1 * reference + 1e-6
    assert torch.equal(x @ weight.T, y)
    assert torch.equal((weight @ x.t().contiguous()).t(), y)


@pytest.mark.parametrize("run", [0, 64, 256])
def test_gpu_every_shipped_kernel(torch, run):
    """With every way to deal its tiles: whole, split, by clusters."""
    from nmsparse.cuda import launch, matmul
    from nmsparse.cuda.choose import H200, Problem, candidates, gemv_plan
    from nmsparse.cuda.config import SHIPPED, SHIPPED_GEMV, SHIPPED_GEMV_SAMOYEDS, SHIPPED_SAMOYEDS

    step = min(run, 128)
    shipped = [c for c in SHIPPED_SAMOYEDS if c.tile_k == step] if run else SHIPPED
    launch.compile_all([replace(c, bias=True) for c in shipped], launch.arch_of(0))
    pattern = f"samoyeds:1:2:{run}" if run else "2:4"
    for rows, tokens, columns in ((1000, 7, 1096), (1000, 150, 1096), (1408, 300, 2048)):
        weight, dense, x = operands(torch, rows, tokens, columns, torch.float16, pattern)
        bias = torch.randn(rows, device="cuda", dtype=torch.float16)
        exact = x.double() @ dense.double().t() + bias.double()
        problem = Problem(rows, tokens, columns, bias=True, run=run)
        plans = [plan for c in shipped for plan in candidates(replace(c, bias=True), problem, H200)]
        few = SHIPPED_GEMV_SAMOYEDS if run else SHIPPED_GEMV
        plans += [gemv_plan(replace(c, bias=True), problem, H200) for c in few]
        for plan in plans:
            y = torch.full((tokens, rows), math.nan, device="cuda", dtype=torch.float16)
            first = matmul.matmul(x, weight, out=y, bias=bias, config=plan).clone()
            assert error(y, exact) < 1e-3, plan
            y.fill_(math.nan)
            assert torch.equal(matmul.matmul(x, weight, out=y, bias=bias, config=plan), first), plan


def test_gpu_rows_at_any_distance(torch):
    weight, dense, wide = operands(torch, 256, 40, 192, torch.float16)
    wide = torch.randn(40, 3, 192 + 64, device="cuda", dtype=torch.float16)
    for x in (wide[:, 1, :192], wide[::2, 0, :192], wide[:, :2, :192]):
        exact = x.double() @ dense.double().t()
        assert error(x @ weight.T, exact) < 1e-3
    odd = torch.randn(40, 193, device="cuda", dtype=torch.float16)[:, 1:]
    assert error(odd @ weight.T, odd.double() @ dense.double().t()) < 1e-3


@pytest.mark.parametrize("run", [0, 64])
@pytest.mark.parametrize("columns", [1096, 1098, 1102])
def test_gpu_few_tokens_anywhere(torch, columns, run):
    """Rows at multiples of 16 bytes and of 4, whose last piece may be a part of one."""
    from nmsparse.cuda import matmul
    from nmsparse.cuda.choose import H200, Problem, gemv_plan
    from nmsparse.cuda.config import SHIPPED_GEMV, SHIPPED_GEMV_SAMOYEDS

    pattern = f"samoyeds:1:2:{run}" if run else "2:4"
    for tokens in (1, 5, 20):
        weight, dense, _ = operands(torch, 1000, tokens, columns, torch.float16, pattern)
        wide = torch.randn(tokens, 1112, device="cuda", dtype=torch.float16)
        for width, x in ((16, wide[:, :columns]), (4, wide[:, 2 : 2 + columns])):
            exact = x.double() @ dense.double().t()
            shipped = [replace(config, width=width) for config in (SHIPPED_GEMV_SAMOYEDS if run else SHIPPED_GEMV)]
            for config in (c for c in shipped if not c.problems()):
                plan = gemv_plan(config, Problem(1000, tokens, columns, run=run), H200)
                assert error(matmul.matmul(x, weight, config=plan), exact) < 1e-3, plan


@pytest.mark.parametrize("pattern", ["2:4", "samoyeds:1:2:128"])
def test_gpu_outputs_at_any_address(torch, pattern):
    """Also where nobody can write 16 bytes at once."""
    weight, dense, x = operands(torch, 1408, 300, 256, torch.float16, pattern)
    want = x @ weight.T
    assert error(want, x.double() @ dense.double().t()) < 1e-3
    buffer = torch.full((300 * 1408 + 8,), math.nan, device="cuda", dtype=torch.float16)
    for offset in (4, 1, 0, 8):
        y = buffer[offset : offset + 300 * 1408].view(300, 1408)
        assert torch.equal(nmsparse.matmul(x, weight.T, out=y), want)


def test_gpu_nan_reaches_only_what_meets_it(torch):
    weight, _, x = operands(torch, 256, 64, 256, torch.float16)
    x[3, 17] = math.nan
    y = x @ weight.T
    kept = torch.from_dlpack(nmsparse.cuda.array.from_host(weight.to_device("cpu").mask().astype(np.uint8)))[
        :, 17
    ].bool()
    assert torch.equal(y.isnan()[3], kept)
    assert not y[:3].isnan().any()
    assert not y[4:].isnan().any()


def test_gpu_streams_and_graphs(torch):
    weight, _, x = operands(torch, 4096, 16, 4096, torch.float16)
    want = (x @ weight.T).clone()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        y = x @ weight.T
    side.synchronize()
    assert torch.equal(y, want)
    y.zero_()
    graph, other = torch.cuda.CUDAGraph(), torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        nmsparse.matmul(other, weight.T, out=y)
    other.copy_(x)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, want)


def test_gpu_arrays_of_the_library_itself(torch):
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((96, 128)).astype(np.float16), rng.standard_normal((7, 128)).astype(np.float16)
    weight = nmsparse.array(w, "2:4")
    from nmsparse.cuda.array import from_host

    y = from_host(x) @ weight.to_device("cuda").T
    np.testing.assert_allclose(y.numpy().astype(np.float32), x @ weight.T, rtol=2e-3, atol=2e-2)


def test_gpu_bad_operands(torch):
    weight, _, x = operands(torch, 64, 8, 128, torch.float16)
    for bad, message in (
        (x.bfloat16(), "float16"),
        (x[:, :64], "128"),
        (x.float(), "float16"),
    ):
        with pytest.raises(NMSparseError, match=message):
            bad @ weight.T
    with pytest.raises(NMSparseError, match="out"):
        nmsparse.matmul(x, weight.T, out=torch.empty(8, 65, device="cuda", dtype=torch.float16))
    with pytest.raises(NMSparseError, match="grad"):
        x.clone().requires_grad_() @ weight.T
    assert (x[:0] @ weight.T).shape == (0, 64)


def test_gpu_first_call_of_a_process(tmp_path):
    code = (
        "import time, torch, nmsparse; x = torch.ones(16, 4096, device='cuda', dtype=torch.float16);"
        "w = nmsparse.random((4096, 4096), '2:4', dtype='float16', rng=0).to_device('cuda'); torch.cuda.synchronize();"
        "t = time.perf_counter(); y = x @ w.T; torch.cuda.synchronize(); print(time.perf_counter() - t)"
    )
    environment = {**os.environ, "NMSPARSE_CACHE_DIR": str(tmp_path)}
    seconds = []
    for _ in range(2):
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        seconds.append(float(run.stdout))
    print(f"first product of a process: cold {seconds[0]:.2f} s, warm {seconds[1]:.2f} s")
    assert seconds[0] < 8
    assert seconds[1] < 0.5


def test_gpu_host_time(torch):
    weight, _, x = operands(torch, 4096, 16, 4096, torch.float16)
    y, across = torch.empty(16, 4096, device="cuda", dtype=torch.float16), weight.T
    spans = []
    for _ in range(100):
        start = time.perf_counter()
        for _ in range(5):
            nmsparse.matmul(x, across, out=y)
        spans.append((time.perf_counter() - start) / 5)
        torch.cuda.synchronize()
    print(f"host time of a product: {sorted(spans)[50] * 1e6:.1f} µs")
    assert sorted(spans)[50] < 20e-6  # the bar is 10, bench gemm; twice that is a regression
