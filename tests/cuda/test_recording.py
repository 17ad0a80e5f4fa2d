"""Launches that are described once and repeated, on a driver that writes down what it is given."""

from __future__ import annotations

import ctypes
import threading
from types import SimpleNamespace

import pytest

from nmsparse.cuda import driver
from nmsparse.cuda.driver import Kernel, Recording, Varying


@pytest.fixture
def given(monkeypatch) -> list:
    """(grid, stream, arguments) of every launch of a kernel whose parameters are an address, a map and an int32."""
    given: list = []

    def launch(reference, kernel, pointers, extra):
        config = reference._obj
        address, number = (
            ctypes.cast(pointers[i], ctypes.POINTER(of))[0] for i, of in ((0, driver.U64), (2, ctypes.c_int32))
        )
        given.append((config.grid[0], config.stream or 0, address, ctypes.string_at(pointers[1], 128), number))
        return 0

    class Fake:
        library = SimpleNamespace(cuLaunchKernelEx=launch)

        def __call__(self, *_, **__):
            pass

    monkeypatch.setattr(driver, "driver", Fake)
    monkeypatch.setattr(driver, "current_device", lambda: 0)
    return given


def kernel() -> Kernel:
    return Kernel(b"", "name", "pmi", threads=128, shared_bytes=0)


MAP = bytes(range(128))


def test_a_kernel_launches(given):
    kernel()(7, 5, 0x1000, MAP, -3)
    assert given == [(7, 5, 0x1000, MAP, -3)]


def test_a_recording_repeats_with_other_addresses(given):
    first, second = kernel(), kernel()
    with Recording() as repeat:
        first(7, 5, Varying(0, 1), MAP, -3)
        second(9, 6, 0x2000, MAP, 4)
        first(8, 5, Varying(0, 0), MAP, 2)
    assert given == [], "a recorded launch is not made"
    repeat(0x10, 0x20)
    repeat(0x30, 0x40)
    assert [launch[2] for launch in given] == [0x20, 0x2000, 0x10, 0x40, 0x2000, 0x30]
    assert [(g, s, n) for g, s, _, _, n in given[:3]] == [(7, 5, -3), (9, 6, 4), (8, 5, 2)]
    assert {launch[3] for launch in given} == {MAP}
    first(1, 0, 0x50, MAP, 1)
    assert given[-1] == (1, 0, 0x50, MAP, 1), "after it, launches are made again"


def test_a_recording_is_of_its_thread(given):
    one = kernel()
    with Recording() as repeat:
        other = threading.Thread(target=one, args=(3, 0, 0x60, MAP, 1))
        other.start()
        other.join()
        assert len(given) == 1
    repeat()
    assert len(given) == 1


def test_a_failed_launch_says_what_failed(given, monkeypatch):
    one = kernel()
    one._call.message = lambda code: f"reason {code}"
    one.enter = lambda *_: 9
    with pytest.raises(driver.CudaError, match="launch of name: reason 9"):
        one(12, 0, 0x60, MAP, 1)
