"""``nmsparse prune``: make the experts of a model sparse and keep what it can do, with a little calibration text."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..calibration import ExpertReport, MixtralWalk, PrunedLayer, Walk, prune_layers, survey, try_patterns
from ..calibration.channels import channel_order, load_mixtral
from ..calibration.choices import allocate_patterns, ordered, strongest
from ..calibration.writing import write_pruned
from ..demo import LENGTH, MODEL, read_windows
from ..errors import NMSparseError, require
from ..formats import parse
from ..formats.mixed import DROP
from ..io.conversion import read_config, refuse_existing
from ..prune import METHODS
from ..prune.experts import super_experts
from ..prune.methods import KEEP_VALUES, NEEDS_NO_DATA
from .text import size, table

CALIBRATION = MODEL / "calibration.txt"
WINDOWS = 240
_MOST_ROWS = 64  # of the printed table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    parser.epilog = "Byte-level Mixtral checkpoints run in NumPy, all others by transformers and torch."
    option("source", metavar="IN", type=Path, help="checkpoint directory: config.json and safetensors")
    option("target", metavar="OUT", type=Path, help="directory to make; it must not exist")
    option(
        "--pattern",
        nargs="+",
        required=True,
        help="2:4, vnm:64:2:8, samoyeds:1:2:128 …; several with --budget, dense and drop among them",
    )
    option("--method", choices=METHODS, default="admm", help="default: admm, the most accurate and the slowest")
    option("--calibration", metavar="TEXT", type=Path, default=CALIBRATION, help="default: that of examples/tiny-moe")
    option(
        "--windows",
        type=int,
        default=WINDOWS,
        help=f"of {LENGTH} bytes or tokens, evenly spread over it (default {WINDOWS})",
    )
    option(
        "--budget", type=int, metavar="BYTES", help="of all experts: each gets the one of the patterns that pays most"
    )
    option("--neurons", type=float, metavar="SHARE", help="first drop the weakest neurons of every expert, keep SHARE")
    option(
        "--reorder",
        action="store_true",
        help="first move neurons and hidden channels to where the pattern drops less; the model computes what it did",
    )
    option(
        "--guard",
        action="store_true",
        help="keep super experts dense, which write massive activations; with --budget others may be, too",
    )
    option("--plot", type=Path, metavar="FILE", help="also draw density and loss by layer and expert (PNG or SVG)")


def main(args: argparse.Namespace) -> int:
    patterns = [pattern if pattern in ("dense", DROP) else str(parse(pattern)) for pattern in args.pattern]
    if args.budget is None and (len(patterns) > 1 or DROP in patterns):
        raise NMSparseError(f"--pattern: expected one pattern without --budget BYTES, got {' '.join(patterns)}")
    if args.guard and args.neurons is not None:
        raise NMSparseError("--guard keeps whole experts, --neurons makes all of them narrower: give one of them")
    if args.neurons is not None and not 0 < args.neurons <= 1:
        raise NMSparseError(f"--neurons: expected a share above 0 and up to 1, got {args.neurons}")
    refuse_existing(args.target)  # before the work, not after it
    if args.plot:
        require("matplotlib", "bench")
    if args.windows < 1:
        raise NMSparseError(f"--windows: expected 1 or more, got {args.windows}")
    walk = _walk(args)
    experts = [walk.experts(layer) for layer in range(len(walk))]
    total, dense = sum(e.num_experts for e in experts), sum(e.nbytes for e in experts)
    print(f"{len(walk)} layers, {total} experts; pruning by {args.method}", flush=True)
    order, share = None, 1.0 if args.neurons is None else args.neurons
    neurons = None if args.neurons is None else strongest(share)
    if args.reorder:
        lead = patterns[0] if args.budget is None and patterns[0] != "dense" else "2:4"  # which all patterns end in
        print(f"ordering neurons and channels for {lead}", flush=True)
        order, neurons = channel_order(walk, lead, args.method), ordered(lead, args.method, share)
        walk = _walk(args, order)
    guard = np.zeros((len(walk), total // len(walk)), bool)
    if args.guard:
        guard = super_experts(np.stack([record.largest for record in survey(walk)]))
        walk = _walk(args, order)
    chosen = [["dense" if guarded else patterns[0] for guarded in layer] for layer in guard]
    if args.budget is not None:
        patterns = list(dict.fromkeys([*patterns, "dense"] if guard.any() else patterns))
        with _Bar(total * len(patterns), "trying patterns") as bar:
            tried = try_patterns(walk, patterns, args.method, on_expert=bar)
        chosen, walk = allocate_patterns(tried, patterns, args.budget, guard=guard), _walk(args, order)
    with _Bar(total, "pruning") as bar:
        layers = prune_layers(walk, chosen, args.method, neurons=neurons, on_expert=bar)
    write_pruned(args.source, args.target, layers, args.method, order=order)
    print(report(layers, args.method, dense))
    if args.plot:
        draw(args.plot, layers)
        print(f"picture: {args.plot}")
    print(f"wrote {args.target}" + (f": python -m nmsparse eval {args.target}" if bytewise(args.source) else ""))
    return 0


def _walk(args: argparse.Namespace, order: np.ndarray | None = None) -> Walk:
    """The model and its calibration text, at the first layer; the hidden dimension in ``order``."""
    if not args.calibration.exists() or args.calibration.stat().st_size < LENGTH:
        raise NMSparseError(
            f"--calibration: expected a text of {LENGTH} bytes or more, there is none in {args.calibration}"
        )
    if bytewise(args.source):
        text = read_windows(args.calibration, None)
        return MixtralWalk(load_mixtral(args.source, order), text[:: max(1, len(text) // args.windows)][: args.windows])
    from ..calibration.huggingface import load_walk, reorder_model

    walk = load_walk(args.source, args.calibration, args.windows, LENGTH)
    if order is not None:
        reorder_model(walk.model, order)
    return walk


def bytewise(source: Path) -> bool:
    """Whether a checkpoint is one that NumPy runs here: a Mixtral that reads and writes bytes."""
    config = read_config(source)
    return config.get("model_type") == "mixtral" and config.get("vocab_size") == 256


class _Bar:
    """A progress bar on a terminal's stderr: called with each report, shows nothing elsewhere."""

    def __init__(self, total: int, what: str):
        shown = sys.stderr.isatty()
        self.bar = require("tqdm", "hf").tqdm(total=total, desc=what, unit="expert", leave=False, disable=not shown)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def __call__(self, report: ExpertReport) -> None:
        self.bar.update()


