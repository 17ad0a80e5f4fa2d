"""Pruning, packing and decoding on a GPU: the kernels' texts on NumPy, compiled without a device, and on a GPU."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import bits, expert_shapes, shapes

import nmsparse
from nmsparse import NMSparseError, UnsupportedDeviceError
from nmsparse.cuda import compiler, layout, pack
from nmsparse.cuda.array import DeviceArray, from_host
from nmsparse.cuda.kernels import pack as kernels
from nmsparse.cuda.pack import PackConfig
from nmsparse.cuda.tile.cpu import elements
from nmsparse.formats import NMArray, VNMArray

DTYPES = {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
SHAPES = [(1, 1), (64, 128), (65, 136), (100, 200), (3, 70, 33), (2, 128, 264)]
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
# Each example poisons its own memory, so one device serves all of them.
on_host_device = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@st.composite
def halves(draw):
    """Weights of 16 bits: any bits at all, ties, mostly zeros, and the corner cases next to each other."""
    shape, dtype = draw(shapes | expert_shapes), draw(st.sampled_from(list(DTYPES.values())))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["bits", "ties", "sparse", "special"]))
    if kind == "bits":
        return rng.integers(0, 1 << 16, shape).astype(np.uint16).view(dtype)
    if kind == "ties":
        return rng.integers(-2, 3, shape).astype(dtype)
    if kind == "sparse":
        return (rng.standard_normal(shape) * (rng.random(shape) < 0.2)).astype(dtype)
    return rng.choice([0.0, -0.0, 1.0, -1.0, np.nan, -np.nan, np.inf, -np.inf], shape).astype(dtype)


def blocks_of(A):
    """The definition, for each matrix of ``A``."""
    if A.ndim == 2:
        return layout.pack_blocks(A.values, A.meta)
    return np.stack([layout.pack_blocks(values, meta) for values, meta in zip(A.values, A.meta, strict=True)])


def assert_same_bits(got, want):
    got = got.numpy()
    assert got.shape == want.shape and got.dtype == want.dtype
    np.testing.assert_array_equal(bits(got), bits(want))


# --- the texts, on NumPy ---------------------------------------------------------------------------------------------


@given(w=halves())
@on_host_device
def test_prune_is_bitwise_from_dense(host_device, w):
    A = NMArray.from_dense(w)
    B = nmsparse.array(from_host(w), "2:4")
    assert isinstance(B, NMArray) and B.device == "cuda:0" and B.shape == w.shape
    assert_same_bits(B.values, A.values)
    assert_same_bits(B.meta, A.meta)


@given(w=halves())
@on_host_device
def test_prune_writes_blocks_in_the_same_pass(host_device, w):
    A, here = NMArray.from_dense(w), from_host(w)
    both, alone = pack.prune(here, blocks=True), pack.prune(here, canonical=False, blocks=True)
    assert list(both) == ["values", "meta", "blocks"] and list(alone) == ["blocks"]
    for parts in (both, alone):
        assert_same_bits(parts["blocks"], blocks_of(A))
    assert_same_bits(both["values"], A.values)


@given(w=halves())
@on_host_device
def test_pack_is_the_definition(host_device, w):
    A = NMArray.from_dense(w)
    assert_same_bits(pack.packed(A.to_device("cuda")), blocks_of(A))


def interleaved(A):
    """The definition: blocks of the rows as :func:`layout.interleaved` orders them, padding where there is none."""
    order = layout.interleaved(A.values.shape[-2])
    values, meta = bits(A.values)[..., order, :], A.meta[..., order, :]
    values[..., order < 0, :], meta[..., order < 0, :] = 0, layout.EMPTY
    rows, stored = values.shape[-2:]
    matrices = zip(values.reshape(-1, rows, stored), meta.reshape(-1, rows, stored // 8), strict=True)
    blocks = np.stack([layout.pack_blocks(*matrix) for matrix in matrices])
    return blocks.reshape(*A.values.shape[:-2], *blocks.shape[1:])


PAIRED = [("2:4", (64, 128)), ("2:4", (3, 2, 20)), ("2:4", (2, 100, 72)), ("samoyeds:1:2:64", (2, 120, 200))]


@every_dtype
@pytest.mark.parametrize(("pattern", "shape"), PAIRED, ids=str)
def test_gate_and_up_rows_are_packed_side_by_side(host_device, pattern, shape, dtype):
    A = nmsparse.random(shape, pattern, dtype=dtype, rng=0)
    B = A.to_device("cuda")
    assert_same_bits(pack.pack_blocks(B.values, B.meta, interleave=True), interleaved(A))
    assert_same_bits(pack.pack_blocks(B.values, B.meta), blocks_of(A))


@given(w=halves())
@on_host_device
def test_decode_is_todense(host_device, w):
    A = NMArray.from_dense(w)
    assert_same_bits(A.to_device("cuda").todense(), A.todense())


@pytest.mark.parametrize("pattern", ["vnm:64:2:8", "vnm:3:2:5", "samoyeds:1:2:128", "samoyeds:3:5:12"])
@pytest.mark.parametrize("shape", [(70, 200), (3, 24, 80)])
def test_the_inner_24_of_two_level_formats(host_device, pattern, shape):
    A = nmsparse.random(shape, pattern, dtype=np.float16, rng=0)
    B = A.to_device("cuda")
    assert_same_bits(pack.packed(B), blocks_of(A))
    assert_same_bits(B.todense(), A.todense())


def test_blocks_are_made_once_and_serve_the_experts(host_device):
    A = nmsparse.random((3, 24, 80), "2:4", dtype=np.float16, rng=0)
    B = A.to_device("cuda")
    assert_same_bits(pack.packed(B[1]), blocks_of(A[1]))
    blocks = pack.packed(B)
    assert pack.packed(B) is blocks
    assert pack.packed(B[1]).pointer == blocks[1].pointer
    assert B.copy()._packed is None and "_packed" not in B.__getstate__()


@pytest.mark.parametrize("shape", [(0, 64), (64, 0), (0, 64, 64), (2, 0, 64)])
def test_empty_weights(host_device, shape):
    w = np.zeros(shape, np.float16)
    A = nmsparse.array(from_host(w), "2:4")
    assert A.shape == shape and A.todense().numpy().shape == shape
    assert pack.packed(A).size == 0


def test_weights_at_any_address(host_device):
    whole = from_host(np.arange(4096, dtype=np.float16))
    for skip in (0, 1, 8):
        w = DeviceArray(whole.pointer + 2 * skip, (32, 64), whole.dtype, 0, whole)
        A = NMArray.from_dense(w.numpy())
        parts = pack.prune(w)
        assert_same_bits(parts["values"], A.values)
        assert_same_bits(parts["meta"], A.meta)


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "vnm:4:2:8", "samoyeds:1:2:16"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_array_of_a_weight_on_a_gpu_is_that_of_the_host(host_device, pattern, dtype):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((24, 80)).astype(dtype)
    scores = rng.random(w.shape, np.float32)
    mask = nmsparse.array(w, pattern).mask()
    for options in ({}, {"scores": scores}, {"mask": mask}, {"scores": from_host(scores)}, {"mask": from_host(mask)}):
        on_host = {name: o.numpy() if isinstance(o, DeviceArray) else o for name, o in options.items()}
        want, got = nmsparse.array(w, pattern, **on_host), nmsparse.array(from_host(w), pattern, **options)
        assert got.device == "cuda:0"
        for name, buffer in want.buffers().items():
            assert_same_bits(got.buffers()[name], buffer)
    with pytest.raises(NMSparseError, match="does not fit"):
        nmsparse.array(from_host(w), pattern, strict=True)


def test_what_the_kernels_cannot_take_is_explained(host_device):
    w = from_host(np.ones((32, 64), np.float16))
    with pytest.raises(NMSparseError, match="in C order"):
        nmsparse.array(w.T, "2:4")
    with pytest.raises(NMSparseError, match="expected a weight"):
        nmsparse.array(w[0], "2:4")
    with pytest.raises(UnsupportedDeviceError, match="float16 and bfloat16"):
        pack.packed(nmsparse.random((4, 16), "2:4").to_device("cuda"))
    with pytest.raises(UnsupportedDeviceError, match="2:4 only"):
        pack.packed(nmsparse.random((4, 16), "1:4", dtype=np.float16).to_device("cuda"))
    A = nmsparse.random((8, 32), "2:4", dtype=np.float16).to_device("cuda")
    with pytest.raises(NMSparseError, match="2:4 buffers"):
        pack.pack_blocks(A.values, A.values)
    odd = DeviceArray(A.values.pointer + 2, A.values.shape, A.values.dtype, 0)
    with pytest.raises(NMSparseError, match="multiple of 16"):
        pack.pack_blocks(odd, A.meta)


def test_the_twin_finds_planted_mistakes():
    """What the device would do silently raises: out of bounds, unaligned, stored twice."""
    values, meta = np.zeros((64, 64), np.float16), np.full((64, 8), 0x4444, np.uint16)
    cfg, blocks = PackConfig(), np.zeros((1, 2, layout.BLOCK_BYTES), np.uint8)

    def run(rows, row_blocks, values=values):
        grid, sizes = row_blocks * 2 * 128 // cfg.threads, (rows, 8, row_blocks, 2, 2 * row_blocks)
        elements.run(kernels.make_pack, cfg, grid, values, meta, blocks, *sizes)

    run(64, 1)
    np.testing.assert_array_equal(blocks, layout.pack_blocks(values, meta))
    with pytest.raises(AssertionError, match="outside"):
        run(65, 2)
    with pytest.raises(AssertionError, match="outside"):
        run(64, 1, values[:32])
    memory = elements.Memory(np.zeros(64, np.uint8))
    two = np.array([True, True])
    with pytest.raises(AssertionError, match="twice"):
        memory.store(np.array([0, 0]), np.zeros((2, 4), np.uint8), two)
    with pytest.raises(AssertionError, match="multiple"):
        memory.load(np.array([0, 2]), 4, two)


# --- compiled, without a device --------------------------------------------------------------------------------------

OUTPUTS = [(True, False), (True, True), (False, True)]
CONFIGS = [
    *(("pack", PackConfig(interleave=interleave)) for interleave in (False, True)),
    *(("prune", PackConfig("f16", aligned, *outputs)) for aligned in (True, False) for outputs in OUTPUTS),
    ("prune", PackConfig("bf16", blocks=True)),
    *(("decode", PackConfig("f16", aligned)) for aligned in (True, False)),
]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_120"])
@pytest.mark.parametrize(("name", "cfg"), CONFIGS, ids=str)
def test_compiles_without_spills(name, cfg, arch, tmp_path):
    pytest.importorskip("numba_cuda")
    cubin = pack.build(name, cfg, arch)
    resources = cubin.resources()
    assert resources["spill_stores"] == resources["spill_loads"] == resources["stack"] == 0
    assert 0 < resources["registers"] <= (64 if cfg.aligned else 96), "four blocks of 256 threads fit on an SM"
    code = disassemble(cubin.code, tmp_path)
    assert not re.search(r"\b(CALL|LDL|STL)\b", code)
    if name == "pack" or cfg.aligned:
        loads = {"pack": 2, "prune": 4, "decode": 2}[name]
        assert len(re.findall(r"\bLDG\.E\.128", code)) == loads
        stores = {"pack": 2, "prune": 2 * (cfg.canonical + cfg.blocks), "decode": 4}[name]
        assert len(re.findall(r"\bSTG\.E\.128", code)) == stores
    if name == "prune" and cfg.aligned:
        first_store, last_load = code.index("STG"), code.rindex("LDG")
        assert last_load < first_store, "all loads are under way before anything is stored"


def disassemble(code, folder):
    places = Path(compiler.ptxas()).parent
    tool = next((path for path in (places / "nvdisasm", places / "nvdisasm.exe") if path.is_file()), None)
    if tool is None:
        pytest.skip("needs nvdisasm")
    path = folder / "kernel.cubin"
    path.write_bytes(code)
    return subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True).stdout


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@given(w=halves())
@settings(max_examples=200)
def test_gpu_prune_is_bitwise_from_dense(w):
    A = NMArray.from_dense(w)
    parts = pack.prune(from_host(w), blocks=True)
    assert_same_bits(parts["values"], A.values)
    assert_same_bits(parts["meta"], A.meta)
    assert_same_bits(parts["blocks"], blocks_of(A))
    assert_same_bits(pack.packed(A.to_device("cuda")), blocks_of(A))
    assert_same_bits(A.to_device("cuda").todense(), A.todense())


@pytest.mark.gpu
@every_dtype
@every_shape
def test_gpu_prune_of_every_shape(dtype, shape):
    w = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    A = NMArray.from_dense(w)
    B = nmsparse.array(from_host(w), "2:4")
    assert_same_bits(B.values, A.values)
    assert_same_bits(B.meta, A.meta)
    assert_same_bits(pack.packed(B), blocks_of(A))
    assert_same_bits(B.todense(), A.todense())
    alone = pack.prune(from_host(w), canonical=False, blocks=True)
    assert_same_bits(alone["blocks"], blocks_of(A))


@pytest.mark.gpu
@every_dtype
def test_gpu_every_group_of_four(dtype):
    """All pairs of 256 bit patterns, in all six places of a group."""
    some = np.random.default_rng(0).choice(1 << 16, 256, replace=False).astype(np.uint16)
    some[:8] = [0, 0x8000, 0x7C00, 0x7C01, 0x7F80, 0x7F81, 0xFF80, 0xFFFF]
    a, b = (side.ravel() for side in np.meshgrid(some, some))
    rest = np.roll(a, 1), np.roll(b, 2)
    for i, j in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
        others = [p for p in range(4) if p not in (i, j)]
        group = np.empty((a.size, 4), np.uint16)
        group[:, i], group[:, j], group[:, others[0]], group[:, others[1]] = a, b, *rest
        w = group.reshape(256, -1).view(dtype)
        A, B = NMArray.from_dense(w), nmsparse.array(from_host(w), "2:4")
        assert_same_bits(B.values, A.values)
        assert_same_bits(B.meta, A.meta)


@pytest.mark.gpu
@pytest.mark.parametrize(("pattern", "shape"), [*PAIRED, ("2:4", (3, 2816, 520))], ids=str)
def test_gpu_gate_and_up_rows_are_packed_side_by_side(pattern, shape):
    A = nmsparse.random(shape, pattern, dtype=np.float16, rng=0)
    B = A.to_device("cuda")
    assert_same_bits(pack.pack_blocks(B.values, B.meta, interleave=True), interleaved(A))


@pytest.mark.gpu
def test_gpu_pack_of_two_level_formats():
    for pattern in ("vnm:64:2:8", "samoyeds:1:2:128"):
        A = nmsparse.random((3, 192, 520), pattern, dtype=np.float16, rng=0)
        B = A.to_device("cuda")
        assert_same_bits(pack.packed(B), blocks_of(A))
        assert_same_bits(B.todense(), A.todense())


@pytest.mark.gpu
def test_gpu_array_of_a_torch_weight_on_its_stream():
    torch = pytest.importorskip("torch")
    w = torch.randn(256, 512, device="cuda", dtype=torch.bfloat16)
    A = nmsparse.array(w, "2:4")
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        B = nmsparse.array(w * 2, "2:4")
    host = w.float().cpu().numpy().astype(ml_dtypes.bfloat16)
    assert_same_bits(A.todense(), NMArray.from_dense(host).todense())
    assert_same_bits(B.todense(), NMArray.from_dense(2 * host).todense())
    dense = torch.from_dlpack(A.todense())
    assert dense.is_cuda and ((dense == w) | (dense == 0)).all()


@pytest.mark.gpu
def test_gpu_vnm_is_a_round_trip_with_the_same_result():
    w = np.random.default_rng(0).standard_normal((128, 256)).astype(np.float16)
    A, B = nmsparse.array(w, "vnm:64:2:8"), nmsparse.array(from_host(w), "vnm:64:2:8")
    assert isinstance(B, VNMArray)
    for name, buffer in A.buffers().items():
        assert_same_bits(B.buffers()[name], buffer)


@pytest.mark.gpu
@pytest.mark.slow
def test_gpu_bandwidth():
    """At least 40 % of what a copy reaches, bytes read plus bytes written, beyond the L2 cache."""
    torch = pytest.importorskip("torch")
    w = torch.randn(16384, 16384, device="cuda", dtype=torch.float16)

    def seconds(run):
        for _ in range(3):
            run()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e4

    target = torch.empty_like(w)
    copy = 2 * w.nbytes / seconds(lambda: target.copy_(w))
    A = nmsparse.array(w, "2:4")
    dense, decoded = (DeviceArray(t.data_ptr(), t.shape, A.dtype, 0) for t in (w, target))
    packed, to_blocks = pack.packed(A), PackConfig(canonical=False, blocks=True)
    rows, columns = w.shape
    tail = columns // 16, *layout.blocks_of(rows, columns)
    launches = {
        "prune": (w.nbytes + A.nbytes, "prune", PackConfig(), (dense, A.values, A.meta, None), (rows, columns, *tail)),
        "to blocks": (
            w.nbytes + packed.nbytes,
            "prune",
            to_blocks,
            (dense, None, None, packed),
            (rows, columns, *tail),
        ),
        "pack": (A.nbytes + packed.nbytes, "pack", PackConfig(), (A.values, A.meta, packed), (rows, *tail)),
        "decode": (A.nbytes + w.nbytes, "decode", PackConfig(), (A.values, A.meta, decoded), (rows, columns, *tail)),
    }
    for what, (moved, *launch) in launches.items():
        rate = moved / seconds(lambda launch=launch: pack._launch(*launch, 0))
        print(f"{what}: {rate / 1e12:.2f} TB/s, {rate / copy:.0%} of a copy's {copy / 1e12:.2f}")
        assert rate >= 0.4 * copy, what
