"""``nmsparse prune``: make the experts of a model sparse and keep what it can do, with a little calibration text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..calibration import ExpertReport, MixtralWalk, PrunedLayer, Walk, prune_layers, try_patterns
from ..calibration.choices import allocate_patterns, dealt, strongest
from ..calibration.writing import write_pruned
from ..demo import LENGTH, MODEL, load_model, read_windows
from ..errors import NMSparseError, require
from ..formats import parse
from ..io.conversion import read_config, refuse_existing
from ..prune import METHODS
from .text import size, table

CALIBRATION = MODEL / "calibration.txt"
WINDOWS = 240


def add_arguments(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    parser.epilog = "Byte-level Mixtral checkpoints run in NumPy, all others by transformers and torch."
    option("source", metavar="IN", type=Path, help="checkpoint directory: config.json and safetensors")
    option("target", metavar="OUT", type=Path, help="directory to make; it must not exist")
    option("--pattern", nargs="+", required=True, help="2:4, vnm:64:2:8, samoyeds:1:2:128 …; several with --budget")
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
    option("--reorder", action="store_true", help="first mix strong and weak neurons in every group of four")
    option("--plot", type=Path, metavar="FILE", help="also draw density and loss by layer and expert (PNG or SVG)")


def main(args: argparse.Namespace) -> int:
    patterns = [str(parse(pattern)) if pattern != "dense" else pattern for pattern in args.pattern]
    if len(patterns) > 1 and args.budget is None:
        raise NMSparseError(f"--pattern: expected one pattern without --budget BYTES, got {' '.join(patterns)}")
    if args.reorder and args.neurons is not None:
        raise NMSparseError("--reorder and --neurons both choose the order of neurons: give one of them")
    refuse_existing(args.target)  # before the work, not after it
    if args.plot:
        require("matplotlib", "bench")
    if args.windows < 1:
        raise NMSparseError(f"--windows: expected 1 or more, got {args.windows}")
    walk = _walk(args)
    total = sum(walk.experts(layer).num_experts for layer in range(len(walk)))
    print(f"{len(walk)} layers, {total} experts; pruning by {args.method}", flush=True)
    chosen: str | list[list[str]] = patterns[0]
    if args.budget is not None:
        with _Bar(total * len(patterns), "trying patterns") as bar:
            tried = try_patterns(walk, patterns, args.method, on_expert=bar)
        chosen, walk = allocate_patterns(tried, patterns, args.budget), _walk(args)
    neurons = dealt if args.reorder else strongest(args.neurons) if args.neurons is not None else None
    with _Bar(total, "pruning") as bar:
        layers = prune_layers(walk, chosen, args.method, neurons=neurons, on_expert=bar)
    write_pruned(args.source, args.target, layers, args.method)
    print(report(layers))
    if args.plot:
        draw(args.plot, layers)
        print(f"picture: {args.plot}")
    print(f"{args.target}: measure it with python -m nmsparse eval {args.target} --text FILE")
    return 0


def _walk(args: argparse.Namespace) -> Walk:
    """The model and its calibration text, at the first layer."""
    config = read_config(args.source)
    if config.get("model_type") == "mixtral" and config.get("vocab_size") == 256:
        text = read_windows(args.calibration, None)
        return MixtralWalk(load_model(args.source), text[:: max(1, len(text) // args.windows)][: args.windows])
    from ..calibration.huggingface import load_walk

    return load_walk(args.source, args.calibration, args.windows, LENGTH)


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


def report(layers: Sequence[PrunedLayer]) -> str:
    """A table of all experts. Losses are squared errors over squared outputs, in percent."""
    reports = [r for layer in layers for r in layer.reports]
    rows = [
        [
            str(r.layer),
            str(r.expert),
            r.pattern,
            f"{r.tokens:,}",
            f"{r.density:.1%}",
            size(r.nbytes),
            f"{r.gate_up_loss:.2%}",
            f"{r.down_loss:.2%}",
        ]
        for r in reports
    ]
    header = ["layer", "expert", "pattern", "tokens", "density", "size", "loss gate, up", "loss expert"]
    lines = [table(header, rows, right=(0, 1, 3, 4, 5, 6, 7))]
    if few := [r for r in reports if r.few]:
        lines.append(
            f"{len(few)} experts saw too few tokens for the method: gate and up took the layer's statistics as well, "
            "down was pruned by wanda; more --windows would help"
        )
    lines.append(f"all experts: {size(sum(r.nbytes for r in reports))}")
    return "\n".join(lines)


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
