"""What ``bench accuracy`` sets out to measure, and what it makes of its rows. The measurement itself takes minutes."""

from __future__ import annotations

import json
from argparse import Namespace
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from nmsparse import demo
from nmsparse.__main__ import main
from nmsparse.bench import accuracy, accuracy_page, experts
from nmsparse.bench.accuracy_plot import draw
from nmsparse.errors import NMSparseError
from nmsparse.prune import METHODS

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not demo.MODEL.exists(), reason="needs examples/tiny-moe of a checkout")


@pytest.fixture(scope="module")
def study():
    return accuracy.Study()


def test_the_plan_covers_patterns_methods_heights_and_seeds(study):
    plan = list(accuracy.plan(study))
    methods = Counter((a["pattern"], a["method"]) for a in plan if a["table"] == "methods" and "name" not in a)
    assert methods == Counter((p, m) for p in accuracy.PATTERNS for m in METHODS)
    heights = {a["pattern"] for a in plan if a["table"] == "heights"}
    assert {f"samoyeds:1:2:{v}" for v in (16, 32, 64, 128, 256)} < heights and len(heights) == 10
    seeds = [a["windows"] for a in plan if a["table"] == "seeds" and a["pattern"] == "2:4"]
    windows = [{window.tobytes() for window in text} for text in seeds]
    assert len(seeds) == 3 and not (windows[0] & windows[1] or windows[0] & windows[2] or windows[1] & windows[2])


def test_a_row_is_what_it_says(study, monkeypatch):
    monkeypatch.setattr(study, "heldout", study.heldout[:4])
    row = study.row("methods", "2:4", "magnitude", sample=2, windows=study.calibration[:1])
    assert row.nbytes == 7_962_624 and 0 < row.loss < 1 and row.bits == pytest.approx(row.loss + study.dense[2])


