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
from ..errors import UnsupportedDeviceError
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
    cpu, gpu = _cpu(), driver.gpus()
    packages = {name: _version(name) for name in PACKAGES}
    gpu |= {"kernels": _gpu_problem(gpu, packages), "cache": _gpu_cache()}
    return {
        "nmsparse": __version__,
        "location": str(Path(__file__).parents[1]),
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "packages": packages,
        "cpu": cpu,
        "gpu": gpu,
        "kernels": _kernels(cpu["problem"], gpu["kernels"]),
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


def _gpu_cache() -> str:
    """Where compiled GPU kernels are, and how much."""
    cache = importlib.import_module("nmsparse.cuda.cache")
    return f"{cache.folder()} ({size(cache.size())})"


def _gpu_problem(gpu: dict[str, Any], packages: dict[str, str | None]) -> str | None:
    """Why no GPU kernel can run here, None if they can."""
    if "problem" in gpu:
        return gpu["problem"]
    if not any(float(device["compute_capability"]) >= 8 for device in gpu["devices"]):
        return "sparse tensor cores begin with compute capability 8.0"
    if not packages["numba-cuda"]:
        return "numba-cuda is not installed: pip install 'nmsparse[cuda13]'"
    try:
        importlib.import_module("nmsparse.cuda.compiler").ptxas()
    except UnsupportedDeviceError as error:
        return str(error)
    return None


NO_CUDA = "not part of this version"
# What the GPU kernels take, by format.
CUDA = {"nm": "2:4 in float16, bfloat16", "vnm": "float16, bfloat16, v a multiple of 64"}


def _kernels(cpu: str | None, gpu: str | None) -> list[dict[str, Any]]:
    """One row per backend and format: whether it can run here and, if not, why. ``cpu``, ``gpu``: their problems."""
    rows = [("cpu (Numba)", kind, "float16, bfloat16, float32", cpu) for kind in CLASSES]
    rows += [("reference (NumPy)", kind, "float16, bfloat16, float32, float64", None) for kind in CLASSES]
    rows += [("cuda", kind, CUDA.get(kind, ""), gpu if kind in CUDA else NO_CUDA) for kind in CLASSES]
    return [
        {"backend": backend, "format": kind, "dtypes": dtypes, "usable": why is None, "why_not": why}
        for backend, kind, dtypes, why in rows
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
    elif gpu["kernels"]:
        lines.append(f"  {gpu['kernels']}")
    lines.append(f"  compiled kernels are kept in {gpu['cache']}")
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
