"""What pruning costs in accuracy: every pattern and method on tiny-moe, in bits per byte of its held-out text.

``docs/accuracy.md`` explains the figures; ``benchmarks/results/accuracy.json`` keeps them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from time import perf_counter

import numpy as np

from ..calibration import MixtralWalk, prune_layers, try_patterns
from ..calibration.channels import channel_order, load_mixtral
from ..calibration.choices import allocate_patterns, ordered, strongest
from ..calibration.evaluate import evaluate, with_layers
from ..calibration.pipeline import Neurons
from ..demo import MODEL, read_windows
from ..demo.mixtral import Mixtral
from ..prune import METHODS

PATTERNS = ("2:4", "vnm:64:2:8", "samoyeds:1:2:128")
HEIGHTS = (16, 32, 64, 128, 256)  # the V of V:N:M and of Samoyeds, at a density of 25 %
UNIFORM = "samoyeds:1:2:128"
CHOICES = ("2:4", "vnm:64:2:8", UNIFORM, "vnm:64:2:16")  # of the allocation
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


@dataclass(frozen=True)
class Row:
    """One pruned model. ``loss`` is what it loses against the dense model on the same text, in bits per byte."""

    table: str
    pattern: str
    method: str
    nbytes: int
    bits: float
    loss: float
    seconds: float
    seed: int = 0


class Study:
    """The model, its texts, and what it takes to fill one row of a table."""

    def __init__(self) -> None:
        self.checkpoint = load_mixtral(MODEL)
        self.heldout = read_windows(MODEL / "heldout.txt", None)
        self.calibration = read_windows(MODEL / "calibration.txt", None)
        self.dense: dict[int, float] = {}

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
        nbytes = sum(report.nbytes for layer in layers for report in layer.reports)
        row = Row(table, name or pattern, method, nbytes, bits, bits - self.dense_bits(sample), seconds, seed)
        print(
            f"{table:8} {row.pattern:28} {method:16} {nbytes:>10,} {bits:8.4f} {row.loss:+8.4f} {seconds:6.0f} s",
            flush=True,
        )
        return row

    def allocation(self, windows: np.ndarray, method: str, choices: tuple[str, ...]) -> list[list[str]]:
        """A pattern for each expert of each layer, with the least loss under the bytes of uniform Samoyeds."""
        tried = try_patterns(MixtralWalk(self.checkpoint, windows), choices, method)
        budget = sum(report.nbytes for layer in tried[choices.index(UNIFORM)] for report in layer)
        return allocate_patterns(tried, choices, budget)


def plan(study: Study) -> Iterator[dict]:
    """The arguments of :meth:`Study.row` for every row."""
    for pattern, method in BARS:
        yield {"table": "bars", "pattern": pattern, "method": method, "sample": 1, "text": 4}
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
        for pattern in PATTERNS:
            windows = study.calibration[np.sort(third)[: len(study.calibration) // TEXT]]
            yield {"table": "seeds", "pattern": pattern, "method": "admm", "seed": seed, "windows": windows}


def run() -> list[dict]:
    """All rows, and the bars."""
    study = Study()
    print(f"dense: {study.dense_bits(1):.4f} bits per byte, {study.dense_bits(SAMPLE):.4f} on every {SAMPLE}th window")
    found = [study.row(**arguments) for arguments in plan(study)]
    return [*map(asdict, found), *bars(found)]


def bars(found: list[Row]) -> list[dict]:
    """What the project promises of the figures."""
    from . import bar

    loss = {(row.pattern, row.method): row.loss for row in found if row.table == "bars"}
    nbytes = {row.pattern: row.nbytes for row in found if row.table == "bars"}
    samoyeds, best = UNIFORM, "admm"
    return [
        bar(
            "2:4, sparsegpt over magnitude (loss)",
            loss["2:4", "sparsegpt"] / loss["2:4", "magnitude"],
            0.5,
            at_least=False,
        ),
        bar("2:4, admm over magnitude (loss)", loss["2:4", best] / loss["2:4", "magnitude"], 0.5, at_least=False),
        bar(
            "Samoyeds, admm over magnitude (loss)",
            loss[samoyeds, best] / loss[samoyeds, "magnitude"],
            0.4,
            at_least=False,
        ),
        bar("allocation over Samoyeds (loss)", loss["allocation", best] / loss[samoyeds, best], 1, at_least=False),
        bar("allocation over Samoyeds (bytes)", nbytes["allocation"] / nbytes[samoyeds], 1, at_least=False),
        bar("slowest method (s)", max(row.seconds for row in found), 300, at_least=False),
    ]
