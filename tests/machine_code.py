"""What a cubin says, for tests that look at it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest


def disassembled(code: bytes, folder: Path) -> str:
    """The machine code of a cubin as text; skips the test where there is no disassembler."""
    from nmsparse.cuda import compiler

    tool = Path(compiler.ptxas()).with_name("nvdisasm")
    if not tool.is_file():
        pytest.skip(f"no nvdisasm beside {compiler.ptxas()}; install it with: pip install nvidia-cuda-nvdisasm")
    path = folder / "kernel.cubin"
    path.write_bytes(code)
    return subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True).stdout


def assert_overlaps(code: str, overlaps: bool = True) -> None:
    """The machine code awaits the launch before it, and lets the next begin, ahead of all else in global memory; or
    it does neither, and may run on any architecture."""
    outside = "LDG|STG|ATOMG|RED|LDGSTS|UBLKCP|UTMALDG"
    order = re.findall(rf"\b(ACQBULK|PREEXIT|{outside})\b", code)
    assert set(order) & set(outside.split("|")), "no access to global memory at all"
    if overlaps:
        assert order[:2] == ["ACQBULK", "PREEXIT"], f"global memory first: {order[:5]}"
    else:
        assert not {"ACQBULK", "PREEXIT"} & set(order)
