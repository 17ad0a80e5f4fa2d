"""`bench moe` from end to end on the host, with a clock of the test's own, and its bars on made-up rows."""

from __future__ import annotations

import argparse
import json

import pytest

from nmsparse import bench
from nmsparse.bench import moe
from nmsparse.bench.gpu import Timed
from nmsparse.bench.moe import measure, plot, report
from nmsparse.bench.moe.cases import MODELS, ROUTINGS, TOKENS, Case, Model

torch = pytest.importorskip("torch", reason="the benchmark runs on torch")

PATTERNS = ("2:4", "samoyeds:1:2:128")
OURS = ("dense", *PATTERNS)
SMALL = Model("small", 6, 128, 128, 2)


@pytest.fixture
def on_the_host(monkeypatch):
    """No graphs, no events: calls are made once, and take as many seconds as their name has letters."""

    def captured(runs):
        results = [run() for run in runs]
        return Timed(lambda: [r.copy_(run()) for r, run in zip(results, runs, strict=True)], len(runs)), results

    monkeypatch.setattr(measure, "captured", captured)
    monkeypatch.setattr(measure, "seconds_of", lambda timed, **options: {name: len(name) for name in timed})
    monkeypatch.setattr(measure, "waits_for_gpu", lambda run: False)


@pytest.mark.filterwarnings("ignore")  # what transformers says when it is imported is not ours
@pytest.mark.parametrize("case", [Case(SMALL, 1, "uniform"), Case(SMALL, 9, "skewed")], ids=str)
def test_a_case_is_checked_and_timed(on_the_host, case):
    pytest.importorskip("transformers", reason="its experts are peers")
    with torch.inference_mode():
        made, failed = measure.contenders(SMALL, PATTERNS, device="cpu")
        row = measure.measure(case, made, device="cpu")
    assert set(failed) <= {"triton", "dense"} and not row["failed"]  # dense tensors as experts: on a GPU
    assert set(made) == set(row["error"]) == set(row["seconds"])
    assert max(row["error"].values()) < 1e-2
    assert set(PATTERNS) <= set(row["checks"]) <= set(OURS)
    assert all(all(checks.values()) for checks in row["checks"].values())
    assert made["samoyeds:1:2:128"].nbytes < made["2:4"].nbytes < made["grouped_mm"].nbytes
    report.complete(row, case, made)
    assert row["best"]["torch"] == "grouped_mm" and row["over"]["torch"]["2:4"] == len("grouped_mm") / len("2:4")
    assert "grouped_mm" in report.line(row)
    json.dumps(row, allow_nan=False)


@pytest.mark.filterwarnings("ignore")
def test_wrong_results_are_seen(on_the_host):
    with torch.inference_mode():
        made, _ = measure.contenders(SMALL, (), device="cpu")
        good, calls = made["grouped_mm"], []

        def unsteady(x, ids, weights):
            calls.append(ids)
            return good.call(x, ids, weights) * (1 + 0.01 * (len(calls) % 2))

        def broken(x, ids, weights):
            raise RuntimeError("no kernel\nfor this")

        contenders = {
            "steady": good._replace(family="ours"),
            "unsteady": good._replace(call=unsteady, family="ours"),
            "deaf": good._replace(call=lambda x, ids, weights: x.clone(), family="ours"),
            "broken": good._replace(call=broken),
        }
        row = measure.measure(Case(SMALL, 9, "uniform"), contenders, device="cpu")
    assert set(row["failed"]) == {"broken", "deaf"} and set(row["seconds"]) == {"steady", "unsteady"}
    assert row["failed"]["broken"] == "RuntimeError: no kernel" and "relative error" in row["failed"]["deaf"]
    assert row["error"]["steady"] < 0.01 < 0.5 < row["error"]["deaf"]
    assert all(row["checks"]["steady"].values()) and not row["checks"]["unsteady"]["repeatable"]


