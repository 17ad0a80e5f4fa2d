"""What tests of the GPU backend share: skipping without a GPU, and a stand-in for the device's memory."""

from __future__ import annotations

import contextlib
import ctypes
import functools

import numpy as np
import pytest
from emulated import launched  # noqa: F401 (a fixture of these tests)

from nmsparse import UnsupportedDeviceError
from nmsparse.cuda import driver, pack
from nmsparse.cuda.tile.cpu import elements


@functools.cache
def has_gpu() -> bool:
    try:
        driver.current_device()
    except UnsupportedDeviceError:
        return False
    return True


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not has_gpu():
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(scope="module")
def torch():
    """torch that can use a GPU, seeded."""
    module = pytest.importorskip("torch", reason="needs torch")
    if not module.cuda.is_available():
        pytest.skip("needs torch with CUDA")
    module.manual_seed(0)
    return module


class HostDevice:
    """Device memory that is host memory: poisoned when new; a second free and a copy from outside raise."""

    def __init__(self):
        self.allocations: dict[int, np.ndarray] = {}
        self.waits: list[int] = []

    def allocate(self, nbytes: int, device: int) -> int:
        assert nbytes > 0
        raw = np.full(nbytes + 256, 0xA5, np.uint8)
        start = -raw.ctypes.data % 256
        memory = raw[start : start + nbytes]
        self.allocations[memory.ctypes.data] = memory
        return memory.ctypes.data

    def free(self, address: int, device: int) -> None:
        del self.allocations[address]

    def memory(self, address: int) -> np.ndarray:
        """From ``address`` to the end of its allocation."""
        for start, memory in self.allocations.items():
            if start <= address < start + memory.size:
                return memory[address - start :]
        raise AssertionError(f"no allocation at {address:#x}")

    def copy_to_device(self, address: int, source: int, nbytes: int, device: int) -> None:
        assert self.memory(address).size >= nbytes
        ctypes.memmove(address, source, nbytes)

    def copy_to_host(self, target: int, address: int, nbytes: int, device: int) -> None:
        assert self.memory(address).size >= nbytes
        ctypes.memmove(target, address, nbytes)

    def copy_on_device(self, target: int, address: int, nbytes: int, device: int) -> None:
        self.copy_to_device(target, address, nbytes, device)

    def wait_for_legacy_stream(self, stream: int, device: int) -> None:
        self.waits.append(stream)

    def synchronize(self, stream: int, device: int) -> None:
        self.waits.append(stream)

    def kernel(self, name: str, cfg: pack.PackConfig, device: int):
        """The kernel's text on NumPy."""

        def launch(grid, stream, *arguments):
            letters = zip(arguments, pack.SIGNATURES[name], strict=True)
            given = [self.memory(a) if kind == "p" and a else a for a, kind in letters]
            elements.run(pack.MAKERS[name], cfg, grid, *given)

        return launch


@pytest.fixture
def host_device(monkeypatch) -> HostDevice:
    """Arrays "on a GPU" in host memory, the pack kernels run by their NumPy twin."""
    device = HostDevice()
    for name in ("allocate", "free", "copy_to_device", "copy_to_host", "copy_on_device", "synchronize"):
        monkeypatch.setattr(driver, name, getattr(device, name))
    monkeypatch.setattr(driver, "wait_for_legacy_stream", device.wait_for_legacy_stream)
    monkeypatch.setattr(driver, "current_device", lambda: 0)
    monkeypatch.setattr(driver, "device_of", lambda address: 0)
    monkeypatch.setattr(pack, "_kernel", device.kernel)
    monkeypatch.setattr(driver, "using", lambda device: contextlib.nullcontext())
    return device
