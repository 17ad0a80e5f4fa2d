"""The demo as a whole, on a few windows: its numbers, its table, its picture, its messages."""

from __future__ import annotations

import argparse
import re

import numpy as np
import pytest

from nmsparse import NMSparseError, array, demo
from nmsparse.demo import measure, picture, table
from nmsparse.demo.measure import BATCH, Result, steps

WINDOWS = BATCH + 2  # a whole batch and a part of one
needs_model = pytest.mark.skipif(not demo.MODEL.exists(), reason="needs examples/tiny-moe of a checkout")


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """``(what was printed, results, picture)`` of one small run."""
    import contextlib
    import io

    png, printed = tmp_path_factory.mktemp("demo") / "new" / "demo.png", io.StringIO()
    with contextlib.redirect_stdout(printed):
        results = demo.run(windows=WINDOWS, png=png)
    return printed.getvalue(), results, png


@needs_model
def test_the_numbers(ran):
    _, (dense, two_four, vnm, samoyeds), _ = ran
    assert [r.pattern for r in (dense, two_four, vnm, samoyeds)] == ["dense", *demo.PATTERNS]
    assert [r.density for r in (dense, two_four, vnm, samoyeds)] == [1, 0.5, 0.25, 0.25]
    weights = 3 * 8 * 3 * 384 * 256  # layers, experts, matrices
    assert dense.expert_bytes == {"values": 2 * weights}
    assert two_four.expert_bytes == {"values": weights, "meta": weights // 8}
    assert dense.bits < two_four.bits < samoyeds.bits
    assert dense.error is None
    assert all(0 < r.expert_time < r.model_time for r in ran[1])


@needs_model
def test_bits_per_byte_of_the_dense_model(ran):
    expected = demo.load_model(demo.MODEL)(demo.read_windows(demo.MODEL / "heldout.txt", WINDOWS)).astype(np.float64)
    tokens = demo.read_windows(demo.MODEL / "heldout.txt", WINDOWS)
    odds = np.exp(expected[:, :-1]) / np.exp(expected[:, :-1]).sum(-1, keepdims=True)
    chances = np.take_along_axis(odds, tokens[:, 1:, None].astype(int), -1)
    assert ran[1][0].bits == pytest.approx(-np.log2(chances).mean(), rel=1e-5)


@needs_model
def test_sparse_kernels_compute_what_the_masked_weights_say(ran):
    assert all(r.error < 1e-4 for r in ran[1][1:])


@needs_model
def test_the_table(ran):
    printed, results, _ = ran
    assert max(map(len, printed.splitlines())) <= table.WIDTH
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.split()[:1]}
    for r in results:
        percent, total, share, _, bits, expert_us, _, model_us, _, error = rows[r.pattern]
        assert float(percent) == 100 * r.density
        assert int(total.replace(",", "")) == r.total_bytes
        assert float(share) == pytest.approx(100 * r.total_bytes / results[0].total_bytes, abs=0.5)
        assert float(bits) == pytest.approx(r.bits, abs=5e-5)
        assert float(expert_us) == pytest.approx(1e6 * r.expert_time, abs=5e-3)
        assert float(model_us) == pytest.approx(1e6 * r.model_time, abs=5e-3)
        assert (error == "-") == (r.error is None)
    assert "no recovery" in " ".join(printed.split())


def test_speed_up_is_dense_time_over_sparse_time():
    dense = Result("dense", 1, {"values": 8}, 1.0, 3e-6, 8e-6)
    sparse = Result("2:4", 0.5, {"values": 4}, 1.5, 2e-6, 4e-6, 1e-6)
    last = table.format_table([dense, sparse]).splitlines()[-1]
    assert re.findall(r"[\d.]+×", last) == ["1.50×", "2.00×"]


def routing(*layers):
    """Two windows of one token, two experts each: ``[(ids, weights), …]``."""
    return [(np.array(ids), np.array(weights, np.float32)) for ids, weights in layers]


