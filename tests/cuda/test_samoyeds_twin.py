"""The Samoyeds kernel text on its CPU twin: right numbers for every kind of config, run, shape and schedule."""

from __future__ import annotations

import inspect
from dataclasses import replace

import numpy as np
import pytest
from gemm_cases import SamoyedsCase
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabulary import arguments_of, explained, words_of

from nmsparse import SamoyedsArray
from nmsparse.cuda.config import GemmConfig
from nmsparse.cuda.kernels import samoyeds as text
from nmsparse.cuda.layout import blocks_of, pack_blocks
from nmsparse.cuda.tile import cpu
from nmsparse.cuda.tile.cpu import samoyeds

PAIRS = GemmConfig(pairs=True)
CONFIGS = [
    replace(PAIRS, tile_t=8, stages=2),
    replace(PAIRS, tile_t=16, stages=3, dtype="bf16", bias=True),
    replace(PAIRS, tile_t=32, tile_k=128, stages=2, bias=True),
    replace(PAIRS, tile_t=48, stages=4, group=1),
    replace(PAIRS, tile_t=128, tile_k=128, stages=3, dtype="bf16"),
    replace(PAIRS, tile_t=176, stages=2, bias=True),
    replace(PAIRS, warpgroups=1, tile_t=16, tile_k=128, stages=2),
    replace(PAIRS, warpgroups=1, tile_t=8, stages=4, bias=True),
    replace(PAIRS, warpgroups=3, tile_t=16, stages=2, bias=True),
    replace(PAIRS, tile_t=16, stages=6, bias=True),
    replace(PAIRS, warpgroups=1, tile_t=32, tile_k=128, stages=6),
]
SHAPES = [(128, 8, 256, 3), (300, 77, 136, 5), (131, 1, 520, 0), (1, 9, 20, 7)]  # rows, tokens, columns, guard of Y
SCHEDULES = [(1, 0, 1), (2, 1, 2), (4, 2, 2), (3, 1, 3)]  # workers, split tiles, parts


def name(cfg):
    sizes = f"{cfg.warpgroups}x{cfg.tile_t}x{cfg.tile_k} stages {cfg.stages}"
    return f"{sizes} {cfg.dtype}{' bias' * cfg.bias}"


