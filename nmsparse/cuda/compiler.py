"""From kernel text to a cubin, without a device: Numba writes PTX, ptxas assembles it for one architecture."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
import threading
import types as python_types
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from ..errors import NMSparseError, UnsupportedDeviceError

__all__ = ["Cubin", "compile_kernel"]

LOCK = threading.Lock()


@dataclass(frozen=True)
class Cubin:
    """Machine code of one kernel, and what the assembler said about it."""

    code: bytes
    entry: str
    log: str

    def resources(self) -> dict[str, int]:
        """Registers, spilled bytes and stack bytes a thread, as the assembler reports them."""
        found = {
            name: re.search(pattern, self.log)
            for name, pattern in {
                "registers": r"Used (\d+) registers",
                "spill_stores": r"(\d+) bytes spill stores",
                "spill_loads": r"(\d+) bytes spill loads",
                "stack": r"(\d+) bytes stack frame",
            }.items()
        }
        return {name: int(match[1]) if match else 0 for name, match in found.items()}


def compile_kernel(kernel: Callable[..., None], signature: str, arch: str, *, threads: int, ctas: int = 1) -> Cubin:
    """Machine code of ``kernel`` for ``arch`` ("sm_80", "sm_90a", …).

    ``signature`` has a letter for each argument: ``p`` an address (uint64), ``i`` an int32, ``m`` a tensor map of 128
    bytes that is passed by value and whose address the kernel gets. Registers leave room for ``ctas`` blocks of
    ``threads`` on an SM.
    """
    ptx, entry = to_ptx(kernel, signature, arch, threads, ctas)
    for number, letter in enumerate(signature):
        if letter == "m":
            ptx = _by_value(ptx, entry, number)
    code, log = assemble(ptx, arch)
    return Cubin(code, entry, log)


def to_ptx(kernel: Callable[..., None], signature: str, arch: str, threads: int, ctas: int = 1) -> tuple[str, str]:
    """PTX text and the name of its entry."""
    from numba import cuda
    from numba.cuda import types

    digits, suffix = re.fullmatch(r"sm_(\d+)(a?)", arch).groups()  # type: ignore[union-attr]
    capability = (int(digits) // 10, int(digits) % 10)
    letters = {"p": types.uint64, "m": types.uint64, "i": types.int32}
    with LOCK, _without_device(capability):
        ptx, _ = cuda.compile(
            kernel,
            types.void(*(letters[letter] for letter in signature)),
            cc=(*capability, suffix) if suffix else capability,
            device=False,
            abi="numba",
            launch_bounds=(threads, ctas),
        )
    ptx = re.sub(r"^\.common \.global .*_ZN08NumbaEnv.*\n", "", ptx, flags=re.M)  # Numba's own bookkeeping
    mangled = re.search(r"\.entry (\w+)\(", ptx)[1]  # type: ignore[index]
    return ptx.replace(mangled, kernel.__name__), kernel.__name__


@contextmanager
def _without_device(capability: tuple[int, int]) -> Any:
    """Numba asks the current device for its capability while it types device functions; answer without one."""
    device = python_types.SimpleNamespace(compute_capability=capability)
    with mock.patch("numba.cuda.dispatcher.get_current_device", return_value=device):
        yield


def _by_value(ptx: str, entry: str, number: int) -> str:
    """Make parameter ``number`` a 64-byte aligned 128-byte value whose address the kernel gets.

    Numba has no parameters passed by value and PTX ISA wants a tensor map in parameter, constant or global space;
    parameters need no fence, no copy and work in CUDA graphs.
    """
    name = f"{entry}_param_{number}"
    ptx, declared = re.subn(rf"\.param \.u64 {name}\b", f".param .align 64 .b8 {name}[128]", ptx)
    ptx, used = re.subn(
        rf"ld\.param\.(?:b|u)64\s+(%rd\d+), \[{name}\];", rf"mov.b64 \1, {name}; cvta.param.u64 \1, \1;", ptx
    )
    if declared != 1 or used < 1:
        raise NMSparseError(f"compile: expected parameter {number} of {entry} as one address that is used")
    return ptx


def assemble(ptx: str, arch: str) -> tuple[bytes, str]:
    """The cubin of ``ptx`` for ``arch``, and ptxas's report.

    ptxas and not nvJitLink: the latter compiles for linking, where it ignores setmaxnreg and may serialise wgmma.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        command = [ptxas(), "-v", f"-arch={arch}", str(source), "-o", str(target)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise NMSparseError(f"ptxas {arch}: {run.stderr.strip() or run.stdout.strip()}")
        return target.read_bytes(), run.stderr + run.stdout


@functools.lru_cache(maxsize=1)
def ptxas() -> str:
    """Path of the assembler: of the pip package, of CUDA_HOME, on the PATH."""
    places = []
    if (spec := importlib.util.find_spec("nvidia")) and spec.submodule_search_locations:
        for root in spec.submodule_search_locations:
            places += [*Path(root).glob("cu*/bin/ptxas*"), *Path(root).glob("cuda_nvcc/bin/ptxas*")]
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if variable in os.environ:
            places.append(Path(os.environ[variable], "bin", "ptxas"))
    places += [Path(path) for path in (shutil.which("ptxas"), "/usr/local/cuda/bin/ptxas") if path]
    for place in places:
        if place.is_file():
            return str(place)
    raise UnsupportedDeviceError(
        "ptxas, the assembler of CUDA, was not found; install it with: python -m pip install 'nmsparse[cuda13]'"
    )
