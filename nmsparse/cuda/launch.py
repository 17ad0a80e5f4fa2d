"""Kernels ready to launch: compiled once for a machine (disk), loaded once for a process, with their workspace.

The hot path passes raw addresses to the driver; Numba is imported only to compile.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import UnsupportedDeviceError
from . import array, cache, driver
from .choose import H200, Device
from .compiler import Cubin, compile_kernel
from .config import GemmConfig, GemvConfig
from .config_grouped import GroupedConfig, GroupedGemvConfig
from .config_mma import MmaConfig
from .config_route import CombineConfig, DispatchConfig, EndsConfig, RouteConfig

__all__ = ["arch_of", "compile_all", "compiled", "kernel_of", "model_of", "workspace"]


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
    if config.pairs:
        from .kernels.samoyeds import make_samoyeds
        from .tile.gpu import samoyeds

        return make_samoyeds(samoyeds.make(config), config)
    from .kernels.gemm import make_gemm
    from .tile import gpu

    return make_gemm(gpu.make(config), config)


def _grouped(config: GroupedConfig) -> Callable[..., None]:
    from .kernels.grouped import make_grouped
    from .tile.gpu import grouped

    return make_grouped(grouped.make(config), config)


def _gemv_grouped(config: GroupedGemvConfig) -> Callable[..., None]:
    from .kernels.gemv_grouped import make_gemv_grouped
    from .tile.gpu import gemv_grouped

    return make_gemv_grouped(gemv_grouped.make(config), config)


def _gemv(config: GemvConfig) -> Callable[..., None]:
    from .kernels.gemv import make_gemv
    from .tile.gpu import gemv

    return make_gemv(gemv.make(config), config)


def _mma(config: MmaConfig) -> Callable[..., None]:
    from .kernels.gemm_mma import make_gemm_mma
    from .tile.gpu import warp

    return make_gemm_mma(warp.make(config), config)


def _route(config: RouteConfig) -> Callable[..., None]:
    from .kernels.route import make_route
    from .tile.gpu import route

    return make_route(route.make_route(config), config)


def _dispatch(config: DispatchConfig) -> Callable[..., None]:
    from .kernels.route import make_dispatch
    from .tile.gpu import route

    return make_dispatch(route.make_dispatch(config), config)


def _ends(config: EndsConfig) -> Callable[..., None]:
    from .kernels.route import make_ends
    from .tile.gpu import route

    return make_ends(route.make_ends(config), config)


def _combine(config: CombineConfig) -> Callable[..., None]:
    from .kernels.combine import make_combine
    from .tile.gpu import combine

    return make_combine(combine.make(config), config)


# The text of each kind of config; Numba is imported when a text is made.
TEXTS: dict[type, Callable[[Any], Callable[..., None]]] = {
    GemmConfig: _gemm,
    GemvConfig: _gemv,
    MmaConfig: _mma,
    GroupedConfig: _grouped,
    GroupedGemvConfig: _gemv_grouped,
    RouteConfig: _route,
    DispatchConfig: _dispatch,
    EndsConfig: _ends,
    CombineConfig: _combine,
}


def compiled(config: Any, arch: str) -> Cubin:
    """The kernel of ``config`` for ``arch``, from the disk cache if it is there. Needs no GPU."""
    build = functools.partial(_build, config, arch)
    return cache.cached(type(config).__name__, config, arch, build)


def compile_all(configs: Iterable[Any], arch: str, processes: int | None = None) -> None:
    """Put the kernels of ``configs`` into the disk cache, by as many processes as there are cores; no GPU is needed."""
    wanted = list(dict.fromkeys(configs))
    workers = min(processes or os.cpu_count() or 1, len(wanted))
    if workers > 1:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            list(pool.map(_compile, wanted, [arch] * len(wanted)))
    elif wanted:
        compiled(wanted[0], arch)


def _compile(config: Any, arch: str) -> None:
    compiled(config, arch)


def _build(config: Any, arch: str) -> Cubin:
    text, ctas = TEXTS[type(config)](config), getattr(config, "ctas", 1)
    return compile_kernel(text, config.signature, arch, threads=config.threads, ctas=ctas)


@functools.cache
def kernel_of(config: Any, device: int) -> driver.Kernel:
    """The kernel of ``config``, loaded."""
    cubin = compiled(config, model_of(device).arch)
    slack = 1024 if isinstance(config, GemmConfig) else 0  # the ring starts at a multiple of 1024
    return driver.Kernel(
        cubin.code,
        cubin.entry,
        config.signature,
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
