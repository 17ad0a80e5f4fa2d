"""The ``mma.sp`` kernel: right on the CPU twin, planted mistakes found there, and what the compiler makes of it."""

from __future__ import annotations

import inspect
import re
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from nmsparse import NMArray, VNMArray
from nmsparse.cuda import config_mma
from nmsparse.cuda.config_mma import SHARED_MEMORY, SHIPPED, SIGNATURE, MmaConfig
from nmsparse.cuda.kernels import gemm_mma
from nmsparse.cuda.layout import BLOCK_BYTES, meta_offset, pack_blocks, value_offset
from nmsparse.cuda.tile.cpu import warp as twin
from nmsparse.formats import fragments
from nmsparse.testing import assert_close

DTYPES = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}

SMALL = MmaConfig(tile_m=64, tile_t=16, warps_m=2, warps_t=1, stages=3)
CONFIGS = [
    SMALL,
    replace(SMALL, stages=2, warps_m=4, tile_t=8),
    replace(SMALL, tile_k=128, warps_m=4, dtype="bf16", bias=True),
    replace(SMALL, tile_t=32, warps_t=2, stages=4, group=1),
    replace(SMALL, vector=False, bias=True),
    replace(SMALL, vector=False, tile_k=128, warps_m=4, dtype="bf16", stages=2),
    MmaConfig(tile_m=128, tile_t=16, warps_m=1, warps_t=2, stages=3),
    MmaConfig(tile_m=128, tile_t=24, warps_m=2, warps_t=1, stages=2),
    replace(SMALL, gather=(64, 8)),
    replace(SMALL, gather=(128, 10), tile_k=128, warps_m=4, dtype="bf16", bias=True),
    MmaConfig(tile_m=128, tile_t=16, warps_m=4, warps_t=1, gather=(128, 16), stages=2),
]
SHAPES = [(64, 16, 128, 0), (150, 21, 199, 3), (65, 1, 520, 0), (1, 9, 20, 12)]  # rows, tokens, k, columns between rows


def name(cfg):
    text = f"{cfg.tile_m}x{cfg.tile_t}x{cfg.tile_k}-warps{cfg.warps_m}x{cfg.warps_t}-stages{cfg.stages}-{cfg.dtype}"
    return text + "-bias" * cfg.bias + "-elements" * (not cfg.vector) + (f"-vnm{cfg.gather}" if cfg.gather else "")


