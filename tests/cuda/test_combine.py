"""The sum over the experts of a token: the text on the twin against float64, planted mistakes, compiled, on a GPU."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machine_code import assert_overlaps, disassembled

from nmsparse import NMSparseError
from nmsparse.cuda import launch
from nmsparse.cuda.array import from_host
from nmsparse.cuda.combine import Combine
from nmsparse.cuda.config_route import CombineConfig
from nmsparse.cuda.kernels import combine as kernels
from nmsparse.cuda.tile.cpu import KernelError
from nmsparse.cuda.tile.cpu import combine as twin

DTYPES = {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
EPSILON = {"f16": 2.0**-11, "bf16": 2.0**-8}
TINY = {"f16": 2.0**-25, "bf16": 0.0}  # half the least subnormal number; bf16 has the range of the sums
UNTOUCHED = 123.0


def case(tokens, top_k, columns, dtype, base, pad, kind, rng):
    """Rows in any order; what nobody may read is NaN, as are the weights of slots that are left out."""
    rows, pitch = max(tokens * top_k, 1), columns + pad
    d = np.full((rows, pitch), np.nan, np.float32)
    d[:, :columns] = rng.standard_normal((rows, columns))
    slots = rng.permutation(tokens * top_k).reshape(tokens, top_k).astype(np.int32)
    weights = rng.random((tokens, top_k), np.float32)
    left_out = np.full(slots.shape, kind == "none") | (rng.random(slots.shape) < 0.3 * (kind == "some"))
    d[slots[left_out]], weights[left_out] = np.nan, np.nan
    slots[left_out] = -1
    added = np.full((tokens, pitch), np.nan, np.float32)
    added[:, :columns] = rng.standard_normal((tokens, columns))
    y = np.full((tokens, pitch), UNTOUCHED).astype(DTYPES[dtype])
    return d.astype(y.dtype), slots, weights, added.astype(y.dtype) if base else None, y


def check(y, d, slots, weights, base, columns, dtype):
    """float64, and half a unit in the last place of the result and of each partial sum in fp32."""
    terms = np.zeros((*slots.shape, columns))
    for place in np.argwhere(slots >= 0):
        t, j = place
        terms[t, j] = weights[t, j].astype(np.float64) * d[slots[t, j], :columns].astype(np.float64)
    want, size = terms.sum(axis=1), np.abs(terms).sum(axis=1)
    if base is not None:
        added = base[:, :columns].astype(np.float64)
        want, size = want + added, size + np.abs(added)
    got = y[:, :columns].astype(np.float64)
    allowed = EPSILON[dtype] * np.abs(want) + TINY[dtype] + slots.shape[1] * 2.0**-23 * size
    assert (np.abs(got - want) <= allowed).all()
    np.testing.assert_array_equal(y[:, columns:].astype(np.float64), UNTOUCHED)


def run(cfg, d, slots, weights, base, y, columns, make=kernels.make_combine):
    pieces, pitch = -(-columns // 8), d.shape[1]
    arguments = d, slots, weights, d[:0] if base is None else base, y
    grid = -(-len(slots) * pieces // cfg.threads)
    twin.run(make, cfg, grid, *arguments, len(slots), columns, pieces, pitch, pitch, pitch)


@given(
    tokens=st.integers(1, 20),
    top_k=st.integers(1, 18),
    columns=st.integers(1, 80),
    dtype=st.sampled_from(list(DTYPES)),
    base=st.booleans(),
    pad=st.sampled_from([0, 3, 8]),
    kind=st.sampled_from(["all", "some", "none"]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=100, deadline=None)
def test_combine_is_the_weighted_sum(tokens, top_k, columns, dtype, base, pad, kind, seed):
    aligned = columns % 8 == pad % 8 == 0
    cfg = CombineConfig(top_k, dtype, base, aligned, threads=64)
    arrays = case(tokens, top_k, columns, dtype, base, pad, kind, np.random.default_rng(seed))
    *inputs, y = arrays
    run(cfg, *inputs, y, columns)
    check(y, *inputs, columns, dtype)


def test_the_sum_is_in_the_order_of_the_choices():
    """2^24 + 1 + 1 is 2^24 in fp32, 1 + 1 + 2^24 is not."""
    d = np.ones((3, 8), np.float16)
    weights = np.array([[2.0**24, 1, 1], [1, 1, 2.0**24]], np.float32) / 2**10
    slots, y = np.array([[0, 1, 2], [0, 1, 2]], np.int32), np.zeros((2, 8), np.float16)
    d[:] = 2.0**-10
    run(CombineConfig(3, threads=32), d, slots, weights * 2**10, None, y, 8)
    base = np.full((2, 8), -(2.0**14), np.float16)
    run(CombineConfig(3, base=True, threads=32), d, slots, weights * 2**10, base, y := np.zeros_like(y), 8)
    np.testing.assert_array_equal(y, [[0] * 8, [2.0**-9] * 8])


MISTAKES = {
    "the first choice only": ("range(0, TOP_K, BATCH)", "range(0, 1, BATCH)"),
    "slots of the next token": ("slots_gmem, token, first", "slots_gmem, token + 1, first"),
    "weights of the first batch": ("weights_gmem, token, first", "weights_gmem, token, 0"),
    "rows with another pitch": ("slots, d_pitch", "slots, columns"),
    "rows from the start": ("d_pitch, column, left", "d_pitch, 0, left"),
    "rows too long": ("d_pitch, column, left", "d_pitch, column, 8"),
    "base twice": ("if BASE:", "for _ in range(2):"),
    "no base": ("if BASE:", "if not BASE:"),
    "base of the first token": ("base_gmem, token,", "base_gmem, token * 0,"),
    "base with another pitch": ("token, base_pitch", "token, columns"),
    "stored where no token is": ("tile.choose(exists, left, 0)", "left"),
    "stored with another pitch": ("token, y_pitch", "token, columns"),
    "stored too long": ("tile.choose(exists, left, 0)", "tile.choose(exists, 8, 0)"),
    "sums begin anew": ("sums = tile.add_rows(sums,", "sums = tile.add_rows(tile.zeros(),"),
    "not rounded, but the first row": ("tile.round(sums)", "rows[0]"),
    "the previous launch not awaited": ("tile.await_previous()", "pass"),
    "slots read too early": ("tile.await_previous()", "tile.load_slots(slots_gmem, token, 0); tile.await_previous()"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_found(mistake):
    source, (right, wrong) = inspect.getsource(kernels), MISTAKES[mistake]
    assert right in source, f"the kernel text no longer says {right!r}: update this mistake"
    names: dict = {}
    exec(source.replace(right, wrong), names)
    cfg = CombineConfig(11, base=True, aligned=False, threads=64)
    for make, fails in ((kernels.make_combine, False), (names["make_combine"], True)):
        *inputs, y = case(5, 11, 21, "f16", True, 2, "some", np.random.default_rng(0))

        def attempt(make=make, inputs=inputs, y=y):
            run(cfg, *inputs, y, 21, make)
            check(y, *inputs, 21, "f16")

        if fails:
            with pytest.raises((AssertionError, KernelError)):
                attempt()
        else:
            attempt()


# --- the entry -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "pitch", "shift", "aligned"),
    [(64, 64, 0, True), (64, 72, 0, True), (60, 64, 0, False), (64, 70, 0, False), (64, 64, 2, False)],
)
def test_combine_chooses_by_alignment(monkeypatch, columns, pitch, shift, aligned):
    launches = []

    def kernel_of(config, device):
        return lambda *arguments: launches.append((config, arguments))

    monkeypatch.setattr(launch, "kernel_of", kernel_of)
    monkeypatch.setattr(launch, "overlaps", lambda device: True)
    combine = Combine(CombineConfig(4, "bf16", base=True), 0)
    for _ in range(2):
        combine(7, 4096, pitch, 101, 102, 8192, pitch, 33, columns, 1024 + shift, pitch)
    config = CombineConfig(4, "bf16", base=True, aligned=aligned, overlaps=True)
    pieces = -(-columns // 8)
    sizes = 33, columns, pieces, pitch, pitch, pitch
    assert launches == [(config, (-(-33 * pieces // 128), 7, 4096, 101, 102, 1024 + shift, 8192, *sizes))] * 2
    assert len(config.signature) == len(launches[0][1]) - 2


def test_what_cannot_run_is_explained():
    with pytest.raises(NMSparseError, match="top_k=0: at least one"):
        Combine(CombineConfig(0), 0)
    Combine(CombineConfig(2), 0)(0, 0, 8, 0, 0, 0, 8, tokens=0, columns=8)  # nothing to do, and nothing launched
    with pytest.raises(NMSparseError, match="too many for one launch"):
        Combine(CombineConfig(2), 0)(0, 0, 8, 0, 0, 0, 8, tokens=1 << 30, columns=64)


# --- compiled, without a device --------------------------------------------------------------------------------------

QUICK = [(CombineConfig(8), "sm_90a"), (CombineConfig(11, "bf16", base=True, aligned=False), "sm_90a")]
OTHERS = [CombineConfig(1), CombineConfig(2, "bf16", base=True), CombineConfig(6), CombineConfig(16, "bf16", base=True)]
CONFIGS = QUICK + [
    pytest.param(cfg, arch, marks=pytest.mark.slow) for cfg in OTHERS for arch in ("sm_80", "sm_90a", "sm_120")
]


@pytest.mark.parametrize(("cfg", "arch"), CONFIGS, ids=str)
def test_it_compiles_without_spills(cfg, arch, tmp_path):
    pytest.importorskip("numba_cuda", reason="needs numba-cuda", exc_type=ImportError)
    from nmsparse.cuda import compiler

    cfg = replace(cfg, overlaps=arch != "sm_80")
    cubin = compiler.compile_kernel(launch.TEXTS[type(cfg)](cfg), cfg.signature, arch, threads=cfg.threads)
    used = cubin.resources()
    assert used["spill_stores"] == used["spill_loads"] == used["stack"] == 0
    assert 0 < used["registers"] <= (80 if cfg.aligned else 128)  # six, or four blocks on an SM
    code = disassembled(cubin.code, tmp_path)
    assert not re.search(r"\b(LDL|STL)\b", code)
    assert_overlaps(code, cfg.overlaps)
    if cfg.aligned:
        loads = [match.start() for match in re.finditer(r"\bLDG\.E\.128", code)]
        assert len(loads) % cfg.batch == cfg.base and re.search(r"\bSTG\.E\.128", code)
        first_product = re.search(r"\bFFMA|\bFMUL", code).start()
        assert sum(at < first_product for at in loads) >= cfg.batch, "a batch is under way before its first product"


def test_the_two_vocabularies_are_the_same():
    pytest.importorskip("numba_cuda", reason="needs numba-cuda", exc_type=ImportError)
    from nmsparse.cuda.tile.gpu import combine as gpu

    for cfg in (CombineConfig(2), CombineConfig(2, aligned=False)):
        on_cpu, on_gpu = vars(twin.make(cfg, 1)), vars(gpu.make(cfg))
        words = set(re.findall(r"tile\.(\w+)", inspect.getsource(kernels)))
        assert words <= set(on_cpu) and words <= set(on_gpu)
        assert {word for word in on_gpu if not word.startswith("__")} == set(on_cpu)


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["all", "some", "none"])
@pytest.mark.parametrize("top_k", [1, 2, 4, 6, 8, 11, 16])
@pytest.mark.parametrize(
    ("tokens", "columns", "pad"), [(1, 2048, 0), (1, 7, 2), (77, 2048, 8), (77, 1000, 1), (300, 4096, 0)]
)
def test_gpu_combine(tokens, columns, pad, top_k, kind):
    for dtype in DTYPES:
        for base in (False, True):
            *inputs, y = case(tokens, top_k, columns, dtype, base, pad, kind, np.random.default_rng(tokens))
            d, slots, weights, added, here = (None if a is None else from_host(a) for a in (*inputs, y))
            pitch = columns + pad
            combine = Combine(CombineConfig(top_k, dtype, base), 0)
            rows = (added.pointer, pitch) if base else (0, 0)
            given = d.pointer, pitch, slots.pointer, weights.pointer, here.pointer, pitch, tokens, columns
            combine(0, *given, *rows)
            check(here.numpy(), *inputs, columns, dtype)