def fitting(cfg, rows, tokens, k, schedule):
    """``schedule`` with no more split tiles than there are, and no more parts than steps."""
    workers, split, parts = schedule
    tiles = -(-rows // cfg.tile_m) * -(-tokens // cfg.tile_t)
    return workers, min(split, tiles), min(parts, blocks_of(rows, k)[1] * 64 // cfg.tile_k)


def runs_of(cfg, k):
    """Lengths of a run that a kernel takes: whole steps, also as many as all columns or more."""
    return [v for v in (64, 128, 256, 512) if v % cfg.tile_k == 0 and v < 2 * k + 256]


@pytest.mark.parametrize("kind", ["one-hot", "arange", "random"])
@pytest.mark.parametrize("cfg", CONFIGS, ids=name)
def test_the_product_is_right(cfg, kind):
    for seed, (rows, tokens, k, guard) in enumerate(SHAPES):
        runs = runs_of(cfg, k)
        v = runs[(seed + len(kind)) % len(runs)]
        schedule = fitting(cfg, rows, tokens, k, SCHEDULES[(CONFIGS.index(cfg) + seed) % len(SCHEDULES)])
        SamoyedsCase(cfg, rows, tokens, k, *schedule, kind=kind, guard=guard, v=v).run(seed)


@pytest.mark.parametrize("v", [64, 128, 256, 1024])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_part_may_begin_within_a_run(schedule, v):
    SamoyedsCase(CONFIGS[1], 200, 20, 600, *schedule, v=v).run()


@pytest.mark.parametrize("v", [128, 512])
@pytest.mark.parametrize("cluster", [2, 3, 4, 8])
@pytest.mark.parametrize("cfg", CONFIGS[-2:], ids=name)
def test_clusters_share_tiles(cfg, cluster, v):
    """Whose parts may begin within a run."""
    assert cluster in cfg.clusters
    SamoyedsCase(cfg, 300, 40, 1100, parts=cluster, v=v, guard=3).run(cluster)


@given(st.data())
@settings(max_examples=30)
def test_any_size_schedule_and_order(data):
    cfg = data.draw(st.sampled_from(CONFIGS))
    rows, tokens, k = data.draw(st.tuples(st.integers(1, 300), st.integers(1, 70), st.integers(1, 300)))
    workers = data.draw(st.integers(1, 4))
    parts = data.draw(st.integers(1, workers))
    schedule = fitting(cfg, rows, tokens, k, (workers, data.draw(st.integers(0, workers // parts)), parts))
    v, guard = data.draw(st.sampled_from(runs_of(cfg, k))), data.draw(st.integers(0, 8))
    SamoyedsCase(cfg, rows, tokens, k, *schedule, guard=guard, v=v).run(data.draw(st.integers(0, 2**16)))


def product(w, x, v=64):
    """``x @ w.T`` on the twin, with the pruned w; and what was pruned."""
    weight, cfg = SamoyedsArray.from_dense(w, v=v), replace(PAIRS, warpgroups=1, tile_t=16, stages=2)
    blocks, y = pack_blocks(weight.values, weight.meta), np.zeros((len(x), len(w)), np.float16)
    memory = blocks, weight.indices, x, y, None, np.zeros(0, np.float32), np.zeros(0, np.uint32)
    sizes = len(w), len(x), len(w), blocks.shape[1], 0, 1, v // cfg.tile_k, weight.indices.shape[1]
    cpu.launch(text.make_samoyeds, cfg, 1, (*memory, *sizes), make=samoyeds.make)
    return y, weight


def test_a_nan_reaches_the_pair_that_meets_it():
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((128, 256)).astype(np.float16), rng.standard_normal((16, 256)).astype(np.float16)
    x[3, 77] = np.nan
    y, weight = product(w, x)
    meets = weight.mask()[:, 77].reshape(64, 2).any(axis=1)
    assert 0 < meets.sum() < 64
    np.testing.assert_array_equal(np.isnan(y[3]), np.repeat(meets, 2))
    assert not np.isnan(np.delete(y, 3, axis=0)).any()


def test_a_small_row_beside_a_large_one():
    """An odd row is a difference: its error is that of fp32 sums of the pair."""
    rng = np.random.default_rng(1)
    w, x = rng.standard_normal((128, 512)), rng.standard_normal((16, 512)).astype(np.float16)
    w[0::2, 256:], w[1::2, :256] = 0, 0  # each row of a pair has the runs that the other has not
    w[0::2] *= 2.0**8
    w[1::2] *= 2.0**-4
    y, weight = product(w.astype(np.float16), x)
    pruned = weight.todense().astype(np.float64)
    assert (pruned.reshape(64, 2, 512) != 0).any(axis=2).all()
    want, scale = x.astype(np.float64) @ pruned.T, np.abs(x.astype(np.float64)) @ np.abs(pruned).T
    pair = scale.reshape(16, 64, 2).sum(axis=2).repeat(2, axis=1)
    assert (np.abs(y - want) <= 2.0**-11 * np.abs(want) + 2.0**-21 * pair).all()


def test_a_consumer_has_64_sub_rows():
    assert any("64 sub-rows" in problem for problem in replace(CONFIGS[0], blocks=2).problems())


def test_the_vocabulary_is_what_the_text_says_and_the_page_explains():
    said, page = words_of(inspect.getsource(text)), explained("gemm") | explained("samoyeds")
    assert said == set(vars(samoyeds.make(CONFIGS[0])))
    assert said == {*page, "PRODUCER"} - {"wait_wgmma_but_one"}
    assert not set(explained("gemm")) & set(explained("samoyeds"))


def test_arguments_on_the_page_are_those_of_the_words():
    page = explained("gemm") | explained("samoyeds")
    for word, function in vars(samoyeds.make(CONFIGS[0])).items():
        assert word == "PRODUCER" or page[word] == arguments_of(function), word