def test_what_waits_is_timed_without_a_graph(on_the_host, monkeypatch):
    monkeypatch.setattr(measure, "waits_for_gpu", lambda run: True)
    with torch.inference_mode():
        made, _ = measure.contenders(SMALL, ("2:4",), device="cpu")
        row = measure.measure(Case(SMALL, 3, "uniform"), {"2:4": made["2:4"]}, device="cpu")
    assert row["checks"]["2:4"] == {"repeatable": True, "never waits": False} and row["seconds"]


def test_a_frozen_graph_is_seen():
    ids, result = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    other = torch.ones(2, dtype=torch.int32)
    for graph, follows in ((lambda: result.copy_(ids), True), (lambda: None, False)):
        result.zero_()
        assert measure._follows(ids.clone, ids, other, Timed(graph, 1), result) is follows
        assert not ids.any(), "the routing is put back"


def test_batched_mm_is_left_out_where_it_would_copy_too_much(on_the_host, monkeypatch):
    with torch.inference_mode():
        made, _ = measure.contenders(SMALL, (), device="cpu")
        monkeypatch.setattr(measure, "MOST_COPIED", 0)
        name = "transformers batched_mm"
        row = measure.measure(
            Case(SMALL, 2, "uniform"), {name: made["grouped_mm"]._replace(implementation="batched_mm")}, "cpu"
        )
    assert set(row["left_out"]) == {name} and not row["seconds"]


def test_floors():
    mixtral = MODELS["mixtral-8x7b"]
    size = 2 * mixtral.parameters
    dense = measure.Contender("ours", None, (), size)
    sparse = dense._replace(nbytes=size * 0.28, density=0.25)
    # The figures that were measured on an H200: 690 TFLOP/s of cuBLAS, 4.3 TB/s.
    assert report.floor(Case(mixtral, 1, "uniform"), 2, dense) == pytest.approx(164e-6, rel=0.01)
    assert report.floor(Case(mixtral, 16384, "uniform"), 8, dense) == pytest.approx(16.73e-3, rel=0.01)
    assert report.floor(Case(mixtral, 1, "uniform"), 2, sparse) == pytest.approx(0.28 * 164e-6, rel=0.01)
    assert report.floor(Case(mixtral, 16384, "uniform"), 8, sparse) == pytest.approx(16.73e-3 * 690 / 2850, rel=0.01)


def made_up(speed: dict[str, float], **changes) -> list[dict]:
    """Rows of all cases in which each of ours is so many times as fast as the best layer of torch; Triton's takes half
    of that layer's time."""
    rows: list[dict] = [{"what": "memory", "model": "m", "failed": {}, "smaller": {"samoyeds:1:2:128": 3.5}}]
    for model in MODELS:
        for tokens in TOKENS:
            for routing in ROUTINGS:
                rows.append(
                    {
                        "what": "case", "model": model, "tokens": tokens, "routing": routing, "failed": {},
                        "error": {"grouped_mm": 1e-3, **dict.fromkeys(speed, 1e-3)},
                        "checks": {name: dict.fromkeys(measure.CHECKS, True) for name in speed},
                        "floor": dict.fromkeys(speed, 1e-5),
                        "over": {"torch": speed, "triton": {name: ratio / 2 for name, ratio in speed.items()}},
                    }
                )  # fmt: skip
    rows[-1].update(changes)
    return rows


FAST = {"dense": 2.5, "2:4": 4.0, "samoyeds:1:2:128": 6.0}


def missed(rows: list[dict]) -> set[str]:
    return {row["what"] for row in report.bars(rows, list(OURS)) if row.get("holds") is False}


