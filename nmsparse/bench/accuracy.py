"""What pruning costs in accuracy: every pattern and method on tiny-moe, in bits per byte of its held-out text.

``docs/accuracy.md`` explains the figures; ``benchmarks/results/accuracy.json`` keeps them.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from time import perf_counter

import numpy as np

from ..calibration import ExpertReport, MixtralWalk, prune_layers, try_patterns
from ..calibration.channels import channel_order, load_mixtral
from ..calibration.choices import allocate_patterns, ordered, strongest
from ..calibration.evaluate import evaluate, with_layers
from ..calibration.pipeline import Neurons
from ..demo import MODEL, read_windows
from ..demo.mixtral import Mixtral
from ..errors import NMSparseError
from ..formats import parse
from ..prune import METHODS
from .recovery import NARROWER

PATTERNS = ("2:4", "vnm:64:2:8", "samoyeds:1:2:128")
HEIGHTS = (16, 32, 64, 128, 256)  # the V of V:N:M and of Samoyeds, at a density of 25 %
UNIFORM = "samoyeds:1:2:128"
SAME_BYTES = "vnm:128:2:8"  # a V:N:M of exactly the bytes of UNIFORM
CHOICES = ("2:4", "vnm:64:2:8", UNIFORM, "vnm:64:2:16")  # of the allocation
ALLOCATIONS = {  # table: what an expert may become under the bytes of UNIFORM, with V:N:M and without
    "droppable": (("2:4", "vnm:64:2:8", UNIFORM, "dense", "drop"), ("2:4", UNIFORM, "dense", "drop")),
    "sparser": (CHOICES, ("2:4", UNIFORM, "samoyeds:1:4:128")),
}
SAMPLE = 8  # every 8th window of the held-out text makes the wide tables; the bars take all
TEXT = 8  # every 8th window of the calibration text, likewise; the bars take every 4th
BARS = (
    ("2:4", "magnitude"),
    ("2:4", "sparsegpt"),
    ("2:4", "admm"),
    ("samoyeds:1:2:128", "magnitude"),
    ("samoyeds:1:2:128", "admm"),
    ("allocation", "admm"),  # under the bytes of Samoyeds
)
WHOLE = ("vnm:64:2:8", *(f"samoyeds:1:2:{v}" for v in (16, 32, 64, 256)))  # as the bars, beside what training makes
FULL = ("bars", "whole", "uniform", *ALLOCATIONS)  # tables of the whole held-out text


@dataclass(frozen=True)
class Row:
    """One pruned model.

    ``loss`` is what it loses against the dense model on the same text, in bits per byte. ``kinds`` counts the experts
    of each pattern, layer by layer; ``stream_loss`` is the sum over them of what an allocation makes least.
    ``seconds`` are those of pruning; an allocation tries again only what no row before it tried on the same text.
    """

    table: str
    pattern: str
    method: str
    nbytes: int
    bits: float
    loss: float
    seconds: float
    seed: int = 0
    stream_loss: float | None = None
    kinds: list[dict[str, int]] = field(default_factory=list)


class Study:
    """The model, its texts, and what it takes to fill one row of a table."""

    def __init__(self) -> None:
        self.checkpoint = load_mixtral(MODEL)
        self.heldout = read_windows(MODEL / "heldout.txt", None)
        self.calibration = read_windows(MODEL / "calibration.txt", None)
        self.dense: dict[int, float] = {}
        self.tried: dict[tuple[bytes, str], dict[str, list[list[ExpertReport]]]] = {}

    @cached_property
    def model(self) -> Mixtral:
        """The dense model in float32."""
        return self.checkpoint.with_experts(lambda w: w.astype(np.float32))

    def dense_bits(self, sample: int) -> float:
        if sample not in self.dense:
            self.dense[sample] = evaluate(self.model, self.heldout[::sample])
        return self.dense[sample]

    def row(
        self,
        table: str,
        pattern: str,
        method: str,
        *,
        name: str | None = None,
        sample: int = SAMPLE,
        text: int = TEXT,
        seed: int = 0,
        windows: np.ndarray | None = None,
        neurons: Neurons | None = None,
        channels: bool = False,
        choices: tuple[str, ...] = CHOICES,
    ) -> Row:
        """Prune by ``windows`` (None: every ``text``-th of the calibration text), evaluate on every ``sample``-th.

        ``neurons`` as in ``prune_layers``; ``channels`` says to put the hidden dimension in order before,
        ``choices`` are the patterns of an allocation.
        """
        windows = self.calibration[::text] if windows is None else windows
        start = perf_counter()
        model = self.checkpoint
        if channels:
            model = load_mixtral(MODEL, channel_order(MixtralWalk(model, windows), pattern, method))
        chosen = self.allocation(windows, method, choices) if pattern == "allocation" else pattern
        layers = prune_layers(MixtralWalk(model, windows), chosen, method, neurons=neurons)
        seconds = perf_counter() - start
        bits = evaluate(with_layers(model, layers), self.heldout[::sample])
        reports = [report for layer in layers for report in layer.reports]
        nbytes, stream_loss = (sum(getattr(report, what) for report in reports) for what in ("nbytes", "stream_loss"))
        kinds = [dict(Counter(report.pattern for report in layer.reports)) for layer in layers]
        loss = bits - self.dense_bits(sample)
        row = Row(table, name or pattern, method, nbytes, bits, loss, seconds, seed, stream_loss, kinds)
        print(
            f"{table:8} {row.pattern:28} {method:16} {nbytes:>10,} {bits:8.4f} {row.loss:+8.4f} {seconds:6.0f} s",
            flush=True,
        )
        return row

    def allocation(self, windows: np.ndarray, method: str, choices: tuple[str, ...]) -> list[list[str]]:
        """A pattern for each expert of each layer, with the least loss under the bytes of uniform Samoyeds."""
        found = self.tried.setdefault((windows.tobytes(), method), {})
        if missing := [pattern for pattern in choices if pattern not in found]:
            found |= zip(missing, try_patterns(MixtralWalk(self.checkpoint, windows), missing, method), strict=True)
        tried = [found[pattern] for pattern in choices]
        budget = sum(report.nbytes for layer in tried[choices.index(UNIFORM)] for report in layer)
        return allocate_patterns(tried, choices, budget)


def plan(study: Study) -> Iterator[dict]:
    """The arguments of :meth:`Study.row` for every row."""
    for pattern, method in BARS:
        yield {"table": "bars", "pattern": pattern, "method": method, "sample": 1, "text": 4}
    for pattern in WHOLE:
        yield {"table": "whole", "pattern": pattern, "method": "admm", "sample": 1, "text": 4}
    for pattern in PATTERNS:
        for method in METHODS:
            yield {"table": "methods", "pattern": pattern, "method": method}
    for pattern in PATTERNS:
        for method in ("magnitude", "wanda", "sparsegpt", "admm"):
            moved = {"table": "orders", "pattern": pattern, "method": method, "neurons": ordered(pattern, method)}
            if pattern == "2:4":
                yield {**moved, "name": "2:4, neurons"}
            yield {**moved, "name": f"{pattern}, neurons and channels", "channels": True}
    for share in (1 / 2, 2 / 3):
        fewer = {"table": "neurons", "pattern": "2:4", "method": "admm", "name": f"2:4, {share:.0%} of the neurons"}
        yield {**fewer, "neurons": strongest(share)}
        fewer["name"] += ", in order"
        yield {**fewer, "neurons": ordered("2:4", "admm", share), "channels": True}
    for v in HEIGHTS:
        for pattern in (f"vnm:{v}:2:8", f"samoyeds:1:2:{v}"):
            for method in ("magnitude", "admm"):
                yield {"table": "heights", "pattern": pattern, "method": method}
    thirds = np.array_split(np.random.default_rng(0).permutation(len(study.calibration)), 3)
    for seed, third in enumerate(thirds):
        windows = study.calibration[np.sort(third)[: len(study.calibration) // TEXT]]
        third_of_text = {"method": "admm", "seed": seed, "windows": windows}
        for pattern in PATTERNS:
            yield {"table": "seeds", "pattern": pattern, **third_of_text}
        for pattern in (UNIFORM, SAME_BYTES):
            yield {"table": "uniform", "pattern": pattern, "sample": 1, **third_of_text}
        for table, sets in ALLOCATIONS.items():
            for choices in sets:
                allocation = {"table": table, "pattern": "allocation", "name": " / ".join(choices), "choices": choices}
                yield {**allocation, "sample": 1, **third_of_text}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``python -m nmsparse bench accuracy`` alone."""
    group = parser.add_argument_group("of the suite accuracy")
    group.add_argument(
        "--rows",
        nargs="*",
        default=["*"],
        metavar="GLOB",
        help="only rows 'TABLE PATTERN METHOD' like these: 'methods 2:4 *'; none: only what --with brings",
    )
    group.add_argument(
        "--recovered", nargs="+", type=Path, default=(), metavar="FILE", help="figures of bench recovery to show, too"
    )
    group.add_argument("--page", type=Path, metavar="FILE", help="put the tables in their places in this page")