def report(layers: Sequence[PrunedLayer], method: str, dense: int) -> str:
    """A table of all experts, or of all layers where experts are many, beside their ``dense`` bytes.

    Losses are squared errors over squared outputs, in percent.
    """
    reports = [r for layer in layers for r in layer.reports]
    if len(reports) <= _MOST_ROWS:
        header, rows = ["layer", "expert"], [_row([r], str(r.expert)) for r in reports]
    else:
        header, rows = ["layer", "experts"], [_row(layer.reports, str(len(layer.reports))) for layer in layers]
    header += ["pattern", "tokens", "density", "size", "loss gate, up", "loss expert"]
    lines = [table(header, rows, right=(0, 1, 3, 4, 5, 6, 7))]
    few = sum(r.few for r in reports)
    if few and method not in NEEDS_NO_DATA:
        lines.append(
            f"{few} of {len(reports)} experts saw few tokens: gate and up took the layer's statistics as well"
            + ("" if method in KEEP_VALUES else ", down was pruned by wanda")
            + "; more --windows would help"
        )
    nbytes = sum(r.nbytes for r in reports)
    lines.append(f"all experts: {_counted(reports)}; {size(nbytes)} of {size(dense)}, {nbytes / dense:.0%}")
    return "\n".join(lines)


def _row(reports: Sequence[ExpertReport], number: str) -> list[str]:
    """One line of the table: an expert, or all of a layer by their means, weighted by tokens."""
    tokens = sum(r.tokens for r in reports)

    def mean(name: str) -> float:
        return sum(getattr(r, name) * r.tokens for r in reports) / max(tokens, 1)

    return [
        str(reports[0].layer),
        number,
        reports[0].pattern if len(reports) == 1 else _counted(reports),
        f"{tokens:,}",
        f"{sum(r.density for r in reports) / len(reports):.1%}",
        size(sum(r.nbytes for r in reports)),
        f"{mean('gate_up_loss'):.2%}",
        f"{mean('down_loss'):.2%}",
    ]


def _counted(reports: Sequence[ExpertReport]) -> str:
    counts = Counter(r.pattern for r in reports)
    return ", ".join(f"{count} x {pattern}" for pattern, count in counts.most_common())


def draw(path: Path, layers: Sequence[PrunedLayer]) -> None:
    """Density and loss of every expert, a row for each layer."""
    require("matplotlib", "bench")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.5 * len(layers)), layout="constrained")
    panels = (("density", "density", 1.0), ("down_loss", "squared error of the output, relative", None))
    for axes, (name, title, top) in zip(figure.subplots(1, 2), panels, strict=True):
        values = [[getattr(r, name) for r in layer.reports] for layer in layers]
        image = axes.imshow(values, aspect="auto", vmin=0, vmax=top, cmap="viridis")
        axes.set(title=title, xlabel="expert", ylabel="layer", yticks=range(len(layers)))
        figure.colorbar(image, ax=axes)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
