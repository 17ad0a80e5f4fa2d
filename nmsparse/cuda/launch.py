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
from importlib import import_module
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

__all__ = ["arch_of", "compile_all", "compiled", "kernel_of", "model_of", "overlaps", "workspace"]


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


def overlaps(device: int) -> bool:
    """Whether a kernel may begin while the one launched before it on its stream still runs: sm_90 on.

    Its start, and what it sets up in shared memory, then cost no time of their own. Such launches may share and reuse
    any memory, because each thread of theirs waits for the end of the launch before (``await_previous``) ahead of its
    first access to global memory. So a launch is not complete until the one before it is, and touches nothing until
    all before it are: accesses of different launches are in the order of the stream, as if nothing overlapped, within
    a layer and from one to the next. A launch of another kind, before or after these, is complete before the next one
    begins, or begins when the one before it is complete.

    A kernel lets the next one begin (``begin_next``) when it has waited itself, so that no more than two overlap. All
    of its CTAs have their places by then: those of the next one, which keep theirs while they wait, take none away.

    Source: CUDA Programming Guide, "Programmatic Dependent Launch and Synchronization"; PTX ISA, "griddepcontrol".
    """
    return int(arch_of(device).removeprefix("sm_").rstrip("a")) >= 90


def _text(kernel: str, words: str, make: str = "make") -> Callable[[Any], Callable[..., None]]:
    """What gives a config its text: ``make_X`` of ``kernels``, "module.X", with the words that ``tile.gpu`` makes."""
    module, _, name = kernel.partition(".")

    def text(config: Any) -> Callable[..., None]:
        tile = import_module(f".tile.gpu{words and '.' + words}", __package__)
        maker = getattr(import_module(f".kernels.{module}", __package__), f"make_{name or module}")
        return maker(getattr(tile, make)(config), config)

    return text


_gemm, _samoyeds = _text("gemm", ""), _text("samoyeds", "samoyeds")

# The text of each kind of config; Numba is imported when a text is made.
TEXTS: dict[type, Callable[[Any], Callable[..., None]]] = {
    GemmConfig: lambda config: _samoyeds(config) if config.pairs else _gemm(config),
    GemvConfig: _text("gemv", "gemv"),
    MmaConfig: _text("gemm_mma", "warp"),
    GroupedConfig: _text("grouped", "grouped"),
    GroupedGemvConfig: _text("gemv_grouped", "gemv_grouped"),
    RouteConfig: _text("route.route", "route", "make_route"),
    DispatchConfig: _text("route.dispatch", "route", "make_dispatch"),
    EndsConfig: _text("route.ends", "route", "make_ends"),
    CombineConfig: _text("combine", "combine"),
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
def kernel_of(config: Any, device: int, cluster: int = 1) -> driver.Kernel:
    """The kernel of ``config``, loaded, for launches in clusters of ``cluster`` CTAs."""
    cubin = compiled(config, model_of(device).arch)
    slack = 1024 if isinstance(config, GemmConfig) else 0  # the ring starts at a multiple of 1024
    return driver.Kernel(
        cubin.code,
        cubin.entry,
        config.signature,
        threads=config.threads,
        shared_bytes=config.shared_bytes + slack,
        cluster=cluster,
        overlaps=getattr(config, "overlaps", False),
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
    place = device, stream, driver.capture_id(stream)
    held = _workspaces.get(place)
    if held is None:
        held = _workspaces[place] = []
    if not held or held[-1].sums < sums or held[-1].flags < flags:
        held.append(Workspace(device, sums, flags))
    return held[-1]
