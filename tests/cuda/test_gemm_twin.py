"""The kernel text on its CPU twin: right numbers for every kind of config, shape and schedule."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from gemm_cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabulary import arguments_of, explained, words_of

from nmsparse.cuda.config import SHIPPED, GemmConfig
from nmsparse.cuda.kernels import gemm
from nmsparse.cuda.layout import blocks_of, pack_blocks
from nmsparse.cuda.tile import cpu
from nmsparse.cuda.tile.cpu import multiply
from nmsparse.formats import NMArray, fragments

CONFIGS = [
    GemmConfig(warpgroups=1, tile_t=8, stages=2),
    GemmConfig(warpgroups=1, tile_t=8, tile_k=128, stages=4, dtype="bf16", bias=True),
    GemmConfig(warpgroups=2, tile_t=16, stages=3, bias=True),
    GemmConfig(warpgroups=1, blocks=2, tile_t=32, stages=2, dtype="bf16"),
    GemmConfig(warpgroups=2, blocks=2, tile_t=16, tile_k=128, stages=2),
    GemmConfig(warpgroups=2, tile_t=64, stages=4, group=1),
    GemmConfig(warpgroups=2, tile_t=48, stages=2, bias=True),
    GemmConfig(warpgroups=3, tile_t=16, stages=2),
    GemmConfig(warpgroups=1, tile_t=16, stages=6),
    GemmConfig(warpgroups=2, tile_t=64, tile_k=128, stages=4, dtype="bf16", bias=True),
]
CLUSTERS = 2, 3, 4, 8
SHAPES = [(64, 8, 128), (200, 77, 136), (130, 1, 500), (65, 33, 520), (1, 9, 20)]
SCHEDULES = [(1, 0, 1), (2, 0, 1), (2, 1, 2), (4, 2, 2), (3, 1, 3), (2, 2, 1)]  # workers, split tiles, parts


def name(cfg):
    sizes = f"{cfg.warpgroups}x{cfg.blocks}x{cfg.tile_t}x{cfg.tile_k} stages {cfg.stages}"
    return f"{sizes} {cfg.dtype}{' bias' * cfg.bias}"


def fitting(cfg, shape, schedule):
    """``schedule`` with no more split tiles than there are, and no more parts than steps."""
    (rows, tokens, k), (workers, split, parts) = shape, schedule
    tiles = -(-rows // cfg.tile_m) * -(-tokens // cfg.tile_t)
    return workers, min(split, tiles), min(parts, blocks_of(rows, k)[1] * 64 // cfg.tile_k)


@pytest.mark.parametrize("kind", ["one-hot", "arange", "random"])
@pytest.mark.parametrize("cfg", CONFIGS, ids=name)
def test_the_product_is_right(cfg, kind):
    for seed, shape in enumerate(SHAPES):
        Case(cfg, *shape, *fitting(cfg, shape, SCHEDULES[(CONFIGS.index(cfg) + seed) % len(SCHEDULES)]), kind).run(seed)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("cfg", [CONFIGS[2], CONFIGS[7]], ids=name)
def test_every_schedule_is_right(cfg, schedule):
    Case(cfg, 200, 77, 648, *schedule).run()


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("cfg", CONFIGS[-2:], ids=name)
def test_clusters_share_tiles(cfg, cluster):
    """Of as many steps as CTAs, or more; rows and tokens that do not fill a tile."""
    assert cluster in cfg.clusters
    for seed, (rows, tokens, k) in enumerate([(200, 77, 1100), (64, 1, 64 * cfg.tile_k // 64 * cluster)]):
        Case(cfg, rows, tokens, k, parts=cluster).run(seed)


@pytest.mark.parametrize("cfg", SHIPPED, ids=name)
def test_shipped_configs_are_right(cfg):
    Case(replace(cfg, bias=True), 300, cfg.tile_t + 5, 1000, workers=4, split=2, parts=2).run()


@given(st.data())
@settings(max_examples=40)
def test_any_size_schedule_and_order(data):
    cfg = data.draw(st.sampled_from(CONFIGS))
    shape = tuple(data.draw(st.tuples(st.integers(1, 260), st.integers(1, 70), st.integers(1, 300))))
    workers = data.draw(st.integers(1, 4))
    parts = data.draw(st.integers(1, workers))
    schedule = fitting(cfg, shape, (workers, data.draw(st.integers(0, workers // parts)), parts))
    Case(cfg, *shape, *schedule).run(data.draw(st.integers(0, 2**16)))


def test_every_order_gives_the_same_bits():
    """Partial sums are added in the order of k, whoever is first."""
    results = []

    def kept(tile, cfg):
        def run(w_gmem, x_gmem, y_gmem, *rest):
            results.append(y_gmem)
            kernel(w_gmem, x_gmem, y_gmem, *rest)

        kernel = gemm.make_gemm(tile, cfg)
        return run

    for seed in range(4):
        Case(CONFIGS[2], 100, 30, 1000, workers=3, split=1, parts=3, make_kernel=kept).run(seed)
    assert len({y.tobytes() for y in results}) == 1


def test_what_the_metadata_does_not_name_is_not_multiplied():
    """inf · 0 would be NaN; a column that a row does not keep does not reach it."""
    w = np.zeros((64, 64), np.float16)
    w[:, ::4] = 1
    W = NMArray.from_dense(w)
    block = pack_blocks(W.values, W.meta)[0, 0]
    x = np.ones((8, 64), np.float16)
    x[3, 2::4] = np.inf
    assert not (W.todense()[:, 2::4]).any()
    row, chunk = np.arange(8)[:, None], np.arange(8)
    swizzled = np.empty((8, 8, 16), np.uint8)
    swizzled[row, fragments.swizzle_128b(row, chunk)] = x.view(np.uint8).reshape(8, 8, 16)
    registers = multiply.metadata_registers(block)
    d = sum(multiply.sparse_product(swizzled.reshape(8, 128), block, registers[h], h, x.dtype) for h in (0, 1))
    np.testing.assert_array_equal(d, np.full((64, 8), 16))


def test_the_vocabulary_is_what_the_text_says_and_the_page_explains():
    said = words_of(inspect.getsource(gemm))
    assert said == set(vars(cpu.make(CONFIGS[0])))
    assert said == {*explained("gemm"), "PRODUCER"}


def test_arguments_on_the_page_are_those_of_the_words():
    page = explained("gemm")
    for word, function in vars(cpu.make(CONFIGS[0])).items():
        assert word == "PRODUCER" or page[word] == arguments_of(function), word


def test_no_gpu_library_is_needed():
    twins = "nmsparse.cuda.tile.cpu.samoyeds, nmsparse.cuda.tile.cpu.grouped"
    texts = "nmsparse.cuda.kernels.gemm, nmsparse.cuda.kernels.samoyeds, nmsparse.cuda.kernels.grouped"
    code = f"import sys, {twins}, {texts}; print({{'numba', 'cuda'}} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