def test_bars_hold_for_fast_layers_and_each_can_be_missed():
    assert missed(made_up(FAST)) == set()
    assert len([row for row in report.bars(made_up(FAST), list(OURS)) if "holds" in row]) == 17
    slow = missed(made_up({"dense": 1.1, "2:4": 1.8, "samoyeds:1:2:128": 2.9}))
    assert {f"{name}, least of any peer / ours" for name in ("dense", "2:4")} <= slow
    assert "samoyeds:1:2:128, T <= 64, geometric mean of best torch / ours" in slow
    assert "samoyeds:1:2:128, all T, geometric mean of best triton / ours" in slow and len(slow) == 8
    assert missed(made_up(FAST, failed={"2:4": "no"})) == {"layers that failed"}
    wrong = made_up(FAST, error={"grouped_mm": 1e-3, "2:4": 1.2e-3})
    assert missed(wrong) == {"2:4, largest error against fp64 over that of grouped_mm"}
    for check in measure.CHECKS:
        unsound = made_up(FAST, checks={"2:4": {**dict.fromkeys(measure.CHECKS, True), check: False}})
        assert missed(unsound) == {f"ours, {check}, part of the cases"}
    small = made_up(FAST)
    small[0]["smaller"] = {"samoyeds:1:2:128": 3.3}
    assert missed(small) == {"samoyeds:1:2:128, least of 16-bit weights / ours in bytes"}


def test_the_mean_is_geometric():
    rows = made_up(FAST)
    for i, row in enumerate(rows[1:]):
        row["over"] = {"torch": {"2:4": 2.0 if i % 2 else 8.0}}
    values = {row["what"]: row["value"] for row in report.bars(rows, ["2:4"])}
    assert values["2:4, all T, geometric mean of best torch / ours"] == pytest.approx(4)
    assert not any("triton" in what for what in values), "what was not measured is no row"


def test_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="draws with it")
    rows = [row for row in made_up(FAST) if row.get("model") in ("m", "olmoe", "mixtral-8x7b")]
    rows[-1]["over"] = {}
    plot.draw(rows, tmp_path / "moe.png")
    assert (tmp_path / "moe.png").read_bytes().startswith(b"\x89PNG")


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(arguments)


def test_command_line(capsys, monkeypatch, tmp_path):
    args = parse("moe", "--models", "olmoe", "qwen1.5-moe", "--tokens", "1", "8", "--budget-seconds", "9")
    assert (args.models, args.tokens, args.budget_seconds) == (["olmoe", "qwen1.5-moe"], [1, 8], 9)
    for wrong in ("0", "-1", "x", "1.5"):
        with pytest.raises(SystemExit):
            parse("moe", "--tokens", wrong)
    assert "whole number" in capsys.readouterr().err
    monkeypatch.setattr(moe, "run", lambda args: made_up(FAST))
    args = parse("moe", "--json", str(tmp_path / "new" / "moe.json"), "--plot", str(tmp_path / "moe.svg"))
    assert bench.main(args) == 0
    written = json.loads((tmp_path / "new" / "moe.json").read_text())
    assert len(written["results"]["moe"]) == 1 + len(MODELS) * len(TOKENS) * len(ROUTINGS)
    assert "<svg" in (tmp_path / "moe.svg").read_text()


def test_a_run_keeps_to_its_time(monkeypatch, capsys):
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(moe.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measure, "contenders", lambda model, patterns: ({}, {}))
    empty = {name: {} for name in ("failed", "checks", "error", "seconds")}

    def measured(case, made):
        identity = {"model": case.model.name, "tokens": case.tokens, "routing": case.routing}
        return {"what": "case", **identity, **empty, "waits": [], "active": 1}

    monkeypatch.setattr(measure, "measure", measured)
    rows = moe.run(parse("moe", "--models", "olmoe", "qwen1.5-moe", "--budget-seconds", "150"))
    seen = [(row["what"], row["model"]) for row in rows if row["what"] in ("case", "left out")]
    assert seen[:12] == [("case", "olmoe")] * 10 + [("left out", "olmoe")] * 2
    assert seen[12:] == [("case", "qwen1.5-moe")] * 3 + [("left out", "qwen1.5-moe")] * 9
    assert capsys.readouterr().out.count("left out") == 11

    def lost(case, made):
        if case.tokens == 64:
            raise RuntimeError("CUDA error")
        return measured(case, made)

    monkeypatch.setattr(measure, "measure", lost)
    quick = moe.run(parse("moe", "--models", "olmoe", "--quick"))
    assert [row["tokens"] for row in quick if row["what"] == "case"] == [1]  # CUDA is of no use after an error
    assert [row["holds"] for row in quick if row["what"] == "layers that failed"] == [False]
