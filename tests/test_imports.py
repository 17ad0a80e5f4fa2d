"""The architecture, enforced: imports point one way, and importing the package stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nmsparse

ROOT = Path(nmsparse.__file__).parent
# Each layer may import itself and what stands before it. docs/architecture.md draws the same picture.
LAYERS = [
    "errors",
    "formats",
    "reference",
    "testing",
    "cpu",
    "cuda",
    "ops",
    "prune",
    "moe",
    "io",
    "torch",
    "demo",
    "calibration",
    "bench",
    "cli",
]
HEAVY = {"numba", "torch", "scipy", "safetensors", "matplotlib", "tqdm", "transformers"}


def layer_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    """Absolute names of everything that a file imports, at any depth of the code."""
    package = ["nmsparse", *path.relative_to(ROOT).parts[:-1]]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, node.module] if node.module else base)
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported_modules(path)}


FILES = [
    path for path in sorted(ROOT.rglob("*.py")) if path.parent != ROOT or path.stem not in ("__init__", "__main__")
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    layer = layer_of(path)
    assert layer in LAYERS, f"{layer} has no place in the order of layers"
    used = {name.split(".")[1] for name in imported_modules(path) if name.startswith("nmsparse.")}
    up = {other for other in used & set(LAYERS) if LAYERS.index(other) > LAYERS.index(layer)}
    assert not up


def test_numba_lives_in_the_backends_only():
    users = {layer_of(path) for path in FILES if {"numba", "llvmlite"} & roots(path)}
    assert users <= {"cpu", "cuda", "cli"}, "cli may ask numba for its version"


def test_torch_lives_in_the_bridge_only():
    """Benchmarks compare with it."""
    users = {layer_of(path) for path in FILES if {"torch", "transformers"} & roots(path)}
    assert users <= {"torch", "bench"}


def test_what_a_warm_launch_needs_is_light():
    light = "array cache compiler driver layout pack"
    code = f"import sys; from nmsparse.cuda import {light.replace(' ', ', ')}; print(*({HEAVY} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == []


def test_no_file_is_too_long():
    long = {str(path): length for path in FILES if (length := len(path.read_text().splitlines())) > 500}
    assert not long


def test_import_is_light():
    code = f"import sys, nmsparse; print(*sorted({HEAVY} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == []


def test_version_is_the_changelogs():
    changelog = (ROOT.parent / "CHANGELOG.md").read_text()
    assert f"## {nmsparse.__version__}" in changelog
    assert set(nmsparse.__all__) <= set(dir(nmsparse))
