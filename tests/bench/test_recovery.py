"""`bench recovery` on the host: its text, its loss, a few steps from end to end, and its bars."""

from __future__ import annotations

import argparse
import json

import pytest

from nmsparse.__main__ import main
from nmsparse.bench.recovery.text import standard_library
from nmsparse.demo import MODEL

torch = pytest.importorskip("torch", reason="the benchmark runs on torch")
transformers = pytest.importorskip("transformers", reason="it has the model")

import torch.nn.functional as F  # noqa: E402

from nmsparse.bench import recovery  # noqa: E402
from nmsparse.bench.recovery import step, train  # noqa: E402
from nmsparse.torch.train import MaskTraining  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers says when it is imported is not ours


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # its idle threads spin on the cores that our kernels want
    yield
    torch.set_num_threads(threads)


def test_the_text_leaves_out_what_is_held_out(tmp_path):
    lines = [b"def function_number_%d(argument, another):  # long" % i for i in range(20)]
    heldout = b"\n".join(lines) + b"\0x = 1\n"
    changed = b"\n".join([*lines[:15], b"    # what another release says in this place, and at length"])
    files = {
        "same.py": b"\n".join(lines),
        "changed.py": changed,
        "short.py": b"x = 1\n",
        "kept.py": b"y = 2\n",
        "sub/alike.py": b"\n".join([lines[0], *(line.replace(b"f", b"g") for line in lines)]),
        "site-packages/other.py": b"z = 3\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text)
    assert standard_library(heldout, tmp_path).split(b"\0") == [files["kept.py"], files["sub/alike.py"]]


def small_model():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=256, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    model.set_experts_implementation("eager")
    return model


def test_the_loss_is_the_models_own():
    model, tokens = small_model(), torch.randint(256, (3, 16))
    out = model(tokens, output_router_logits=True, use_cache=False)
    want = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()) + 0.5 * out.aux_loss
    wanted = torch.autograd.grad(want, list(model.parameters()))
    model.set_experts_implementation(step.IMPLEMENTATION)
    got = step.make_loss(model, 0.5, compiled=False)(tokens)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, list(model.parameters())), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_step_compiles_in_one_piece(monkeypatch):
    """With masks, under autocast; that transformers has put its hooks there does not matter."""
    model, tokens = small_model(), torch.randint(256, (2, 16))
    model(tokens, output_router_logits=True)
    model.set_experts_implementation(step.IMPLEMENTATION)
    masks = MaskTraining(model, "samoyeds:1:2:128", steps=4, fade=0.5)
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda part, **options: compile_(part, backend="aot_eager", **options))
    losses = [step.make_loss(model, 0.01, compiled=compiled) for compiled in (False, True)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(3):
            want, got = (loss(tokens) for loss in losses)
            torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
            got.backward()
            masks.step()


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Short windows, small batches, and little text."""
    monkeypatch.setattr(train, "LENGTH", 32)
    monkeypatch.setattr(train, "LOOKED_AT", 2)
    folder = tmp_path / "model"
    small_model().save_pretrained(folder)
    (folder / "heldout.txt").write_bytes((MODEL / "heldout.txt").read_bytes()[:320])
    (tmp_path / "train.txt").write_bytes((MODEL / "calibration.txt").read_bytes()[:5000])
    parser = argparse.ArgumentParser()
    recovery.add_arguments(parser)
    return parser, ["--model", str(folder), "--train", str(tmp_path / "train.txt"), "--seconds", "0.3", "--no-compile"]


def test_from_end_to_end(small, capsys):
    parser, options = small
    rows = recovery.run(parser.parse_args([*options, "--seeds", "0"]), "cpu")
    assert [row.get("run") for row in rows[:4]] == [None, *recovery.RUNS]
    printed = capsys.readouterr().out
    for row in rows[1:4]:
        assert json.dumps(row) in printed
        assert row["steps"] >= 1 and row["seconds"] >= 0.3 and 0 < row["bits"] < 12
        assert row["curve"] or row["steps"] == 1  # one step may outlast the time of all
    two_four, samoyeds, dense = rows[1:4]
    assert dense["width"] == 40 and samoyeds["experts nbytes"] <= dense["experts nbytes"] < two_four["experts nbytes"]
    assert abs(samoyeds["bits by kernels"] - samoyeds["bits"]) < 0.05
    assert [row["bar"] for row in rows[4:]] == ["<= 1.035", "<= 1.1", "<= 0", "<= 0.001"]


def test_a_run_that_fails_does_not_cost_the_others(small):
    parser, options = small
    rows = recovery.run(parser.parse_args([*options, "--seeds", "0", "--runs", "5:4", "2:4"]), "cpu")
    assert "5:4, seed 0" in next(row for row in rows if row["what"] == "failed")["failed"]
    assert [row["run"] for row in rows if row["what"] == "run"] == ["2:4"]


def test_bars_take_the_median(capsys):
    run = {"what": "run", "run": "2:4", "bits by kernels": 1.0}
    rows = [{**run, "bits": bits} for bits in (1.0, 1.02, 1.3)]
    assert [(row["value"], row["holds"]) for row in recovery.bars(rows)] == [(1.02, True), (pytest.approx(0.3), False)]
    assert "narrower: not run" in capsys.readouterr().out
    pair = [
        {"what": "run", "run": name, "bits": bits} for name, bits in (("samoyeds:1:2:128", 1.08), ("narrower", 1.07))
    ]
    assert [row["holds"] for row in recovery.bars(pair)] == [True, False]


def test_runs_of_other_processes_count(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run = {"what": "run", "run": "2:4", "bits": 1.01, "bits by kernels": 1.01, "seconds": 9.0, "curve": [[3.0, 1.2]]}
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for seed, path in enumerate(files):
        path.write_text(json.dumps({"results": {"recovery": [{"what": "dense"}, {**run, "seed": seed}]}}))
    command = ["bench", "recovery", "--runs", "--with", *map(str, files), "--plot", str(tmp_path / "curves.png")]
    assert main(command) == 0
    assert "median of the seeds" in capsys.readouterr().out and (tmp_path / "curves.png").stat().st_size > 1000
    assert main(["bench", "layer", "--plot", str(tmp_path / "x.png")]) == 2
