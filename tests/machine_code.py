"""What a cubin says, for tests that look at it."""

from __future__ import annotations

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