def test_bars_and_picture(tmp_path, capsys):
    losses = {"magnitude": 1.0, "sparsegpt": 0.6, "admm": 0.2}
    rows = [
        accuracy.Row("bars", pattern, method, 10, 1 + losses[method], losses[method], 1.0)
        for pattern, method in accuracy.BARS
    ]
    bars = accuracy.bars(rows)
    assert [bar["holds"] for bar in bars] == [False, True, True, True, True, True]
    assert "MISSED" in capsys.readouterr().out
    draw([vars(row) for row in rows] + bars, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_the_allocations_have_one_budget(study, monkeypatch):
    """And each pattern is tried once on a text."""
    monkeypatch.setattr(study, "heldout", study.heldout[:2])
    tried, found = [], accuracy.try_patterns

    def count(walk, patterns, method):
        tried.append(list(patterns))
        return found(walk, patterns, method)

    monkeypatch.setattr(accuracy, "try_patterns", count)
    windows = study.calibration[:1]
    rows = [
        study.row("droppable", "allocation", "magnitude", name="x", sample=1, windows=windows, choices=choices)
        for choices in accuracy.ALLOCATIONS["droppable"]
    ]
    assert tried == [list(accuracy.ALLOCATIONS["droppable"][0])]  # the second set is within the first
    for row, choices in zip(rows, accuracy.ALLOCATIONS["droppable"], strict=True):
        assert row.nbytes <= 4_008_960 and [sum(layer.values()) for layer in row.kinds] == [8, 8, 8]
        assert {kind for layer in row.kinds for kind in layer} <= set(choices) and row.stream_loss > 0
    uniform = study.row("uniform", accuracy.SAME_BYTES, "magnitude", sample=1, windows=windows)
    assert uniform.nbytes == 4_008_960 and uniform.kinds == [{accuracy.SAME_BYTES: 8}] * 3


def test_rows_are_chosen_by_name_and_seed(monkeypatch):
    monkeypatch.setattr(accuracy.Study, "row", lambda study, table, pattern, method, **rest: (table, pattern, method))

    def made(*globs, seeds=(0, 1, 2)):
        return list(accuracy.measured(Namespace(rows=globs, seeds=seeds)))

    assert made("heights *:16 admm") == [("heights", "samoyeds:1:2:16", "admm")]
    assert Counter(made("uniform *", "seeds 2:4 *", seeds=[1])) == {
        ("seeds", "2:4", "admm"): 1, ("uniform", "samoyeds:1:2:128", "admm"): 1, ("uniform", "vnm:128:2:8", "admm"): 1,
    }  # fmt: skip
    assert made() == [] and len(made("*")) == len(list(accuracy.plan(accuracy.Study())))


def invented(table, pattern, loss, *, method="admm", seed=0, nbytes=100):
    return accuracy.Row(table, pattern, method, nbytes, 1 + loss, loss, 1.0, seed, 0.5, [{pattern: 2}, {"drop": 1}])


def test_what_was_measured_elsewhere_makes_page_and_picture(tmp_path, capsys):
    """From two files of rows and one of recovery, all made up: a new row takes the place of the old one."""
    rows = [
        [invented("uniform", "2:4", 0.25, seed=seed) for seed in (1, 0)] + [invented("bars", "2:4", 0.75)],
        [invented("uniform", "2:4", 0.5, seed=1), invented("methods", "samoyeds:1:2:16", 0.875)],
    ]
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, some in zip(files, rows, strict=True):
        machine = {"date": "today", "command": f"made {path.stem}"}
        path.write_text(json.dumps({"machine": machine, "results": {"accuracy": [asdict(row) for row in some]}}))
    run = {"what": "run", "run": "samoyeds:1:2:16", "seconds": 60.2, "curve": [], "experts nbytes": 1234}
    runs = [{**run, "seed": seed, "bits": bits} for seed, bits in enumerate((1.5, 0.75, 1.25))]
    runs += [{"what": "dense", "bits": 1.0}, {**runs[0], "run": "narrower"}, {**runs[0], "run": "2:4", "bits": 1.125}]
    training, page, picture, out = (tmp_path / name for name in ("r.json", "page.md", "p.png", "out.json"))
    training.write_text(json.dumps({"results": {"recovery": runs}}))
    places = "".join(f"<!-- {make.__name__} -->\n<!-- end {make.__name__} -->\n" for make in accuracy_page.TABLES)
    page.write_text(f"before\n{places}after\n")
    command = ["bench", "accuracy", "--rows", "--with", *files, "--recovered", training]
    command += ["--page", page, "--plot", picture, "--json", out]
    assert main([str(word) for word in command]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "| 2:4 | 100 | +0.250, +0.500 | +0.375 | 0.50 | 2 × 2:4, 1 × drop |" in text
    assert "| `samoyeds:1:2:16` | 25% | 1,234 | +0.875* (`admm`) | 60 s | +0.500, -0.250, +0.250 | +0.250 |" in text
    assert "| `2:4` | 50% | 1,234 | +0.750 (`admm`) | 60 s | +0.125 | +0.125 |" in text and "narrower" not in text
    assert picture.stat().st_size > 1000
    kept = json.loads(out.read_text())
    assert kept["machine"]["joined"] == ["today: made a", "today: made b"]
    assert sum(row.get("table") == "uniform" for row in kept["results"]["accuracy"]) == 2
    page.write_text("no place")
    assert main([str(word) for word in command]) == 2 and "<!-- methods -->" in capsys.readouterr().err


def test_recovered_figures_need_those_of_the_dense_model(tmp_path):
    with pytest.raises(NMSparseError, match="--with"):
        list(accuracy.recovered([tmp_path / "none.json"], None))


def test_the_page_says_what_was_measured(tmp_path):
    """The tables of docs/accuracy.md are those that the result files make."""
    results = ROOT / "benchmarks" / "results"
    found = json.loads((results / "accuracy.json").read_text())["results"]["accuracy"]
    rows = [accuracy.Row(**row) for row in found if "table" in row]
    recovered = accuracy.recovered(
        sorted(results.glob("*-recovery*.json"), key=lambda path: path.stem), accuracy.dense_bits(rows)
    )
    page = tmp_path / "accuracy.md"
    page.write_text((ROOT / "docs" / "accuracy.md").read_text())
    accuracy_page.fill(page, accuracy.joined(rows, recovered))
    assert page.read_text() == (ROOT / "docs" / "accuracy.md").read_text()


def test_rows_of_experts(monkeypatch):
    """Removal, neurons and dropping on two windows, with gradients that are not those of the model."""
    settings = {
        "TEXT": 300, "SAMPLE": 1, "KEEP": (7,), "CLUSTERS": (21,), "SHARES": (1 / 2,),
        "DROPS": (((0.0, 0.0), "none"), ((0.3,), "none"), ((0.2, 0.4), "heapr"), ((2.0, 2.0), "abs_h")),
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setattr(experts, name, value)
    made = [type("Record", (), {"h_gradients": np.ones((8, 384))})] * 3
    monkeypatch.setattr(experts, "gradients", lambda windows: made)
    study = experts.ExpertStudy()
    study.heldout = study.heldout[:2]
    dense = 24 * 589_824
    removed, narrow, dropped = (list(part(study)) for part in experts.PARTS)
    assert [row.nbytes for row in removed] == [dense * 7 // 8] * 7 and all(row.loss > 0 for row in removed)
    assert [row.nbytes for row in narrow] == [dense // 2] * 10
    whole, halves, one, two, all_of_it = dropped
    for row in (whole, halves):
        assert row.skipped == 0 and row.bits == pytest.approx(study.dense_bits(1), abs=1e-5)
    assert 0 < one.skipped < 0.5 and 0 < two.skipped < 0.5 and all_of_it.skipped == 1
    assert all_of_it.loss > one.loss and all_of_it.seconds < whole.seconds
