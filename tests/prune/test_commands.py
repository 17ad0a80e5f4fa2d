"""``nmsparse prune`` and ``nmsparse eval``, end to end on a piece of tiny-moe."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from nmsparse import __main__, demo
from nmsparse.calibration import ExpertReport, MixtralWalk, PrunedLayer, survey
from nmsparse.cli.prune import report
from nmsparse.io import Checkpoint
from nmsparse.prune.experts import super_experts

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
    assert "50.0%" in printed and "24 of 24 experts saw few tokens" in printed and "8.0 MB of 14.2 MB, 56%" in printed
    assert f"python -m nmsparse eval {out}" in printed and picture.stat().st_size > 1000
    checkpoint = Checkpoint(out)
    assert len(checkpoint.sparse_names) == 6
    facts = bits(capsys, out)
    dense = bits(capsys, demo.MODEL)
    assert facts["expert_bytes"] == 7_962_624 < dense["expert_bytes"]
    assert dense["bits_per_byte"] < facts["bits_per_byte"] < 3
    assert json.loads((out / "config.json").read_text())["nmsparse"]["method"] == "wanda"


def test_a_budget_gives_each_expert_its_pattern(tmp_path, capsys):
    out, budget = tmp_path / "out", 10_000_000
    choices = ("dense", "2:4", "vnm:64:2:8", "drop")
    run(
        capsys, "prune", demo.MODEL, out, "--pattern", *choices, "--method", "magnitude", "--windows", 2,
        "--budget", budget,
    )  # fmt: skip
    checkpoint = Checkpoint(out)
    kinds = checkpoint["model.layers.0.block_sparse_moe.experts.down_proj"].kinds
    assert len(kinds) == 8 and set(kinds) <= set(choices) and len(set(kinds)) > 1
    stored = [checkpoint.describe(name).nbytes for name in checkpoint if name.endswith(("gate_up_proj", "down_proj"))]
    assert 0.9 * budget < sum(stored) <= budget
    assert bits(capsys, out)["bits_per_byte"] < 8


def test_guarded_experts_stay_dense(tmp_path, capsys):
    """Of two dozen experts, one is above the percentile."""
    run(
        capsys, "prune", demo.MODEL, tmp_path / "out", "--guard", "--method", "magnitude", "--windows", 1,
        "--pattern", "2:4",
    )  # fmt: skip
    held = [weight for name, weight in sorted(Checkpoint(tmp_path / "out").items()) if name.endswith("down_proj")]
    kinds = [getattr(weight, "kinds", ["2:4"] * 8) for weight in held]
    walk = MixtralWalk(demo.load_model(demo.MODEL), demo.read_windows(demo.MODEL / "calibration.txt", 1))
    guard = super_experts(np.stack([record.largest for record in survey(walk)]))
    assert guard.sum() == 1 and np.array_equal(np.array(kinds) == "dense", guard)


def test_a_report_of_many_experts_has_a_row_for_each_layer():
    one = ExpertReport(0, 0, "2:4", 10, False, 0.5, 1000, 0.1, 0.2, 0.3)
    layers = [PrunedLayer([], [], [replace(one, layer=i, expert=e) for e in range(40)]) for i in range(2)]
    printed = report(layers, "admm", 160_000)
    assert len(printed.splitlines()) == 4 and "40 x 2:4" in printed and "80.0 kB of 160.0 kB, 50%" in printed


def test_eval_refuses_what_it_cannot_run(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "mixtral", "vocab_size": 32000}')
    assert __main__.main(["eval", str(tmp_path)]) == 2
    assert "vocabulary of the 256 bytes" in capsys.readouterr().err


def test_what_is_asked_of_the_arguments(tmp_path, capsys):
    for words, message in (
        (("--pattern", "2:4", "4:8"), "one pattern without --budget"),
        (("--pattern", "2:4", "--guard", "--neurons", "0.5"), "give one of them"),
        (("--pattern", "2:4", "--neurons", "1.5"), "--neurons: expected a share above 0"),
        (("--pattern", "drop"), "one pattern without --budget"),
        (("--pattern", "2:4", "--windows", "0"), "--windows: expected 1 or more"),
        (("--pattern", "2/4"), "'2/4' is not understood"),
        (("--pattern", "2:4", "--calibration", "nowhere.txt"), "there is none in nowhere.txt"),
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
