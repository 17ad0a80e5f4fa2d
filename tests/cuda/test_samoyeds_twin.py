"""The Samoyeds kernel text on its CPU twin: right numbers for every kind of config, run, shape and schedule."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
from gemm_cases import SamoyedsCase
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabulary import arguments_of, explained, words_of

from nmsparse.cuda.config import GemmConfig
from nmsparse.cuda.kernels import samoyeds as text
from nmsparse.cuda.layout import blocks_of
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
    replace(PAIRS, tile_t=16, stages=2, cluster=2, bias=True),
    replace(PAIRS, warpgroups=1, tile_t=32, tile_k=128, stages=2, cluster=4),
]
SHAPES = [(128, 8, 256, 3), (300, 77, 136, 5), (131, 1, 520, 0), (1, 9, 20, 7)]  # rows, tokens, columns, guard of Y
SCHEDULES = [(1, 0, 1), (2, 1, 2), (4, 2, 2), (3, 1, 3)]  # workers, split tiles, parts


def name(cfg):
    sizes = f"{cfg.warpgroups}x{cfg.tile_t}x{cfg.tile_k} stages {cfg.stages} cluster {cfg.cluster}"
    return f"{sizes} {cfg.dtype}{' bias' * cfg.bias}"


def fitting(cfg, rows, tokens, k, schedule):
    """``schedule`` with no more split tiles than there are, and no more parts than steps."""
    workers, split, parts = schedule
    tiles = -(-rows // (cfg.tile_m * cfg.cluster)) * -(-tokens // cfg.tile_t)
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


@given(st.data())
@settings(max_examples=30)
def test_any_size_schedule_and_order(data):
    cfg = data.draw(st.sampled_from(CONFIGS))
    rows, tokens, k = data.draw(st.tuples(st.integers(1, 300), st.integers(1, 70), st.integers(1, 300)))
    workers = data.draw(st.integers(1, 4 if cfg.cluster == 1 else 2))
    parts = data.draw(st.integers(1, workers))
    schedule = fitting(cfg, rows, tokens, k, (workers, data.draw(st.integers(0, workers // parts)), parts))
    v, guard = data.draw(st.sampled_from(runs_of(cfg, k))), data.draw(st.integers(0, 8))
    SamoyedsCase(cfg, rows, tokens, k, *schedule, guard=guard, v=v).run(data.draw(st.integers(0, 2**16)))


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