def run(cfg, rows, tokens, k, gap=0, workers=1, split=0, parts=1, make_kernel=gemm_mma.make_gemm_mma, seed=0):
    """One launch on the twin, compared with fp64; all that must not be read or written is NaN."""
    rng, dtype = np.random.default_rng(seed), DTYPES[cfg.dtype]
    if cfg.gather:
        w = VNMArray.random((rows, k), v=cfg.gather[0], m=cfg.gather[1], dtype=dtype, rng=rng)
    else:
        w = NMArray.random((rows, k), dtype=dtype, rng=rng)
    blocks = pack_blocks(w.values, w.meta)
    pitch = k + gap if not cfg.vector else -(-(k + gap) // 8) * 8
    x, y = np.full((tokens, pitch), np.nan, dtype), np.full((tokens, rows + gap), np.nan, dtype)
    x[:, :k] = rng.standard_normal((tokens, k))
    bias = rng.standard_normal(rows).astype(dtype)
    partial, flags = np.full((workers, cfg.threads, cfg.sums), np.nan, np.float32), np.zeros(workers, np.uint32)
    index = w.indices if cfg.gather else np.zeros(0, np.uint8)
    memory = blocks, x, index, y, bias, partial, flags
    sizes = rows, tokens, k, blocks.shape[1], pitch, rows + gap, split, parts
    twin.run(make_kernel, cfg, workers, *memory, *sizes)
    dense, tokens64 = w.todense().astype(np.float64), x[:, :k].astype(np.float64)
    want = tokens64 @ dense.T + (bias.astype(np.float64) if cfg.bias else 0)
    assert_close(y[:, :rows], want, k, scale=np.abs(tokens64).max() * np.abs(dense).max())
    assert np.isnan(y[:, rows:].astype(np.float32)).all(), "written beyond the last row"
    assert not flags.any(), "a flag was left for the next launch"
    return y


@pytest.mark.parametrize("cfg", CONFIGS, ids=name)
def test_the_product_is_right(cfg):
    assert not cfg.problems()
    for seed, shape in enumerate(SHAPES):
        run(cfg, *shape, workers=1 + seed, seed=seed)


@pytest.mark.parametrize(
    ("workers", "split", "parts"), [(2, 1, 2), (4, 2, 2), (3, 1, 3), (8, 2, 4), (5, 4, 1)], ids=str
)
def test_split_tiles_are_right(workers, split, parts):
    run(replace(SMALL, bias=True), 130, 30, 300, workers=workers, split=split, parts=parts)


@pytest.mark.parametrize("gather", [None, (64, 8)])
def test_any_alignment_of_the_tokens(gather):
    for gap in range(1, 8):
        run(replace(SMALL, vector=False, gather=gather), 70, 5, 130 + gap, gap)


# --- mistakes in the kernel text -------------------------------------------------------------------------------------

MISTAKES = {
    "no wait": [("tile.wait()", "pass")],
    "wait after the product": [
        ("tile.wait()\n                if", "if"),
        ("tile.mma_sp(acc, ring, step)", "tile.mma_sp(acc, ring, step); tile.wait()"),
    ],
    "no commit at the start": [("                tile.commit()\n            for", "            for")],
    "no commit in the loop": [("tile.commit()\n                tile.mma_sp", "tile.mma_sp")],
    "refills the slot being read": [("cfg.stages - 1", "cfg.stages")],
    "reads the next slot": [("mma_sp(acc, ring, step)", "mma_sp(acc, ring, step + 1)")],
    "weights of the step at hand": [("ring, step + AHEAD, w_gmem", "ring, step, w_gmem")],
    "tokens of the step at hand": [("ring, step + AHEAD, x_gmem", "ring, step, x_gmem")],
    "loads beyond the last step": [("if step + AHEAD < last:", "if True:")],
    "no tokens at the start": [("load_tokens(ring, step, x_gmem", "(lambda *_: 0)(ring, step, x_gmem")],
    "sums not zeroed": [("tile.zero(acc)", "pass")],
    "rows and tokens swapped": [("row, token = tile.place", "token, row = tile.place")],
    "last step missing": [("for step in range(first, last)", "for step in range(first, last - 1)")],
    "part stored as a whole": [("if first > 0:", "if False:")],
    "parts not added": [("if last < steps:", "if False:")],
    "parts of a whole tile": [("if last < steps:", "if True:")],
    "output pitch of the rows": [("rows, tokens, y_pitch)", "rows, tokens, rows)")],
    "wrong pitch of the tokens": [("columns, x_pitch)", "columns, columns)")],
}


def mistaken(edits):
    """``make_gemm_mma`` with its text changed."""
    text = inspect.getsource(gemm_mma)
    for old, new in edits:
        assert old in text, f"the kernel no longer says {old!r}"
        text = text.replace(old, new)
    scope: dict = {}
    exec(compile(text, "mistaken", "exec"), scope)
    return scope["make_gemm_mma"]


@pytest.mark.parametrize("edits", MISTAKES.values(), ids=MISTAKES.keys())
@pytest.mark.filterwarnings("ignore:invalid value")
def test_the_twin_finds_a_mistake(edits):
    case = dict(rows=150, tokens=20, k=700, gap=8, workers=4, split=1, parts=2)
    cfg = replace(SMALL, stages=3, bias=True)
    run(cfg, **case)
    with pytest.raises((AssertionError, IndexError)):
        run(cfg, **case, make_kernel=mistaken(edits))


# --- where things lie ------------------------------------------------------------------------------------------------


def test_addresses_of_ldmatrix_agree_with_the_packed_layout():
    """What ldmatrix hands to the lanes is what ``mma.sp`` wants, for each 16 rows of a block and each half of k."""
    lane, reg, half = np.ogrid[:32, :4, :2]
    for warp in range(4):
        for step in range(2):
            at = config_mma.weights_place(16 * warp, BLOCK_BYTES) + 256 * step
            read = at + config_mma.value_row(reg * 8 + lane // 4) + lane % 4 * 4 + half * 2
            row, column = fragments.mma_sp_a(lane, reg, half)
            np.testing.assert_array_equal(read, value_offset(16 * warp + row, 16 * step + column))
            lanes = fragments.meta_lanes(step)[:, None]
            row, word = fragments.mma_sp_meta(lanes, np.arange(2))
            at = config_mma.metadata_place(16 * warp, BLOCK_BYTES) + config_mma.metadata_word(lanes)
            np.testing.assert_array_equal(at + 2 * np.arange(2), meta_offset(16 * warp + row, 2 * step + word))


def test_shared_memory_is_read_without_bank_conflicts():
    """Eight lanes at a time read 16 bytes each from different banks of 16 bytes; the epilogue's words differ, too."""
    lane = np.arange(8)
    for cfg in SHIPPED:
        assert cfg.token_bytes % 128 == cfg.slot_bytes % 128 == cfg.weight_bytes % 128 == 0
        for chunk in range(cfg.tile_k // 8):
            places = config_mma.token_place(lane, chunk, cfg.tile_t)
            assert len(set(places // 16 % 8)) == 8
        lanes = np.arange(32)
        staged = lanes // 4 * cfg.staged_bytes + lanes % 4 * 4
        assert len(set(staged // 4 % 32)) == 32
    assert len(set(config_mma.value_row(lane) // 16 % 8)) == 8
    assert len(set(config_mma.metadata_word(np.arange(32)))) == 32


# --- configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (dict(dtype="f32"), "f16 or bf16"),
        (dict(tile_k=32), "one or two blocks"),
        (dict(tile_k=128, warps_m=1, tile_m=64), "whole groups of 8 tokens"),
        (dict(stages=1), "one slot fills"),
        (dict(tile_m=96), "whole warps"),
        (dict(warps_m=3), "16, 32, 64 or 128 rows"),
        (dict(tile_t=12), "groups of 8 tokens"),
        (dict(tile_t=256), "leave room for 128"),
        (dict(vector=False), "leave room for 64"),
        (dict(gather=(32, 8), warps_t=4), "multiple of 64"),
        (dict(gather=(128, 2), warps_t=4), "m is 4 to 256"),
        (dict(stages=20), "shared memory: "),
    ],
)
def test_a_config_says_what_is_wrong(changed, says):
    assert any(says in problem for problem in replace(MmaConfig(warps_t=2), **changed).problems())


def test_every_architecture_has_configs_for_few_and_many_tokens():
    for arch in SHARED_MEMORY:
        for changed in ({}, dict(vector=False), dict(gather=(128, 8))):
            sizes = {cfg.tile_t for cfg in SHIPPED if not replace(cfg, **changed).problems(arch)}
            assert {8, 16, 32, 64, 128} <= sizes


# --- what the compiler makes of it -----------------------------------------------------------------------------------

ELEMENTS, GATHERED = dict(vector=False, bias=True, dtype="bf16"), dict(gather=(256, 8))
QUICK = [
    (SHIPPED[0], "sm_80"),
    (replace(SHIPPED[1], **ELEMENTS), "sm_89"),
    (replace(SHIPPED[3], bias=True), "sm_90a"),
    (replace(SHIPPED[1], **GATHERED), "sm_120"),
]
ALL = [
    (replace(cfg, **changed), arch)
    for cfg in SHIPPED
    for arch in SHARED_MEMORY
    for changed in (dict(bias=True), dict(dtype="bf16"), ELEMENTS, GATHERED)
    if not replace(cfg, **changed).problems(arch)
]
COMPILED = [pytest.param(*case, id=f"{name(case[0])}-{case[1]}") for case in QUICK]
COMPILED += [
    pytest.param(*case, id=f"{name(case[0])}-{case[1]}", marks=pytest.mark.slow) for case in ALL if case not in QUICK
]


@pytest.mark.parametrize(("cfg", "arch"), COMPILED)
def test_registers_and_machine_code(cfg, arch, tmp_path):
    pytest.importorskip("numba_cuda", reason="numba-cuda is not installed", exc_type=ImportError)
    from nmsparse.cuda import compiler
    from nmsparse.cuda.tile.gpu import warp

    kernel = gemm_mma.make_gemm_mma(warp.make(cfg), cfg)
    cubin = compiler.compile_kernel(kernel, SIGNATURE, arch, threads=cfg.threads)
    used = cubin.resources()
    assert (used["spill_stores"], used["spill_loads"], used["stack"]) == (0, 0, 0)

    nvdisasm = Path(compiler.ptxas()).with_name("nvdisasm")
    if not nvdisasm.is_file():
        pytest.skip(f"no nvdisasm beside {compiler.ptxas()}; install it with: pip install nvidia-cuda-nvdisasm")
    path = tmp_path / "kernel.cubin"
    path.write_bytes(cubin.code)
    text = subprocess.run([nvdisasm, "-c", path], capture_output=True, text=True, check=True).stdout
    opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, flags=re.M)
    families = Counter(opcode.split(".")[0] for opcode in opcodes)
    high, wide = cfg.atoms
    assert sum(opcode.startswith("HMMA.SP.16832.F32") for opcode in opcodes) == high * wide * cfg.tile_k // 32
    assert families["LDSM"] == (high + wide) * cfg.tile_k // 32
    assert families["LDGSTS"] and not {"LDL", "STL"} & set(families)
