"""The kernel for few tokens: its text on the twin against float64, planted mistakes, compiled without spills."""

from __future__ import annotations

import inspect

import ml_dtypes
import numpy as np
import pytest

import nmsparse
from nmsparse.cuda.config import SHIPPED_GEMV, GemvConfig
from nmsparse.cuda.kernels import gemv
from nmsparse.cuda.layout import pack_blocks
from nmsparse.cuda.tile.cpu import Deadlock
from nmsparse.cuda.tile.cpu import gemv as twin
from nmsparse.testing import assert_close

DTYPES = {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


def run(cfg, rows, tokens, k, make=gemv.make_gemv, kind="random", seed=0):
    rng, dtype = np.random.default_rng(rows + tokens + k), DTYPES[cfg.dtype]
    if kind == "one-hot":
        w, x = np.zeros((rows, k)), np.zeros((tokens, k))
        w[np.arange(rows), np.arange(rows) * 7 % k] = 1
        x[np.arange(tokens), np.arange(tokens) * 5 % k] = 1
    else:
        w, x = rng.standard_normal((rows, k)), rng.standard_normal((tokens, k))
    weight, bias = nmsparse.NMArray.from_dense(w.astype(dtype)), rng.standard_normal(rows).astype(dtype)
    wide = np.full((tokens, k + 6), np.nan).astype(dtype)
    wide[:, :k] = x
    y = np.full((tokens + 2, rows + 5), np.nan).astype(dtype)
    blocks = pack_blocks(weight.values, weight.meta)
    sizes = rows, tokens, k, wide.shape[1], y.shape[1], blocks.shape[1]
    twin.launch(make, cfg, -(-rows // 16), (blocks, wide, y, bias, *sizes), seed=seed)
    want = wide[:, :k].astype(np.float64) @ weight.todense().astype(np.float64).T + cfg.bias * bias.astype(np.float64)
    assert_close(y[:tokens, :rows], want, k, scale=np.abs(w).max() * np.abs(x).max())
    assert np.isnan(y[tokens:].astype(np.float32)).all() and np.isnan(y[:, rows:].astype(np.float32)).all()


@pytest.mark.parametrize("kind", ["one-hot", "random"])
@pytest.mark.parametrize(
    "cfg", [GemvConfig(warps=2, batch=1), GemvConfig(warps=3, batch=2, dtype="bf16", bias=True)], ids=str
)
@pytest.mark.parametrize(("rows", "tokens", "k"), [(16, 8, 64), (35, 3, 200), (70, 1, 136)])
def test_the_product_is_right(cfg, rows, tokens, k, kind):
    run(cfg, rows, tokens, k, kind=kind)


def test_two_groups_of_tokens():
    run(GemvConfig(tile_t=16, warps=2, batch=2), 20, 13, 300)


def run_with_four_seeds(*args, **kwargs):
    for seed in range(4):
        run(*args, **kwargs, seed=seed)


MISTAKES = {
    "no zero": ("tile.zero(acc)", "pass"),
    "no barrier": ("tile.barrier()", "pass"),
    "no weights": ("tile.load_weights(a, e, w_gmem, block, k_blocks)", "pass"),
    "no tokens": ("tile.load_tokens(b, x_gmem, block, tokens, columns, x_pitch)", "pass"),
    "all warps take the same blocks": ("tile.first_block()", "0"),
    "next block's tokens": ("tile.load_tokens(b, x_gmem, block,", "tile.load_tokens(b, x_gmem, block + 1,"),
    "swapped pitches": ("rows, tokens, y_pitch)", "rows, tokens, x_pitch)"),
    "a round too few": ("k_blocks, tile.BLOCKS_A_ROUND", "k_blocks - 2, tile.BLOCKS_A_ROUND"),
    "a warp misses the barrier": ("tile.barrier()", "tile.barrier() if tile.first_block() else None"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_found(mistake):
    source, (right, wrong) = inspect.getsource(gemv), MISTAKES[mistake]
    assert right in source
    names: dict = {}
    exec(source.replace(right, wrong), names)
    cfg = GemvConfig(warps=2, batch=1)
    run(cfg, 16, 5, 400)
    with pytest.raises((AssertionError, Deadlock, twin.KernelError)):
        run_with_four_seeds(cfg, 16, 5, 400, make=names["make_gemv"])


@pytest.mark.parametrize("cfg", SHIPPED_GEMV, ids=str)
def test_it_compiles_without_spills(cfg):
    pytest.importorskip("numba_cuda", reason="needs numba-cuda")
    from nmsparse.cuda import launch

    assert not cfg.problems()
    used = launch.compiled(cfg, "sm_90a").resources()
    assert used["spill_stores"] == used["spill_loads"] == used["stack"] == 0
    assert used["registers"] * cfg.threads * (2 if cfg.batch == 4 else 3) <= 65536


def test_a_config_says_what_is_wrong():
    assert len(GemvConfig(tile_t=7, warps=17, batch=3).problems()) == 3
