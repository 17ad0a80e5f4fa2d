"""What ``bench accuracy`` sets out to measure, and what it makes of its rows. The measurement itself takes minutes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from nmsparse import demo
from nmsparse.bench import accuracy, experts
from nmsparse.bench.accuracy_plot import draw
from nmsparse.prune import METHODS

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
