"""``nmsparse prune`` and ``nmsparse eval``, end to end on a piece of tiny-moe."""

from __future__ import annotations

import json

import numpy as np
import pytest

from nmsparse import __main__, demo
from nmsparse.io import Checkpoint

pytestmark = pytest.mark.skipif(not demo.MODEL.exists(), reason="needs examples/tiny-moe of a checkout")


def run(capsys, *words) -> str:
    code = __main__.main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def bits(capsys, path) -> dict:
    return json.loads(run(capsys, "eval", path, "--windows", 3, "--json"))


def test_prune_then_eval(tmp_path, capsys):
    out, picture = tmp_path / "out", tmp_path / "picture.png"
    printed = run(
        capsys, "prune", demo.MODEL, out, "--pattern", "2:4", "--method", "wanda", "--windows", 2, "--plot", picture
    )
    assert "50.0%" in printed and "experts saw too few tokens" in printed and picture.stat().st_size > 1000
    checkpoint = Checkpoint(out)
    assert len(checkpoint.sparse_names) == 6
    facts = bits(capsys, out)
    dense = bits(capsys, demo.MODEL)
    assert facts["expert_bytes"] == 7_962_624 < dense["expert_bytes"]
    assert dense["bits_per_byte"] < facts["bits_per_byte"] < 3
    assert json.loads((out / "config.json").read_text())["nmsparse"]["method"] == "wanda"


def test_a_budget_gives_each_expert_its_pattern(tmp_path, capsys):
    out, budget = tmp_path / "out", 10_000_000
    choices = ("dense", "2:4", "vnm:64:2:8")
    run(
        capsys, "prune", demo.MODEL, out, "--pattern", *choices, "--method", "magnitude", "--windows", 2,
        "--budget", budget,
    )  # fmt: skip
    checkpoint = Checkpoint(out)
    prefix = "model.layers.0.block_sparse_moe.experts"
    kinds = {checkpoint.describe(f"{prefix}.{e}.down_proj").pattern for e in range(8)}
    assert len(kinds) > 1
    stored = [checkpoint.describe(name).nbytes for name in checkpoint if name.endswith(("gate_up_proj", "down_proj"))]
    assert 0.9 * budget < sum(stored) <= budget
    assert bits(capsys, out)["bits_per_byte"] < 8


def test_what_is_asked_of_the_arguments(tmp_path, capsys):
    for words, message in (
        (("--pattern", "2:4", "4:8"), "one pattern without --budget"),
        (("--pattern", "2:4", "--reorder", "--neurons", "0.5"), "give one of them"),
        (("--pattern", "2:4", "--windows", "0"), "--windows: expected 1 or more"),
        (("--pattern", "2/4"), "'2/4' is not understood"),
        (("--pattern", "2:4", "--calibration", "nowhere.txt"), "nowhere.txt is missing"),
    ):
        assert __main__.main(["prune", str(demo.MODEL), str(tmp_path / "out"), *words]) == 2
        assert message in capsys.readouterr().err
    assert __main__.main(["prune", str(demo.MODEL), str(tmp_path), "--pattern", "2:4"]) == 2
    assert "already exists" in capsys.readouterr().err


def test_a_pruned_model_runs_on_the_sparse_kernels_as_its_masked_twin(tmp_path, capsys):
    out = tmp_path / "out"
    run(
        capsys, "prune", demo.MODEL, out, "--pattern", "samoyeds:1:2:128", "--method", "magnitude", "--windows", 1,
        "--neurons", "0.5",
    )  # fmt: skip
    model, windows = demo.load_model(out), demo.read_windows(demo.MODEL / "heldout.txt", 1)
    assert model.experts[0].intermediate_size == 192
    twin = model.with_experts(lambda w: w.todense().astype(np.float32))
    expected = twin(windows)
    assert np.abs(model(windows) - expected).max() < 1e-3 * np.abs(expected).max()
