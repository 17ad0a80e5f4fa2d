"""The grouped kernel for few tokens: its text on the twin against float64, planted mistakes, its machine code."""

from __future__ import annotations

import inspect
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_texts import assert_same_words, mistaken, opcodes_of
from machine_code import assert_overlaps, disassembled
from vocabulary import explained, words_of

import nmsparse
from nmsparse import reference
from nmsparse.cuda.config_grouped import GroupedGemvConfig
from nmsparse.cuda.kernels import gemv_grouped
from nmsparse.cuda.layout import interleaved, pack_blocks
from nmsparse.cuda.tile.cpu import Deadlock
from nmsparse.cuda.tile.cpu import gemv_grouped as twin
from nmsparse.formats import metadata
from nmsparse.testing import assert_close

DTYPES = {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
SMALL = GroupedGemvConfig(warps=2, batch=1)
SPARE = 3  # rows and columns around X and Y that must not be read or written


def packed(weight, gated):
    """Blocks of every expert; of gated weights with gate and up rows side by side."""
    blocks = []
    for values, meta in zip(weight.values, weight.meta, strict=True):
        if gated:
            order = interleaved(len(values))
            empty = np.zeros_like(values[:1]), np.full_like(meta[:1], metadata.pack(np.tile([0, 1], (4, 1)))[0])
            values, meta = (np.concatenate([a, zero])[order] for a, zero in zip((values, meta), empty, strict=True))
        blocks.append(pack_blocks(values, meta))
    return np.stack(blocks)


def plan_of(counts, tile_t, before=None):
    """Ends of the experts' positions, and of their tiles of tokens; of a part with ``before`` positions before it."""
    counts = np.asarray(counts, np.int32)
    ends, tile_ends = np.cumsum(counts), np.cumsum(-(-counts // tile_t))
    if before is not None:
        return np.array([(before, 7), *zip(ends + before, tile_ends + 7, strict=True)], np.int32).ravel()
    return np.concatenate([ends, tile_ends]).astype(np.int32)


def run(cfg, rows, k, counts, v=64, seed=0, make=gemv_grouped.make_gemv_grouped, spare_ctas=2, before=0):
    """One launch on the twin, compared with float64; all that must not be read or written is NaN."""
    rng, dtype, experts, positions = np.random.default_rng(rows + k), DTYPES[cfg.dtype], len(counts), sum(counts)
    w = rng.standard_normal((experts, rows, k)).astype(dtype)
    weight = nmsparse.SamoyedsArray.from_dense(w, v=v) if cfg.pairs else nmsparse.NMArray.from_dense(w)
    blocks, outputs = packed(weight, cfg.gated), rows // 2 if cfg.gated else rows
    tokens = max(1, positions // 2) if cfg.gather else positions  # a token may go to several experts
    x = np.full((tokens, k + 2 * SPARE), np.nan, dtype)
    x[:, :k] = rng.standard_normal((tokens, k))
    source = rng.integers(0, tokens, positions).astype(np.uint32) if cfg.gather else np.arange(positions)
    y = np.full((before + positions + SPARE, outputs + SPARE), np.nan, dtype)
    runs, stored = (weight.indices.shape[-1] if cfg.pairs else 1), weight.values.shape[1]
    plan = plan_of(counts, cfg.tile_t, before if cfg.part else None)
    nobody = np.full(before, 1 << 31, np.uint32), np.full((before, x.shape[1]), np.nan, dtype)
    given = np.concatenate([nobody[0], source]) if cfg.gather else None
    memory = blocks, weight.indices, x if cfg.gather else np.concatenate([nobody[1], x]), given, y, plan
    sizes = experts, stored, *blocks.shape[1:3], k, x.shape[1], outputs, y.shape[1], v // 64, runs
    ctas = sum(-(-count // cfg.tile_t) for count in counts) * blocks.shape[1] * 4 + spare_ctas
    twin.launch(make, cfg, ctas, (*memory, *sizes), seed=seed)

    x64 = x[source, :k].astype(np.float64)
    sums = reference.grouped_matmul(x64, weight, np.cumsum(counts))
    want = reference.gated(sums, outputs, cfg.activation)
    # A gate times an up: each as far from the truth as its sum, and as large as the largest.
    scale = np.abs(x64).max(initial=0) * np.abs(w.astype(np.float64)).max() * (np.abs(sums).max(initial=1) ** cfg.gated)
    scale *= 2 * np.abs(sums).max(initial=1) if cfg.activation == "relu2" else 2
    assert_close(y[before:, :outputs][:positions], want, k, scale=scale)
    y[before : before + positions, :outputs] = np.nan
    assert np.isnan(y.astype(np.float32)).all()


def run_with_four_seeds(*args, **kwargs):
    for seed in range(4):
        run(*args, **kwargs, seed=seed)


GATED = dict(gated=True, activation="silu")


@pytest.mark.parametrize("counts", [[3, 0, 8, 1], [0, 0, 11], [17], [0, 1, 0, 0, 9, 0]], ids=str)
@pytest.mark.parametrize("gather", [False, True], ids=["in order", "gather"])
@pytest.mark.parametrize("changed", [{}, GATED], ids=["plain", "gated"])
@pytest.mark.parametrize("pairs", [False, True], ids=["2:4", "samoyeds"])
def test_the_product_is_right(pairs, changed, gather, counts):
    run(replace(SMALL, pairs=pairs, gather=gather, **changed), 72, 200, counts)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_every_activation(gated, activation):
    run(replace(SMALL, pairs=True, gated=gated, activation=activation), 32, 64, [2, 3])


@pytest.mark.parametrize("v", [64, 128, 192, 512])
@pytest.mark.parametrize("changed", [dict(warps=3, batch=2), dict(warps=1, batch=4, dtype="bf16")], ids=str)
def test_runs_of_any_length(changed, v):
    run(replace(SMALL, pairs=True, gather=True, **GATED, **changed), 76, 392, [4, 9], v=v)


@pytest.mark.parametrize("pairs", [False, True], ids=["2:4", "samoyeds"])
@pytest.mark.parametrize("gather", [False, True], ids=["in order", "gather"])
@pytest.mark.parametrize("before", [0, 6])
def test_a_part_of_the_experts(pairs, gather, before):
    for counts in ([3, 0, 8, 1], [0, 0]):
        run(replace(SMALL, pairs=pairs, gather=gather, part=True, **GATED), 72, 200, counts, before=before)


def test_no_tokens_at_all():
    run(replace(SMALL, pairs=True, gather=True), 40, 64, [0, 0, 0])


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=5),
    st.integers(1, 20),
    st.integers(1, 100),
    st.sampled_from([64, 128, 256]),
    *[st.booleans()] * 3,
)
@settings(max_examples=40)
def test_any_size_and_routing(counts, eights, half_k, v, pairs, gather, gated):
    cfg = replace(SMALL, pairs=pairs, gather=gather, **(GATED if gated else {}))
    run(cfg, 4 * eights, 2 * half_k, counts, v=v)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=70), st.integers(1, 9), st.sampled_from([1, 3, 1 << 20]))
def test_the_plan_gives_every_token_and_row_tile_once(counts, row_tiles, group):
    words = twin.plan_words(replace(SMALL, group=group))
    plan, experts, seen = plan_of(counts, 8), len(counts), set()
    for number in range(words["tiles"](plan, experts, row_tiles)):
        expert, row, first, end = words["place"](number, row_tiles, plan, experts)
        assert end == plan[expert] and (not expert or plan[expert - 1] <= first) and row < row_tiles
        seen |= {(row, token) for token in range(first, min(first + 8, end))}
    assert len(seen) == sum(counts) * row_tiles


# --- mistakes in the kernel text -------------------------------------------------------------------------------------

MISTAKES = {
    "no end of the plan": ("if tile.number() < tile.tiles(plan_gmem, experts, slabs):", "if True:"),
    "the plan ends early": ("tile.number() < tile.tiles", "tile.number() + 1 < tile.tiles"),
    "the previous launch not awaited": ("tile.await_previous()", "pass"),
    "the previous launch awaited by a warp": ("tile.await_previous()", "tile.first_block() or tile.await_previous()"),
    "blocks for slabs": ("row_blocks * 4", "row_blocks"),
    "weights of the first expert": ("weights_of(w_gmem, expert,", "weights_of(w_gmem, 0,"),
    "picks of the first expert": ("picks(picks_gmem, expert,", "picks(picks_gmem, 0,"),
    "picks of the first slab": ("expert, slab, rows, runs", "expert, 0, rows, runs"),
    "picks of the next run": ("load_picks(odd, picks, block,", "load_picks(odd, picks, block + run_blocks,"),
    "runs of half a length": ("block, run_blocks, runs)", "block, run_blocks // 2, runs)"),
    "tokens of another tile": ("rows_gmem, first, end,", "rows_gmem, first + 1, end,"),
    "tokens with another pitch": ("first, end, x_pitch)", "first, end, columns)"),
    "no zero": ("tile.zero(acc)", "pass"),
    "no weights": ("tile.load_weights(a, e, weights, slab, block, k_blocks)", "pass"),
    "no picks": ("tile.load_picks(odd, picks, block, run_blocks, runs)", "pass"),
    "no tokens": ("tile.load_tokens(x_gmem, sources, block, columns)", "pass"),
    "tokens not awaited": ("tile.wait_tokens()", "pass"),
    "columns beyond the last": ("sources, block, columns)", "sources, block, x_pitch)"),
    "all warps take the same blocks": ("tile.first_block()", "0"),
    "a round too few": ("k_blocks, tile.BLOCKS_A_ROUND", "k_blocks - 2, tile.BLOCKS_A_ROUND"),
    "no barrier": ("tile.barrier()", "pass"),
    "a warp misses the barrier": ("tile.barrier()", "tile.barrier() if tile.first_block() else None"),
    "nothing is shared": ("tile.share(acc)", "pass"),
    "the end of another expert": ("slab, first, end, outputs, y_pitch)", "slab, first, end + 1, outputs, y_pitch)"),
    "outputs are packed rows": ("end, outputs, y_pitch)", "end, rows, y_pitch)"),
    "another pitch of Y": ("outputs, y_pitch)", "outputs, outputs)"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_planted_mistake_is_found(mistake):
    make = mistaken(gemv_grouped, "make_gemv_grouped", MISTAKES[mistake])
    cfg = replace(SMALL, pairs=True, gather=True)
    case = dict(rows=128, k=400, counts=[3, 0, 11], v=128)  # every slab has rows
    run(cfg, **case)
    with pytest.raises((AssertionError, IndexError, ValueError, ZeroDivisionError, Deadlock, twin.KernelError)):
        run_with_four_seeds(cfg, **case, make=make)


# --- two vocabularies, and what the compiler makes of them -----------------------------------------------------------


def test_the_page_explains_every_word():
    """Those that the text says, with the arguments that the twin takes."""
    page, twins = explained("gemv") | explained("gemv_grouped"), vars(twin.make(replace(SMALL, pairs=True)))
    others, said = explained("grouped"), words_of(inspect.getsource(gemv_grouped)) - {"BLOCKS_A_ROUND"}
    assert set(explained("gemv_grouped")) <= said <= {*page, *others}
    for word in said:
        arguments = others[word] if word == "place" else page.get(word, others.get(word))
        assert arguments == [*inspect.signature(twins[word]).parameters], word


@pytest.mark.parametrize("pairs", [False, True], ids=["2:4", "samoyeds"])
def test_the_two_vocabularies_are_the_same(pairs):
    pytest.importorskip("numba_cuda", reason="needs numba-cuda")
    from nmsparse.cuda.tile.gpu import gemv_grouped as gpu

    cfg = replace(SMALL, pairs=pairs, gather=True)
    assert_same_words(vars(twin.make(cfg)), vars(gpu.make(cfg)))


SHIPPED = [
    replace(GroupedGemvConfig(), pairs=pairs, gather=not down, gated=not down, activation="identity" if down else act)
    for pairs in (False, True)
    for down, act in ((True, ""), *((False, act) for act in ("silu", "gelu", "gelu_tanh", "relu2")))
]
QUICK = (6,)
COMPILED = [pytest.param(cfg, marks=[] if i in QUICK else pytest.mark.slow) for i, cfg in enumerate(SHIPPED)]
COMPILED += [pytest.param(replace(SHIPPED[6], dtype="bf16"), marks=pytest.mark.slow)]


@pytest.mark.parametrize("cfg", COMPILED, ids=str)
def test_registers_and_machine_code(cfg, tmp_path):
    pytest.importorskip("numba_cuda", reason="needs numba-cuda")
    from nmsparse.cuda import launch

    assert not cfg.problems()
    cfg = replace(cfg, overlaps=True)
    cubin = launch.compiled(cfg, "sm_90a")
    used = cubin.resources()
    assert used["spill_stores"] == used["spill_loads"] == used["stack"] == 0
    assert used["registers"] * cfg.threads * cfg.ctas <= 65536
    opcodes, families = opcodes_of(disassembled(cubin.code, tmp_path))
    assert sum(opcode.startswith("HMMA.SP.16832.F32") for opcode in opcodes) == 2 * cfg.batch
    assert not {"LDL", "STL"} & set(families)
    assert_overlaps(" ".join(opcodes))


def test_a_config_says_what_is_wrong():
    assert len(replace(SMALL, tile_t=16, batch=3).problems()) == 2
