"""Kernels ready to launch: compiled once for a machine (disk), loaded once for a process, with their workspace.

The hot path passes raw addresses to the driver; Numba is imported only to compile.
"""

from __future__ import annotations

import functools

import numpy as np

from . import array, cache, driver
from .compiler import Cubin, compile_kernel
from .config import GemmConfig, GemvConfig

__all__ = ["GEMM_SIGNATURE", "arch_of", "compile_gemm", "gemm_kernel", "workspace"]

# Weights, map of X, Y, bias, partial sums, flags; rows, tokens, pitch of Y, blocks along K, split tiles, their parts.
GEMM_SIGNATURE = "pmppppiiiiii"
# Weights, X, Y, bias; rows, tokens, columns, pitches of X and Y, blocks along K.
GEMV_SIGNATURE = "ppppiiiiii"


def arch_of(device: int) -> str:
    """What ptxas calls the architecture of a GPU: "sm_90a" for an H200."""
    major, minor = driver.capability(device)
    return f"sm_{major}{minor}" + ("a" if major == 9 else "")


def compile_gemm(config: GemmConfig, arch: str = "sm_90a") -> Cubin:
    """The ``wgmma.sp`` kernel of ``config``, from the disk cache if it is there. Needs no GPU."""

    def build() -> Cubin:
        from .kernels.gemm import make_gemm
        from .tile import gpu

        return compile_kernel(make_gemm(gpu.make(config), config), GEMM_SIGNATURE, arch, threads=config.threads)

    return cache.cached("gemm", config, arch, build)


@functools.cache
def gemm_kernel(config: GemmConfig, device: int) -> driver.Kernel:
    """The kernel of ``config``, loaded."""
    cubin = compile_gemm(config, arch_of(device))
    return driver.Kernel(
        cubin.code,
        cubin.entry,
        GEMM_SIGNATURE,
        threads=config.threads,
        shared_bytes=config.shared_bytes + 1024,  # the ring starts at a multiple of 1024
        cluster=config.cluster,
        what=str(config),
    )


def compile_gemv(config: GemvConfig, arch: str = "sm_90a") -> Cubin:
    """The kernel for a handful of tokens, from the disk cache if it is there. Needs no GPU."""

    def build() -> Cubin:
        from .kernels.gemv import make_gemv
        from .tile import gemv_gpu

        return compile_kernel(make_gemv(gemv_gpu.make(config), config), GEMV_SIGNATURE, arch, threads=config.threads)

    return cache.cached("gemv", config, arch, build)


@functools.cache
def gemv_kernel(config: GemvConfig, device: int) -> driver.Kernel:
    """The kernel of ``config``, loaded."""
    cubin, shape = (
        compile_gemv(config, arch_of(device)),
        {"threads": config.threads, "shared_bytes": config.shared_bytes},
    )
    return driver.Kernel(cubin.code, cubin.entry, GEMV_SIGNATURE, **shape, what=str(config))


class Workspace:
    """Memory that the kernels of one stream share: partial sums, and flags that are zero between launches."""

    def __init__(self, device: int, sums: int, flags: int):
        self.sums, self.flags = sums, flags
        with driver.relaxed_capture():
            self.memory = array.from_host(np.zeros(sums + flags, np.uint32), device)
        self.partial_pointer = self.memory.pointer
        self.flag_pointer = self.memory.pointer + 4 * sums


_workspaces: dict[tuple[int, int, int], list[Workspace]] = {}


def workspace(device: int, stream: int, sums: int, flags: int) -> Workspace:
    """Room for ``sums`` floats and ``flags`` flags for kernels on ``stream``.

    A graph under capture gets its own, since it may be replayed beside the stream. Outgrown ones stay: a graph or a
    running kernel may still use them.
    """
    held = _workspaces.setdefault((device, stream, driver.capture_id(stream)), [])
    if not held or held[-1].sums < sums or held[-1].flags < flags:
        held.append(Workspace(device, sums, flags))
    return held[-1]
