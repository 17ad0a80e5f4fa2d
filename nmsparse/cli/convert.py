"""``nmsparse convert``: make the experts of a Hugging Face checkpoint sparse."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..errors import NMSparseError, require
from ..formats import parse
from ..io.conversion import VALUE_DTYPES, LayerReport, convert
from .text import size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="IN", help="checkpoint directory: config.json and safetensors, sharded or not"
    )
    parser.add_argument("target", metavar="OUT", help="directory to make; it must not exist")
    parser.add_argument(
        "--pattern",
        required=True,
        type=_pattern,
        help="2:4, any n:m, vnm:V:2:M (vnm:64:2:8) or samoyeds:N:M:V (samoyeds:1:2:128)",
    )
    parser.add_argument("--experts-only", action="store_true", help="write the experts and leave the dense rest out")
    parser.add_argument(
        "--dtype", choices=VALUE_DTYPES, default="keep", help="dtype of the kept expert weights (default: keep)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no report per layer")


def _pattern(text: str) -> Any:
    try:
        return parse(text)
    except NMSparseError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(args: argparse.Namespace) -> int:
    with _Progress(args.quiet) as progress:
        conversion = convert(
            args.source,
            args.target,
            args.pattern,
            experts_only=args.experts_only,
            dtype=args.dtype,
            on_start=progress.start,
            on_matrix=progress.step,
            on_layer=progress.report,
        )
    if not args.quiet:
        total = conversion.total
        print(f"total: {total.experts} experts in {len(conversion.layers)} layers, {_effect(total)}")
        rest = "left out" if args.experts_only else f"copied as it is, {size(conversion.dense_bytes)}"
        print(f"everything else: {rest}")
        print(f"{conversion.path}: {conversion.pattern}; read it with nmsparse.load or nmsparse.io.Checkpoint")
    return 0


class _Progress:
    """A line per layer on stdout and, on a terminal, a bar on stderr."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.bar: Any = None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.close()

    def start(self, matrices: int) -> None:
        if not self.quiet and sys.stderr.isatty():
            self.bar = require("tqdm", "hf").tqdm(total=matrices, unit="matrix", leave=False)

    def step(self) -> None:
        if self.bar:
            self.bar.update()

    def report(self, layer: LayerReport) -> None:
        if self.bar:
            self.bar.write(_line(layer))
        elif not self.quiet:
            print(_line(layer), flush=True)


def _line(layer: LayerReport) -> str:
    shapes = "gate_up {}x{}, down {}x{}".format(*layer.gate_up, *layer.down)
    return f"{layer.name}: {layer.experts} experts, {shapes}, {_effect(layer)}"


def _effect(layer: LayerReport) -> str:
    sizes = f"{size(layer.bytes_before)} -> {size(layer.bytes_after)}"
    return f"density {layer.density:.1%}, {sizes}, relative error {layer.error:.3f}"