SAME = ([[0, 1], [4, 5]], [[0.6, 0.4], [0.7, 0.3]])


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([SAME, SAME], [False, False]),
        ([SAME, ([[0, 1], [4, 6]], SAME[1])], [False, True]),  # a tie for the last place
        ([SAME, ([[1, 0], [4, 5]], SAME[1])], [False, False]),  # the same experts in another order
        ([SAME, ([[0, 1], [4, 6]], [[0.6, 0.4], [0.8, 0.2]])], [False, False]),  # no tie: an error
        ([([[0, 1], [4, 6]], SAME[1]), ([[2, 3], [6, 7]], [[0.9, 0.1], [0.9, 0.1]])], [False, True]),  # after a tie
        ([([[0, 1], [4, 6]], [[0.6, 0.4], [0.8, 0.2]]), ([[0, 1], [4, 6]], SAME[1])], [False, False]),  # after an error
    ],
)
def test_only_ties_excuse_another_choice_of_experts(layers, expected):
    assert measure.tied(routing(*layers), routing(SAME, SAME), 2).tolist() == expected


def test_ties_are_told():
    dense = Result("dense", 1, {"values": 8}, 1.0, 3e-6, 8e-6)
    sparse = Result("2:4", 0.5, {"values": 4}, 1.5, 2e-6, 4e-6, 1e-6, ties=3)
    assert table.format_table([dense, sparse]).splitlines()[-1].startswith("2:4:")
    assert table.format_table([dense, sparse]).endswith("rounding: 3")


@needs_model
def test_the_picture(ran):
    png = ran[2].read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 20_000


def test_a_picture_of_any_number_of_patterns(tmp_path):
    weight = np.random.default_rng(0).standard_normal((96, 160), np.float32)
    kept = {"1:4": array(weight, "1:4").mask(), "2:4": array(weight, "2:4").mask()}
    rows = [Result(p, 1, {"values": 4, "meta": 1}, 1.0, 1e-6, 2e-6) for p in ("dense", *kept)]
    assert picture.draw(tmp_path / "p.png", rows, weight, kept).stat().st_size > 10_000


def test_missing_model(tmp_path):
    with pytest.raises(NMSparseError, match=r"examples/tiny-moe.*--model DIR"):
        demo.main(parse("--model", str(tmp_path / "none")))


@needs_model
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "no-such-file"], "--text FILE"),
        (["--windows", "5000"], "1136 whole windows"),
        (["--patterns", "3/4"], "not understood"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(NMSparseError, match=message):
        demo.main(parse("--no-png", *arguments))


@pytest.mark.parametrize("count", ["0", "-1", "many", "1.5"])
def test_windows_is_a_positive_number_or_all(count, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse("--windows", count)
    assert "positive number or 'all'" in capsys.readouterr().err
    assert parse("--windows", "all").windows is None


@pytest.mark.parametrize("windows", [1, BATCH, BATCH + 1])
def test_steps_counts_what_the_bar_will_see(windows, monkeypatch):
    class Model:
        """A model that costs nothing."""

        experts = ()
        seconds_in_experts = 0.0
        routing = ()

        def with_experts(self, convert):
            return Model()

        def __call__(self, tokens):
            return np.ones((*tokens.shape, 256), np.float32)

    monkeypatch.setattr(measure, "_result", lambda *_: None)
    seen = []
    measure.measure(Model(), np.zeros((windows, 4), np.uint8), ["a", "b"], seen.append)
    assert len(seen) == steps(windows, 2)


def test_the_bar_names_the_step_and_goes_away(capsys):
    pytest.importorskip("tqdm")
    with demo._bar(2, True) as advance:
        advance("first")
        advance("second")
    shown = capsys.readouterr().err
    assert "first" in shown and "1/2" in shown and shown.endswith("\r")


def test_no_bar_where_nobody_watches(capsys):
    with demo._bar(2, False) as advance:
        advance("first")
    assert capsys.readouterr().err == ""
