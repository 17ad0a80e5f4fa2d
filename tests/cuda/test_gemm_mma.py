"""The ``mma.sp`` kernel: right on the CPU twin, planted mistakes found there, and what the compiler makes of it."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_texts import assert_same_words, mistaken, opcodes_of
from machine_code import disassembled

from nmsparse import NMArray, SamoyedsArray, VNMArray
from nmsparse.cuda import config_mma
from nmsparse.cuda.config_mma import SHARED_MEMORY, SHIPPED, SHIPPED_SAMOYEDS, MmaConfig
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
    replace(SMALL, tile_m=128, pairs=True),
    replace(SMALL, tile_m=256, pairs=True, tile_k=128, warps_m=4, dtype="bf16", bias=True),
    replace(SMALL, tile_m=128, pairs=True, tile_t=32, warps_t=2, stages=4, vector=False),
    MmaConfig(tile_m=256, tile_t=24, warps_m=2, warps_t=1, stages=2, pairs=True, bias=True),
    replace(SMALL, gather=(64, 8)),
    replace(SMALL, gather=(128, 10), tile_k=128, warps_m=4, dtype="bf16", bias=True),
    MmaConfig(tile_m=128, tile_t=16, warps_m=4, warps_t=1, gather=(128, 16), stages=2),
]
SHAPES = [(64, 16, 128, 0), (150, 21, 199, 3), (65, 1, 520, 0), (1, 9, 20, 12)]  # rows, tokens, k, columns between rows


def name(cfg):
    text = f"{cfg.tile_m}x{cfg.tile_t}x{cfg.tile_k}-warps{cfg.warps_m}x{cfg.warps_t}-stages{cfg.stages}-{cfg.dtype}"
    return (
        text
        + "-samoyeds" * cfg.pairs
        + "-bias" * cfg.bias
        + "-elements" * (not cfg.vector)
        + (f"-vnm{cfg.gather}" if cfg.gather else "")
    )


def run(cfg, rows, tokens, k, gap=0, workers=1, split=0, parts=1, make_kernel=gemm_mma.make_gemm_mma, seed=0, v=128):
    """One launch on the twin, compared with fp64; all that must not be read or written is NaN."""
    rng, dtype = np.random.default_rng(seed), DTYPES[cfg.dtype]
    run_steps, runs = 1, 1
    if cfg.pairs:
        w = SamoyedsArray.random((rows, k), v=v, dtype=dtype, rng=rng)
        run_steps, runs = max(1, v // cfg.tile_k), w.indices.shape[1]
    elif cfg.gather:
        w = VNMArray.random((rows, k), v=cfg.gather[0], m=cfg.gather[1], dtype=dtype, rng=rng)
    else:
        w = NMArray.random((rows, k), dtype=dtype, rng=rng)
    blocks = pack_blocks(w.values, w.meta)
    pitch = k + gap if not cfg.vector else -(-(k + gap) // 8) * 8
    x, y = np.full((tokens, pitch), np.nan, dtype), np.full((tokens, rows + gap), np.nan, dtype)
    x[:, :k] = rng.standard_normal((tokens, k))
    bias = rng.standard_normal(rows).astype(dtype)
    slots, floats = cfg.partial_slots
    partial, flags = np.full((slots * workers, floats), np.nan, np.float32), np.zeros(slots * workers, np.uint32)
    index = np.zeros(0, np.uint8) if w.indices is None else w.indices
    memory = blocks, x, index, y, bias, partial, flags
    sizes = rows, tokens, k, blocks.shape[1], pitch, rows + gap, split, parts, run_steps, runs
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
@pytest.mark.parametrize("pairs", [False, True], ids=["2:4", "samoyeds"])
def test_split_tiles_are_right(workers, split, parts, pairs):
    """Of Samoyeds, parts of a tile begin and end anywhere in a run."""
    cfg = replace(SMALL, tile_m=128, pairs=True, bias=True) if pairs else replace(SMALL, bias=True)
    run(cfg, 130 * (1 + pairs), 30, 300, workers=workers, split=split, parts=parts, v=192)


@pytest.mark.parametrize(
    ("tile_k", "v"), [(64, 64), (64, 128), (64, 192), (64, 1024), (128, 128), (128, 256), (128, 1024)]
)
def test_runs_of_any_length(tile_k, v):
    run(replace(SMALL, tile_m=128, warps_m=4, tile_k=tile_k, pairs=True), 141, 11, 600, v=v)


@given(st.integers(1, 270), st.integers(1, 40), st.integers(1, 400), st.sampled_from([64, 128, 256]), st.data())
@settings(max_examples=25)
def test_samoyeds_of_any_size(rows, tokens, k, v, data):
    cfg = replace(SMALL, tile_m=128, pairs=True, vector=data.draw(st.booleans()), bias=True)
    workers, parts = data.draw(st.integers(1, 4)), 1
    tiles = -(-rows // cfg.tile_m) * -(-tokens // cfg.tile_t)
    steps = -(-k // 128) * 2
    split = data.draw(st.integers(0, min(workers, tiles)))
    if split:
        parts = data.draw(st.integers(1, min(workers // split, steps)))
    run(cfg, rows, tokens, k, workers=workers, split=split, parts=parts, v=v)


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

MISTAKES_OF_RUNS = {
    "picks of the first tile": [("tile.picks(index_gmem, row,", "tile.picks(index_gmem, 0,")],
    "picks with another pitch": [("picks(index_gmem, row, rows, runs)", "picks(index_gmem, row, rows, runs - 1)")],
    "a part begins with the first run": [("tile.run_of(first, run_steps)", "tile.run_of(0, run_steps)")],
    "picks of the next run": [("min(run, runs - 1)", "min(run + 1, runs - 1)")],
    "a run too long": [("left == 0 or", "left < 0 or")],
    "one run for all": [("left == 0 or step == last - 1", "step == last - 1")],
    "a cut run is lost": [(" or step == last - 1", "")],
    "runs not added": [("tile.add_run(acc, odd)", "pass")],
    "the run does not go on": [("run += 1", "pass")],
    "runs of one step": [("left = run_steps", "left = 1")],
}


@pytest.mark.parametrize("edits", MISTAKES.values(), ids=MISTAKES.keys())
@pytest.mark.filterwarnings("ignore:invalid value")
def test_the_twin_finds_a_mistake(edits):
    case = dict(rows=150, tokens=20, k=700, gap=8, workers=4, split=1, parts=2)
    cfg = replace(SMALL, stages=3, bias=True)
    run(cfg, **case)
    with pytest.raises((AssertionError, IndexError)):
        run(cfg, **case, make_kernel=mistaken(gemm_mma, "make_gemm_mma", *edits))


@pytest.mark.parametrize("edits", MISTAKES_OF_RUNS.values(), ids=MISTAKES_OF_RUNS.keys())
@pytest.mark.filterwarnings("ignore:invalid value")
def test_the_twin_finds_a_mistake_with_runs(edits):
    case = dict(rows=300, tokens=20, k=700, gap=8, workers=4, split=1, parts=2, v=256)
    cfg = replace(SMALL, tile_m=128, pairs=True)
    run(cfg, **case)
    with pytest.raises((AssertionError, IndexError)):
        run(cfg, **case, make_kernel=mistaken(gemm_mma, "make_gemm_mma", *edits))


def test_a_nan_reaches_the_row_that_was_picked_and_no_other():
    cfg = replace(SMALL, tile_m=128, pairs=True)
    acc, odd = np.zeros((64, cfg.sums), np.float32), np.zeros((64, cfg.run_sums), bool)
    acc[:, : cfg.run_sums], odd[:, ::2] = np.nan, True
    twin.make(cfg, 0, 1).add_run(acc, odd)
    even, odd_sums = np.isnan(acc[:, cfg.run_sums :]).reshape(64, 2, -1).swapaxes(0, 1)
    np.testing.assert_array_equal(odd_sums, odd)
    np.testing.assert_array_equal(even, ~odd)


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
    for cfg in [*SHIPPED, *SHIPPED_SAMOYEDS]:
        assert cfg.token_bytes % 128 == cfg.slot_bytes % 128 == cfg.weight_bytes % 128 == 0
        for chunk in range(cfg.tile_k // 8):
            places = config_mma.token_place(lane, chunk, cfg.tile_t)
            assert len(set(places // 16 % 8)) == 8
        lanes = np.arange(32)
        row, token = (lanes // 4, lanes % 4 * 2) if cfg.pairs else (lanes % 4, lanes // 4)
        staged = token * cfg.staged_bytes + row * 4
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
        (dict(warps_m=3), "16, 32, 64 or 128 packed rows"),
        (dict(pairs=True, tile_m=64), "128 output rows"),
        (dict(pairs=True, tile_m=256), "leave room for 144"),
        (dict(pairs=True, gather=(128, 8)), "V:N:M or Samoyeds"),
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
        for changed in ({}, dict(vector=False)):
            fitting = [cfg for cfg in SHIPPED_SAMOYEDS if not replace(cfg, **changed).problems(arch)]
            assert {8, 16, 32, 64, 96} <= {cfg.tile_t for cfg in fitting if cfg.tile_k == 64}, "runs of 64 columns"


@pytest.mark.parametrize("pairs", [False, True], ids=["2:4", "samoyeds"])
def test_the_two_vocabularies_are_the_same(pairs):
    pytest.importorskip("numba_cuda", reason="numba-cuda is not installed", exc_type=ImportError)
    from nmsparse.cuda.tile.gpu import warp as gpu

    cfg = replace(SMALL, tile_m=128, pairs=pairs)
    on_cpu = vars(twin.make(cfg, 0, 1))
    del on_cpu["load_tokens_gathered"]  # the GPU has it in place of load_tokens
    assert_same_words(on_cpu, vars(gpu.make(cfg)))


# --- what the compiler makes of it -----------------------------------------------------------------------------------

ELEMENTS, GATHERED = dict(vector=False, bias=True, dtype="bf16"), dict(gather=(256, 8))
QUICK = [
    (SHIPPED[0], "sm_80"),
    (replace(SHIPPED[1], **ELEMENTS), "sm_89"),
    (replace(SHIPPED[3], bias=True), "sm_90a"),
    (replace(SHIPPED[1], **GATHERED), "sm_120"),
    (replace(SHIPPED_SAMOYEDS[0], bias=True), "sm_86"),
]
ALL = [
    (replace(cfg, **changed), arch)
    for cfg in [*SHIPPED, *SHIPPED_SAMOYEDS]
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
    cubin = compiler.compile_kernel(kernel, cfg.signature, arch, threads=cfg.threads)
    used = cubin.resources()
    assert (used["spill_stores"], used["spill_loads"], used["stack"]) == (0, 0, 0)

    opcodes, families = opcodes_of(disassembled(cubin.code, tmp_path))
    high, wide = cfg.atoms
    assert sum(opcode.startswith("HMMA.SP.16832.F32") for opcode in opcodes) == high * wide * cfg.tile_k // 32
    assert families["LDSM"] == (high + wide) * cfg.tile_k // 32
    assert families["LDGSTS"] and not {"LDL", "STL"} & set(families)


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("v", [64, 128, 192])
@pytest.mark.parametrize("tokens", [1, 8, 300])
def test_gpu_samoyeds_by_mma_sp(tokens, v):
    """Every shape that is shipped, whole tiles and split ones, and the kernels for few tokens."""
    torch = pytest.importorskip("torch")
    from nmsparse.cuda import matmul
    from nmsparse.cuda.choose import H200, Problem, candidates, gemv_plan
    from nmsparse.cuda.config import SHIPPED_GEMV_SAMOYEDS

    rows, columns = 1002, 1096
    weight = SamoyedsArray.random((rows, columns), v=v, dtype=np.float16, rng=0)
    dense = torch.from_numpy(weight.todense()).cuda()
    weight = weight.to_device("cuda")
    x = torch.randn(tokens, columns, device="cuda", dtype=torch.float16)
    bias = torch.randn(rows, device="cuda", dtype=torch.float16)
    exact = x.double() @ dense.double().t() + bias.double()
    problem = Problem(rows, tokens, columns, bias=True, run=v)
    shapes = [replace(cfg, bias=True) for cfg in SHIPPED_SAMOYEDS if v % cfg.tile_k == 0]
    shapes += [replace(cfg, vector=False) for cfg in shapes]
    plans = [plan for cfg in shapes for plan in candidates(cfg, problem, H200)]
    plans += [gemv_plan(replace(cfg, bias=True), problem, H200) for cfg in SHIPPED_GEMV_SAMOYEDS]
    for plan in plans:
        y = torch.full((tokens, rows), float("nan"), device="cuda", dtype=torch.float16)
        first = matmul.matmul(x, weight, out=y, bias=bias, config=plan).clone()
        assert (y.double() - exact).norm() / exact.norm() < 1e-3, plan
        y.fill_(float("nan"))
        assert torch.equal(matmul.matmul(x, weight, out=y, bias=bias, config=plan), first), plan
