"""A GPU that is not there: sorting, routing and combining by their texts on the twin, products by their definition.

Memory is that of :class:`conftest.HostDevice`. Every launch is noted, so that tests can count them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import itertools
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from nmsparse.cuda import arena, array, driver, experts, launch, projection, routing
from nmsparse.cuda.array import DeviceArray
from nmsparse.cuda.config_route import CombineConfig, RouteConfig
from nmsparse.cuda.kernels import combine as combine_text
from nmsparse.cuda.kernels import route as route_text
from nmsparse.cuda.tile.cpu import combine, route
from nmsparse.cuda.tile.cpu.plan import ends_of
from nmsparse.reference import gated

DTYPES = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "s32": np.dtype(np.int32),
    "s64": np.dtype(np.int64),
}


def at(address: int, count: int, dtype: np.dtype | str) -> np.ndarray:
    """``count`` numbers in memory."""
    dtype = DTYPES.get(dtype, dtype)
    if not count or not address:
        return np.empty(0, dtype)
    return np.frombuffer((ctypes.c_uint8 * (count * dtype.itemsize)).from_address(address), np.uint8).view(dtype)


class Recording:
    """As :class:`nmsparse.cuda.driver.Recording`, of calls that are marked :func:`recorded`."""

    active: list[tuple] | None = None

    def __init__(self):
        self.launches: list[tuple] = []

    def __enter__(self):
        Recording.active = self.launches
        return self

    def __exit__(self, *_):
        Recording.active = None

    def __call__(self, *values):
        for run, *arguments in self.launches:
            run(*(values[a.number] if isinstance(a, driver.Varying) else a for a in arguments))


def recorded(launch):
    """``launch(*arguments)``, which a recording that is entered keeps for later."""

    @functools.wraps(launch)
    def run(*arguments):
        if Recording.active is None:
            launch(*arguments)
        else:
            Recording.active.append((launch, *arguments))

    return run


class Kernel:
    """A launch of a text."""

    def __init__(self, config, launched: list):
        self.config, self.launched = config, launched

    @recorded
    def __call__(self, grid, stream, *arguments):
        self.launched.append(self.config)
        if isinstance(self.config, CombineConfig):
            self._combine(grid, *arguments)
        else:
            self._sort(grid, *arguments)

    def _sort(self, grid, *arguments):
        cfg = self.config
        name = "route" if isinstance(cfg, RouteConfig) else "dispatch"
        make, words = getattr(route_text, f"make_{name}"), getattr(route, f"make_{name}")
        names = inspect.signature(make(words(cfg), cfg)).parameters
        given = dict(zip(names, arguments, strict=True))
        tokens, slots, kinds = given["tokens"], given["tokens"] * cfg.top_k, {}
        if name == "route":
            kinds = {
                "logits": (tokens * given["pitch"] - given["pitch"] + cfg.experts, cfg.dtype),
                "bias": (cfg.experts, "f32"),
            }
        else:
            kinds = {"ids": (slots, cfg.ids), "given": (slots, cfg.weights)}
        inputs = {*kinds, "x", "order"}
        kinds = {
            "ids": (slots, "s32"),
            "weights": (slots, "f32"),
            "slots": (slots, "s32"),
            "rows": (slots, "s32"),
            "plan": (2 * cfg.experts if cfg.kept is None else 2 * (cfg.kept + 1), "s32"),
            "order": (cfg.experts, "s32"),
            "counter": (cfg.experts + 2, "s32"),
            "x": (tokens * given["x_pitch"], np.dtype(np.uint16)),
            "sorted": (slots * 8 * given["pieces"], np.dtype(np.uint16)),
        } | kinds
        for gmem in (gmem for gmem in names if gmem.endswith("_gmem")):
            memory = at(given[gmem], *kinds[gmem.removesuffix("_gmem")])
            memory.flags.writeable = gmem.removesuffix("_gmem") not in inputs
            given[gmem] = memory
        route.launch(make, words, cfg, grid, tuple(given.values()))

    def _combine(self, grid, d, slots, weights, base, y, tokens, columns, pieces, d_pitch, base_pitch, y_pitch):
        cfg, pairs = self.config, tokens * self.config.top_k
        memory = (
            at(d, pairs * d_pitch, cfg.dtype),
            at(slots, pairs, "s32"),
            at(weights, pairs, "f32"),
            at(base, tokens * base_pitch, cfg.dtype),
            at(y, tokens * y_pitch, cfg.dtype),
        )
        sizes = tokens, columns, pieces, d_pitch, base_pitch, y_pitch
        combine.run(combine_text.make_combine, cfg, grid, *memory, *sizes)


def projection_class(launched: list) -> type:
    """Projections whose product is its definition, in float64, of what the plan says."""

    class Defined(projection.Projection):
        def __init__(self, weight, *options):
            super().__init__(weight, *options)
            host = weight if isinstance(weight, DeviceArray) else weight.to_device("cpu")
            self.dense = (host.numpy() if host is weight else host.todense()).astype(np.float64)

        @recorded
        def __call__(self, config, grid, stream, x, x_pitch, tokens, rows, plan, y):
            launched.append(config)
            count = 2 * self.experts + 2 * self.part
            ends, _ = ends_of(config, at(plan, count, "s32"), self.experts)
            positions = ends[-1]
            x = np.lib.stride_tricks.as_strided(
                at(x, (tokens - 1) * x_pitch + self.columns, self.letters),
                (tokens, self.columns),
                (2 * x_pitch, 2),
            )
            if config.gather:
                x = x[at(rows, positions, "s32")]
            to = at(y, positions * self.outputs, self.letters).reshape(positions, self.outputs)
            for expert, (first, end) in enumerate(itertools.pairwise(ends)):
                h = x[first:end].astype(np.float64) @ self.dense[expert].T
                to[first:end] = gated(h, self.outputs, self.activation)

    return Defined


def linear(weight: DeviceArray):
    """The product that a library would have."""
    columns = weight.numpy().T
    return lambda x: array.from_host(x.numpy().astype(np.float32) @ columns)


@pytest.fixture
def launched(host_device, monkeypatch) -> list:
    """The configs of what has been launched on an emulated GPU of two SMs; its arrays are a library with a product."""
    launched: list = []
    monkeypatch.setattr(launch, "kernel_of", lambda config, device: Kernel(config, launched))
    monkeypatch.setattr(launch, "model_of", lambda device: replace(launch.H200, sms=2))
    monkeypatch.setattr(experts, "Projection", projection_class(launched))
    monkeypatch.setattr(experts, "Recording", Recording)
    monkeypatch.setattr(driver, "capture_id", lambda stream: 0)
    monkeypatch.setattr(driver, "relaxed_capture", contextlib.nullcontext)
    monkeypatch.setattr(arena, "_arenas", {})
    kind = array.kind_of(DeviceArray(0, (1,), DTYPES["f32"], 0))
    monkeypatch.setitem(array._kinds, DeviceArray, kind._replace(linear=linear))
    routing._route.cache_clear()
    yield launched
    routing._route.cache_clear()
