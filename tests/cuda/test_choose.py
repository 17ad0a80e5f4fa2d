"""The choice of a kernel: valid for any problem, explained, and its model close to what was measured."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmsparse import NMSparseError
from nmsparse.cuda import choose, matmul
from nmsparse.cuda.choose import H200, Problem, candidates
from nmsparse.cuda.config import SHIPPED, SHIPPED_GEMV, GemmConfig, GemvConfig
from nmsparse.cuda.config_mma import MmaConfig

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize("config", [*SHIPPED, *SHIPPED_GEMV], ids=str)
def test_what_is_shipped_is_valid(config):
    assert config.problems() == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"warpgroups": 4}, "warpgroups=4"),
        ({"blocks": 3}, "blocks=3"),
        ({"tile_t": 24}, "tile_t=24"),
        ({"tile_k": 32}, "tile_k=32"),
        ({"stages": 1}, "stages=1"),
        ({"stages": 6}, "shared memory"),
        ({"blocks": 2}, "registers"),
        ({"warpgroups": 3}, "registers"),
        ({"warpgroups": 3, "tile_t": 208, "stages": 3}, "registers: ptxas needs 131"),
    ],
)
def test_a_config_says_what_is_wrong(change, reason):
    assert any(problem.startswith(reason) for problem in replace(GemmConfig(), **change).problems())


sizes = st.integers(1, 20000)


@given(sizes, sizes, sizes)
def test_every_problem_has_a_plan(rows, tokens, columns):
    plan = choose.choose(Problem(rows, tokens, columns))
    assert plan.seconds > 0
    assert plan.describe()
    if isinstance(plan.config, GemvConfig):
        assert tokens <= choose.FEW[16]
        assert plan.workers == -(-rows // plan.config.outputs) * -(-tokens // plan.config.tile_t)
    else:
        tiles, steps = choose.grid(plan.config, Problem(rows, tokens, columns))
        assert 1 <= plan.parts <= steps
        assert plan.split * plan.parts <= plan.workers <= H200.sms
        assert plan.split <= tiles
        if plan.cluster > 1:
            assert plan.workers == tiles * plan.cluster
            assert plan.cluster in plan.config.clusters


@given(sizes, sizes, st.sampled_from(SHIPPED))
def test_candidates_share_all_tiles(rows, tokens, config):
    problem = Problem(rows, tokens, 1024)
    tiles, _ = choose.grid(config, problem)
    for plan in candidates(config, problem, H200):
        assert (tiles - plan.split) % plan.workers == 0 or plan.split == 0
        if plan.cluster > 1:
            assert plan.workers == tiles * plan.cluster and tiles <= H200.clusters(plan.cluster)
        else:
            assert plan.workers <= max(tiles, plan.split * plan.parts)


def test_a_plan_says_which_clusters_fit():
    config = GemmConfig()
    assert config.clusters == ()
    with pytest.raises(NMSparseError, match="clusters of 2 CTAs cannot share a tile"):
        choose.Plan(config, 4, 0, 2, 0.0)
    assert choose.Plan(config, 4, 2, 2, 0.0).cluster == 1


def test_a_plan_in_clusters_has_one_for_each_tile():
    few = next(config for config in SHIPPED if 2 in config.clusters)
    matmul.check_clusters(choose.Plan(few, 8, 0, 2, 0.0), Problem(4 * few.tile_m, few.tile_t, 256))
    for workers, rows, columns in ((7, 4 * few.tile_m, 256), (8, 5 * few.tile_m, 256), (8, 4 * few.tile_m, 128)):
        with pytest.raises(NMSparseError, match="expected 2 CTAs for each"):
            matmul.check_clusters(choose.Plan(few, workers, 0, 2, 0.0), Problem(rows, few.tile_t, columns))


def test_a_plan_of_the_kernel_for_few_tokens_has_a_cta_for_each_tile():
    config = GemvConfig()
    assert choose.tiles_of(config, Problem(100, 20, 64)) == 7 * 3
    matmul.check_tiles(choose.Plan(config, 21, 0, 1, 0.0), Problem(100, 20, 64))
    with pytest.raises(NMSparseError, match="expected a plan of 21 CTAs for 20 tokens, got 7"):
        matmul.check_tiles(choose.Plan(config, 7, 0, 1, 0.0), Problem(100, 20, 64))


@pytest.mark.parametrize(
    ("config", "width"), [(GemmConfig(), 16), (GemvConfig(), 16), (GemvConfig(width=4), 4), (MmaConfig(), 16)], ids=str
)
def test_a_kernel_says_where_rows_have_to_be(config, width):
    matmul.check_alignment(config, 64 * width)
    with pytest.raises(NMSparseError, match=f"at multiples of {width} bytes, got {width // 2}"):
        matmul.check_alignment(config, 64 * width + width // 2)


def test_single_elements_may_be_anywhere():
    matmul.check_alignment(MmaConfig(vector=False), 2)


@given(st.integers(1, 30000), st.integers(1, 64), st.integers(1, 30000), st.floats(2e11, 4e12), st.booleans())
def test_no_plan_is_faster_than_its_memory(rows, tokens, columns, memory, samoyeds):
    device = replace(H200, memory=memory)
    problem = Problem(rows, tokens, columns, run=128 if samoyeds else 0)
    for plan in choose.plans(problem, device):
        assert plan.seconds > problem.nbytes / (1.15 * memory)


def test_few_tokens_do_not_take_the_large_tile():
    assert isinstance(choose.choose(Problem(1408, 1, 2048)).config, GemvConfig)
    assert choose.choose(Problem(14336, 64, 4096)).config.tile_t == 64
    assert choose.choose(Problem(8192, 8192, 8192)).config.tile_t == 256
    assert not isinstance(choose.choose(Problem(1408, 1, 2048, alignment=2)).config, GemvConfig)


def test_the_choice_can_be_printed(monkeypatch, capsys):
    monkeypatch.setenv("NMSPARSE_PRINT_CONFIG", "1")
    choose.choose.cache_clear()
    plan = choose.choose(Problem(4096, 16, 4096))
    choose.choose(Problem(4096, 16, 4096))
    printed = capsys.readouterr().err
    assert printed.count("Problem(rows=4096, tokens=16") == 1
    assert plan.describe() in printed
    choose.choose.cache_clear()


def test_the_model_is_close_to_the_measured_times():
    """Of the plans that were measured, whichever would be chosen now."""
    error = []
    for row in json.loads((RESULTS / "h200-gemm.json").read_text())["results"]["gemm"]:
        if row["what"] == "case":
            run = int(row["pattern"].split(":")[3]) if row["pattern"].startswith("samoyeds") else 0
            dtype = {"float16": "f16", "bfloat16": "bf16"}[row["dtype"]]
            problem = Problem(row["rows"], row["tokens"], row["columns"], dtype, run=run)
            plans = [plan for plan in choose.plans(problem, H200) if plan.describe() == row["config"]]
            error += [abs(plan.seconds / row["ours"] - 1) for plan in plans]
    assert len(error) > 320
    assert statistics.median(error) < 0.10
    assert statistics.quantiles(error, n=10)[-1] < 0.30
