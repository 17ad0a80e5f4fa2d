"""What ``bench accuracy`` sets out to measure, and what it makes of its rows. The measurement itself takes minutes."""

from __future__ import annotations

from collections import Counter

import pytest

from nmsparse import demo
from nmsparse.bench import accuracy
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
