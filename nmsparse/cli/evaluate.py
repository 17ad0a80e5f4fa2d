"""``nmsparse eval``: bits per byte of a text, for a checkpoint as published, converted or pruned."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from ..calibration.evaluate import evaluate
from ..demo import LENGTH, MODEL, load_model, read_windows
from ..errors import NMSparseError, require
from .prune import bytewise
from .text import size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("path", metavar="DIR", type=Path, help="a byte-level Mixtral checkpoint, its experts dense or sparse")
    option(
        "--text", metavar="FILE", type=Path, default=MODEL / "heldout.txt", help="default: that of examples/tiny-moe"
    )
    option("--windows", type=int, metavar="N", help=f"only the first N windows of {LENGTH} bytes (default: all)")
    option("--json", action="store_true", help="print JSON instead of text")


def main(args: argparse.Namespace) -> int:
    if not bytewise(args.path):
        raise NMSparseError(
            f"{args.path}: expected a Mixtral checkpoint with a vocabulary of the 256 bytes, as examples/tiny-moe; "
            "evaluate others where they run: docs/torch.md"
        )
    model = load_model(args.path)
    windows = read_windows(args.text, args.windows)
    stored = sum(experts.nbytes for experts in model.experts)
    # Dense experts are widened once; sparse ones run on the library's kernels.
    model = model.with_experts(lambda w: w.astype(np.float32) if isinstance(w, np.ndarray) else w)
    shown = sys.stderr.isatty()
    with require("tqdm", "hf").tqdm(total=len(windows), unit="window", leave=False, disable=not shown) as bar:
        bits = evaluate(model, windows, bar.update)
    facts = {"path": str(args.path), "windows": len(windows), "bits_per_byte": bits, "expert_bytes": stored}
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        print(f"{bits:.4f} bits per byte over {len(windows)} windows of {LENGTH} bytes; experts {size(stored)}")
    return 0
