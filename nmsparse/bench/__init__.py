"""``python -m nmsparse bench``: measures what the project promises, and prints each bar beside its figure."""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

import numpy as np

from .. import __version__
from ..errors import NMSparseError
from .gpu import device_facts
from .timing import processor

SUITES = ("import", "pack", "cpu")
GPU_SUITES = ("gemm", "moe", "layer", "recovery")
LONG_SUITES = ("accuracy", "experts")  # tens of minutes
MODULES = {"import": "importing", "pack": "packing", "cpu": "matmul"}  # of the suites that are not called like theirs
PLOTS = {"gemm": ".plot", "moe": ".moe.plot", "recovery": ".recovery.plot", "accuracy": ".accuracy_plot"}
PATTERNS = ("2:4", "vnm:64:2:8", "samoyeds:1:2:128")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``python -m nmsparse bench``."""
    parser.add_argument(
        "suite",
        choices=[*SUITES, *GPU_SUITES, *LONG_SUITES, "all"],
        help="what to measure; all: what is short and needs no GPU",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures, the machine and the command")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the figures (PNG or SVG)")
    from . import accuracy, moe, recovery

    for module in (accuracy, moe, recovery):
        module.add_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Run the suites; exit code 1 if a bar is missed."""
    if args.plot and args.suite not in PLOTS:
        raise NMSparseError(f"bench {args.suite}: nothing to draw; --plot is for {', '.join(PLOTS)}")
    results = {name: suite(name, args)() for name in (SUITES if args.suite == "all" else [args.suite])}
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps({"machine": machine() | joined(args.others), "results": results}, indent=1) + "\n"
        )
        print(f"wrote {args.json}")
    if args.plot:
        importlib.import_module(PLOTS[args.suite], __name__).draw(results[args.suite], args.plot)
        print(f"wrote {args.plot}")
    missed = [row for rows in results.values() for row in rows if row.get("holds") is False]
    for row in missed:
        print(f"MISSED: {row['what']}: {row['value']:.2f}, bar {row['bar']}", file=sys.stderr)
    return 1 if missed else 0


def suite(name: str, args: argparse.Namespace) -> Callable[[], list[dict]]:
    """The function that runs one suite and returns its rows."""
    module = importlib.import_module(f".{MODULES.get(name, name)}", __name__)
    if name == "gemm":
        return functools.partial(module.run, args.quick, args.budget_seconds or math.inf)
    return functools.partial(module.run, args) if name in (*GPU_SUITES, "accuracy") else module.run


def machine() -> dict[str, object]:
    """What the figures were measured with."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m nmsparse " + shlex.join(sys.argv[1:]),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": version("numba"),
        "nmsparse": __version__,
        **(device_facts() if "torch" in sys.modules else {}),
    }


def joined(paths: Iterable[Path]) -> dict[str, list[str]]:
    """When and how the figures were made that ``--with`` brought."""
    facts = [json.loads(path.read_text())["machine"] for path in paths]
    made = [line for fact in facts for line in (f"{fact['date']}: {fact['command']}", *fact.get("joined", ()))]
    return {"joined": list(dict.fromkeys(made))} if made else {}


def bar(what: str, value: float, bound: float, *, at_least: bool = True) -> dict[str, object]:
    """One row of a report: a figure, its bar, and whether it holds."""
    holds = value >= bound if at_least else value <= bound
    sign = ">=" if at_least else "<="
    print(f"{what:<64} {value:10.2f}   bar {sign} {bound:<6g} {'ok' if holds else 'MISSED'}")
    return {"what": what, "value": float(value), "bar": f"{sign} {bound:g}", "holds": bool(holds)}
