"""``nmsparse inspect``: what a checkpoint holds, from its headers alone; ``--check`` reads and checks every array."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from ..formats import SparseArray
from ..io import ArrayInfo, Checkpoint
from .text import size, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="FILE|DIR", help="a safetensors file, or a checkpoint directory")
    parser.add_argument("--check", action="store_true", help="read every array and check its format in full")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def main(args: argparse.Namespace) -> int:
    checkpoint = Checkpoint(args.path)
    arrays = [checkpoint.describe(name) for name in checkpoint]
    if args.check:
        for name in checkpoint:
            array = checkpoint[name]
            if isinstance(array, SparseArray):
                array.check_format(full=True)
    print(_json(checkpoint, arrays) if args.json else _table(arrays))
    if args.check and not args.json:
        print(f"checked: all {len(arrays)} arrays are well formed")
    return 0


def _table(arrays: list[ArrayInfo]) -> str:
    rows = [
        [a.name, a.pattern or "dense", a.dtype, "x".join(map(str, a.shape)) or "-", f"{a.density:.1%}", size(a.nbytes)]
        for a in arrays
    ]
    lines = [table(["array", "pattern", "dtype", "shape", "density", "size"], rows, right=(4, 5)), ""]
    sparse = [a for a in arrays if a.pattern]
    dense = [a for a in arrays if not a.pattern]
    for kind, some in (("sparse", sparse), ("dense", dense), ("all", arrays)):
        lines.append(f"{kind + ':':8}{len(some)} arrays, {size(sum(a.nbytes for a in some))}")
    return "\n".join(lines)


def _json(checkpoint: Checkpoint, arrays: list[ArrayInfo]) -> str:
    listed = [{**asdict(a), "density": a.density} for a in arrays]
    total = {"arrays": len(arrays), "sparse": len(checkpoint.sparse_names), "nbytes": sum(a.nbytes for a in arrays)}
    return json.dumps(
        {"path": str(checkpoint.path), "metadata": checkpoint.metadata, "arrays": listed, "total": total}, indent=2
    )