def run(args: argparse.Namespace) -> list[dict]:
    """The rows of ``--rows`` and ``--seeds``, in the place of those that ``--with`` brings, and the bars."""
    rows = [row for path in args.others for row in json.loads(path.read_text())["results"]["accuracy"]]
    old = [Row(**row) for row in rows if "table" in row]
    found = joined(old, measured(args, dense_bits(old)))
    found = joined(found, recovered(args.recovered, dense_bits(found)))
    if args.page:
        from .accuracy_page import fill

        fill(args.page, found)
        print(f"wrote {args.page}")
    known = ({name: value for name, value in asdict(row).items() if value not in (None, [])} for row in found)
    return [*known, *bars(found)]


def measured(args: argparse.Namespace, dense: float | None = None) -> Iterator[Row]:
    """Rows as they are made. ``dense``: of the whole text, if it is known."""
    if not args.rows:
        return
    study = Study()
    if dense is not None:
        study.dense[1] = dense
    for row in plan(study):
        name = " ".join((row["table"], row.get("name", row["pattern"]), row["method"]))
        if row.get("seed", 0) in args.seeds and any(fnmatchcase(name, glob) for glob in args.rows):
            yield study.row(**row)


def joined(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """All rows; a new one takes the place of the old one of the same table, pattern, method and seed."""
    return list({(row.table, row.pattern, row.method, row.seed): row for row in (*old, *new)}.values())


def dense_bits(rows: Iterable[Row]) -> float | None:
    """Bits per byte of the dense model on the whole text, if a row knows it."""
    return next((row.bits - row.loss for row in rows if row.table in FULL), None)


def recovered(paths: Iterable[Path], dense: float | None) -> Iterator[Row]:
    """What ``bench recovery --json`` wrote, as rows: the method is the time of training; without the narrower model.

    Raises NMSparseError if ``dense`` is None: the losses are over the dense model.
    """
    for path in paths:
        if dense is None:
            raise NMSparseError("--recovered: expected figures of the dense model, got none; give some by --with")
        for run in json.loads(path.read_text())["results"]["recovery"]:
            if run["what"] == "run" and run["run"] != NARROWER:
                name, nbytes, seconds = str(parse(run["run"])), run["experts nbytes"], run["seconds"]
                loss = run["bits"] - dense
                yield Row("recovered", name, f"{seconds:.0f} s", nbytes, run["bits"], loss, seconds, run["seed"])


def one_shot(rows: Iterable[Row], pattern: str) -> Row | None:
    """The row of this pattern that loses least without training; one of the whole text, if there is any."""
    mine = (row for row in rows if row.pattern == pattern and row.table in ("bars", "whole", "methods", "heights"))
    return min(mine, key=lambda row: (row.table not in FULL, row.loss), default=None)


def bars(found: list[Row]) -> list[dict]:
    """What the project promises of the figures, as far as they are there."""
    from . import bar

    rows = {(row.pattern, row.method): row for row in found if row.table == "bars"}
    made: list[dict] = []

    def ratio(what: str, of: tuple[str, str], to: tuple[str, str], bound: float, name: str = "loss") -> None:
        if of in rows and to in rows:
            made.append(bar(what, getattr(rows[of], name) / getattr(rows[to], name), bound, at_least=False))

    samoyeds, allocation = (UNIFORM, "admm"), ("allocation", "admm")
    ratio("2:4, sparsegpt over magnitude (loss)", ("2:4", "sparsegpt"), ("2:4", "magnitude"), 0.5)
    ratio("2:4, admm over magnitude (loss)", ("2:4", "admm"), ("2:4", "magnitude"), 0.5)
    ratio("Samoyeds, admm over magnitude (loss)", samoyeds, (UNIFORM, "magnitude"), 0.4)
    ratio("allocation over Samoyeds (loss)", allocation, samoyeds, 1)
    ratio("allocation over Samoyeds (bytes)", allocation, samoyeds, 1, "nbytes")
    if found:
        pruned = [row.seconds for row in found if row.table != "recovered"]
        made.append(bar("slowest method (s)", max(pruned), 300, at_least=False))
    return made
