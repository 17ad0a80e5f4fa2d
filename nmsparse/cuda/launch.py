"""Kernels ready to launch: compiled once for a machine (disk), loaded once for a process, with their workspace.

The hot path passes raw addresses to the driver; Numba is imported only to compile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import UnsupportedDeviceError
from . import array, cache, config_mma, driver
from .choose import H200, Device
from .compiler import Cubin, compile_kernel
from .config import GemmConfig, GemvConfig
from .config_mma import MmaConfig

__all__ = ["arch_of", "compiled", "kernel_of", "model_of", "workspace"]

# Weights, map of X, Y, bias, partial sums, flags; rows, tokens, pitch of Y, blocks along K, split tiles, their parts.
GEMM_SIGNATURE = "pmppppiiiiii"
# Weights, X, Y, bias; rows, tokens, columns, pitches of X and Y, blocks along K.
GEMV_SIGNATURE = "ppppiiiiii"


@functools.cache
def model_of(device: int) -> Device:
    """What :mod:`~nmsparse.cuda.choose` knows of a GPU: its own SMs and memory, the rates of an H200's SM."""
    major, minor = driver.capability(device)
    if major < 8:
        raise UnsupportedDeviceError(
            f"cuda:{device} has compute capability {major}.{minor}; sparse tensor cores: 8.0 on"
        )
    wires, clock = driver.attribute(driver.BUS_WIDTH, device), driver.attribute(driver.MEMORY_CLOCK, device)
    memory = 0.87 * 2 * clock * 1e3 * wires / 8  # of the data sheet's bytes/s, as on an H200
    arch = f"sm_{major}{minor}" + ("a" if major == 9 else "")
    return replace(H200, arch=arch, sms=driver.attribute(driver.SM_COUNT, device), memory=memory or H200.memory)


def arch_of(device: int) -> str:
    """What ptxas calls the architecture of a GPU: "sm_90a" for an H200."""
    return model_of(device).arch


def _gemm(config: GemmConfig) -> Callable[..., None]:
    from .kernels.gemm import make_gemm
    from .tile import gpu

    return make_gemm(gpu.make(config), config)


def _gemv(config: GemvConfig) -> Callable[..., None]:
    from .kernels.gemv import make_gemv
    from .tile.gpu import gemv

    return make_gemv(gemv.make(config), config)


def _mma(config: MmaConfig) -> Callable[..., None]:
    from .kernels.gemm_mma import make_gemm_mma
    from .tile.gpu import warp

    return make_gemm_mma(warp.make(config), config)


# The text of each kind of config, and the letters of its arguments; Numba is imported when a text is made.
TEXTS = {
    GemmConfig: (_gemm, GEMM_SIGNATURE),
    GemvConfig: (_gemv, GEMV_SIGNATURE),
    MmaConfig: (_mma, config_mma.SIGNATURE),
}


def compiled(config: GemmConfig | GemvConfig | MmaConfig, arch: str) -> Cubin:
    """The kernel of ``config`` for ``arch``, from the disk cache if it is there. Needs no GPU."""
    make, signature = TEXTS[type(config)]
    build = functools.partial(_build, make, config, signature, arch)
    return cache.cached(type(config).__name__, config, arch, build)


def _build(make: Any, config: Any, signature: str, arch: str) -> Cubin:
    return compile_kernel(make(config), signature, arch, threads=config.threads)


@functools.cache
def kernel_of(config: GemmConfig | GemvConfig | MmaConfig, device: int) -> driver.Kernel:
    """The kernel of ``config``, loaded."""
    cubin = compiled(config, model_of(device).arch)
    slack = 1024 if isinstance(config, GemmConfig) else 0  # the ring starts at a multiple of 1024
    return driver.Kernel(
        cubin.code,
        cubin.entry,
        TEXTS[type(config)][1],
        threads=config.threads,
        shared_bytes=config.shared_bytes + slack,
        cluster=getattr(config, "cluster", 1),
        what=str(config),
    )


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
