"""The kernel for few tokens: its text on the twin against float64, planted mistakes, compiled without spills."""

from __future__ import annotations

import inspect
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_texts import assert_same_words, mistaken
from vocabulary import explained, words_of

import nmsparse
from nmsparse.cuda.config import SHIPPED_GEMV, SHIPPED_GEMV_SAMOYEDS, GemvConfig
from nmsparse.cuda.kernels import gemv
from nmsparse.cuda.layout import pack_blocks
from nmsparse.cuda.tile.cpu import Deadlock
from nmsparse.cuda.tile.cpu import gemv as twin
from nmsparse.testing import assert_close

SMALL = GemvConfig(warps=2, batch=1, pairs=True)
DTYPES = {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


def run(cfg, rows, tokens, k, make=gemv.make_gemv, kind="random", seed=0, v=64):
    rng, dtype = np.random.default_rng(rows + tokens + k), DTYPES[cfg.dtype]
    if kind == "one-hot":
        w, x = np.zeros((rows, k)), np.zeros((tokens, k))
        w[np.arange(rows), np.arange(rows) * 7 % k] = 1
        x[np.arange(tokens), np.arange(tokens) * 5 % k] = 1
    else:
        w, x = rng.standard_normal((rows, k)), rng.standard_normal((tokens, k))
    w, bias = w.astype(dtype), rng.standard_normal(rows).astype(dtype)
    weight = nmsparse.SamoyedsArray.from_dense(w, v=v) if cfg.pairs else nmsparse.NMArray.from_dense(w)
    wide = np.full((tokens, k + 6), np.nan).astype(dtype)
    wide[:, :k] = x
    y = np.full((tokens + 2, rows + 5), np.nan).astype(dtype)
    blocks = pack_blocks(weight.values, weight.meta)
    runs = weight.indices.shape[1] if cfg.pairs else 1
    sizes = rows, tokens, k, wide.shape[1], y.shape[1], blocks.shape[1], v // 64, runs
    ctas = -(-rows // cfg.outputs) * -(-tokens // cfg.tile_t)
    twin.launch(make, cfg, ctas, (blocks, weight.indices, wide, y, bias, *sizes), seed=seed)
    want = wide[:, :k].astype(np.float64) @ weight.todense().astype(np.float64).T + cfg.bias * bias.astype(np.float64)
    scale = np.abs(w.astype(np.float64)).max() * np.abs(x).max()
    assert_close(y[:tokens, :rows], want, k, scale=scale)
    assert np.isnan(y[tokens:].astype(np.float32)).all() and np.isnan(y[:, rows:].astype(np.float32)).all()


@pytest.mark.parametrize("kind", ["one-hot", "random"])
@pytest.mark.parametrize(
    "cfg", [GemvConfig(warps=2, batch=1), GemvConfig(warps=3, batch=2, dtype="bf16", bias=True)], ids=str
)
@pytest.mark.parametrize(("rows", "tokens", "k"), [(16, 8, 64), (35, 3, 200), (70, 1, 136)])
def test_the_product_is_right(cfg, rows, tokens, k, kind):
    run(cfg, rows, tokens, k, kind=kind)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("tokens", [13, 37])
def test_several_groups_and_tiles_of_tokens(tokens, pairs):
    run(GemvConfig(tile_t=16, warps=2, batch=2, pairs=pairs), 40, tokens, 300)


@pytest.mark.parametrize("kind", ["one-hot", "random"])
@pytest.mark.parametrize("v", [64, 128, 192, 512])
@pytest.mark.parametrize("cfg", [replace(SMALL, batch=2), replace(SMALL, warps=3, dtype="bf16", bias=True)], ids=str)
def test_samoyeds_is_right(cfg, v, kind):
    run(cfg, 75, 3, 392, kind=kind, v=v)


@given(st.integers(1, 80), st.integers(1, 20), st.integers(1, 200), st.sampled_from([64, 128, 256]), st.booleans())
@settings(max_examples=30)
def test_any_size(rows, tokens, half_k, v, pairs):
    run(replace(SMALL, pairs=pairs, bias=True), rows, tokens, 2 * half_k, v=v)


def test_a_nan_reaches_the_row_that_was_picked_and_no_other():
    w = np.zeros((32, 64), np.float16)
    w[::2, 0], w[1::2, 1] = 2, 1
    weight = nmsparse.SamoyedsArray.from_dense(w, v=64)
    x, y = np.ones((1, 64), np.float16), np.zeros((1, 32), np.float16)
    x[0, 0] = np.nan
    blocks = pack_blocks(weight.values, weight.meta)
    twin.launch(gemv.make_gemv, SMALL, 1, (blocks, weight.indices, x, y, None, 32, 1, 64, 64, 32, 2, 1, 1))
    np.testing.assert_array_equal(np.isnan(y[0]), [True, False] * 16)


def run_with_four_seeds(*args, **kwargs):
    for seed in range(4):
        run(*args, **kwargs, seed=seed)


MISTAKES = {
    "no zero": ("tile.zero(acc)", "pass"),
    "no barrier": ("tile.barrier()", "pass"),
    "sums in the place of tokens on their way": (
        "tile.share(acc)",
        "tile.load_tokens(x_gmem, token, 0, tokens, columns, x_pitch); tile.share(acc)",
    ),
    "tokens in the place of sums": (
        "tile.barrier()",
        "tile.load_tokens(x_gmem, token, 0, tokens, columns, x_pitch); tile.barrier()",
    ),
    "no weights": ("tile.load_weights(a, e, w_gmem, slab, block, k_blocks)", "pass"),
    "no picks": ("tile.load_picks(odd, picks, block, run_blocks, runs)", "pass"),
    "picks of the next run": ("load_picks(odd, picks, block,", "load_picks(odd, picks, block + run_blocks,"),
    "runs of half a length": ("block, run_blocks, runs)", "block, run_blocks // 2, runs)"),
    "picks of the first slab": ("tile.picks(picks_gmem, slab,", "tile.picks(picks_gmem, 0,"),
    "no tokens": ("tile.load_tokens(x_gmem, token, block, tokens, columns, x_pitch)", "pass"),
    "tokens not awaited": ("tile.wait_tokens()", "pass"),
    "the first tile's tokens": ("tile.load_tokens(x_gmem, token,", "tile.load_tokens(x_gmem, 0,"),
    "stored as the first tile": ("slab, token, rows, tokens, y_pitch)", "slab, 0, rows, tokens, y_pitch)"),
    "as many tiles as tokens": ("tile.place(tokens)", "tile.place(tile.BLOCKS_A_ROUND * tokens)"),
    "all warps take the same blocks": ("tile.first_block()", "0"),
    "next block's tokens": ("tile.load_tokens(x_gmem, token, block,", "tile.load_tokens(x_gmem, token, block + 1,"),
    "swapped pitches": ("rows, tokens, y_pitch)", "rows, tokens, x_pitch)"),
    "a round too few": ("k_blocks, tile.BLOCKS_A_ROUND", "k_blocks - 2, tile.BLOCKS_A_ROUND"),
    "a warp misses the barrier": ("tile.barrier()", "tile.barrier() if tile.first_block() else None"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_found(mistake):
    make = mistaken(gemv, "make_gemv", MISTAKES[mistake])
    case = dict(rows=64, tokens=11, k=400, v=128)
    run(SMALL, **case)
    with pytest.raises((AssertionError, Deadlock, twin.KernelError)):
        run_with_four_seeds(SMALL, **case, make=make)


def test_the_page_explains_every_word():
    """Those that the text says, with the arguments that the twin takes."""
    page, twins = explained("gemv"), vars(twin.make(SMALL))
    assert words_of(inspect.getsource(gemv)) == {*page, "BLOCKS_A_ROUND"}
    for word, arguments in page.items():
        assert arguments == [*inspect.signature(twins[word]).parameters], word


def test_the_two_vocabularies_are_the_same():
    """Same words, same arguments, on NumPy and on the GPU."""
    pytest.importorskip("numba_cuda", reason="needs numba-cuda")
    from nmsparse.cuda.tile.gpu import gemv as gpu

    for pairs in (False, True):
        cfg = replace(SMALL, pairs=pairs)
        assert_same_words(vars(twin.make(cfg)), vars(gpu.make(cfg)))


@pytest.mark.parametrize(
    "cfg",
    [
        *SHIPPED_GEMV,
        *(replace(cfg, dtype="bf16", bias=True) for cfg in SHIPPED_GEMV_SAMOYEDS),
        *(replace(cfg, width=4) for cfg in (*SHIPPED_GEMV, *SHIPPED_GEMV_SAMOYEDS) if cfg.tile_t == 8),
    ],
    ids=str,
)
def test_it_compiles_without_spills(cfg):
    pytest.importorskip("numba_cuda", reason="needs numba-cuda")
    from nmsparse.cuda import launch

    assert not cfg.problems()
    used = launch.compiled(cfg, "sm_90a").resources()
    assert used["spill_stores"] == used["spill_loads"] == used["stack"] == 0
    assert used["registers"] * cfg.threads * cfg.ctas <= 65536


def test_a_config_says_what_is_wrong():
    assert len(GemvConfig(tile_t=7, warps=17, batch=3, width=8).problems()) == 4
    assert GemvConfig(tile_t=16, warps=16).problems() == []
    assert GemvConfig(tile_t=16, width=4).problems()[0].startswith("width=4, tile_t=16")
