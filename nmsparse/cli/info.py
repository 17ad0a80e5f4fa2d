"""``nmsparse info``: versions, devices, and which kernels are usable here. Needs the base installation only."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from .. import __version__
from ..formats import CLASSES
from . import driver
from .text import size, table

PACKAGES = (
    "numpy",
    "numba",
    "ml_dtypes",
    "numba-cuda",
    "torch",
    "transformers",
    "safetensors",
    "tqdm",
    "scipy",
    "matplotlib",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def main(args: argparse.Namespace) -> int:
    facts = collect()
    print(json.dumps(facts, indent=2) if args.json else _text(facts))
    return 0


def collect() -> dict[str, Any]:
    """Everything ``info`` prints, as plain values."""
    cpu = _cpu()
    return {
        "nmsparse": __version__,
        "location": str(Path(__file__).parents[1]),
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": cpu,
        "gpu": driver.gpus(),
        "kernels": _kernels(cpu["problem"]),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    facts: dict[str, Any] = {"machine": platform.machine(), "cores": _cores(), "problem": None}
    try:
        from ..cpu import threads

        facts |= {"threads": threads.count(), "cache": _cache()}
    except Exception as error:  # whatever is wrong with the backend is to be reported rather than to end this
        facts["problem"] = f"the compiled kernels cannot be used ({type(error).__name__}: {error})"
    return facts


def _cores() -> int | None:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _cache() -> str | None:
    """The directory in which Numba keeps the compiled kernels."""
    kernels = vars(importlib.import_module("nmsparse.cpu.pack")).values()
    paths = (kernel.stats.cache_path for kernel in kernels if hasattr(kernel, "stats"))
    return next(filter(None, paths), None)


def _kernels(problem: str | None) -> list[dict[str, Any]]:
    """One row per backend and format: whether it can run here and, if not, why."""
    backends = [
        ("cpu (Numba)", "float16, bfloat16, float32", problem),
        ("reference (NumPy)", "float16, bfloat16, float32, float64", None),
        ("cuda", "", "not part of this version"),
    ]
    return [
        {"backend": backend, "format": kind, "dtypes": dtypes, "usable": why is None, "why_not": why}
        for backend, dtypes, why in backends
        for kind in CLASSES
    ]


def _text(facts: dict[str, Any]) -> str:
    cpu, gpu = facts["cpu"], facts["gpu"]
    lines = [
        f"nmsparse {facts['nmsparse']} at {facts['location']}",
        f"Python {facts['python']}",
        facts["platform"],
        "",
        "Packages",
        *(f"  {name:13} {version or 'not installed'}" for name, version in facts["packages"].items()),
        "",
        "CPU",
        f"  {cpu['machine']}, {cpu['cores']} cores",
    ]
    if cpu["problem"]:
        lines.append(f"  {cpu['problem']}")
    else:
        lines.append(f"  {cpu['threads']} threads: a team of nmsparse's own, Numba's threading layer is not used")
        lines.append(f"  compiled kernels are kept in {cpu['cache'] or 'memory only'}")
    lines += ["", "GPU"]
    for device in gpu["devices"]:
        lines.append(f"  {device['name']}, compute capability {device['compute_capability']}, {size(device['memory'])}")
    if "driver" in gpu:
        lines.append(f"  driver for {gpu['driver']}")
    if "problem" in gpu:
        lines.append(f"  {gpu['problem']}")
    if not facts["packages"]["numba-cuda"]:
        lines.append("  numba-cuda is not installed")
    rows = [
        [
            kernel["format"],
            kernel["backend"],
            "yes" if kernel["usable"] else "no",
            kernel["why_not"] or kernel["dtypes"],
        ]
        for kernel in facts["kernels"]
    ]
    return "\n".join([*lines, "", "Kernels", table(["format", "backend", "usable", "dtypes, or why not"], rows)])
