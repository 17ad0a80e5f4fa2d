"""info: complete where everything is installed, and still an answer where nothing is."""

import ctypes
import json
import subprocess
import sys

import numba
import numpy as np
import pytest

import nmsparse
from nmsparse import UnsupportedDeviceError
from nmsparse.cli import driver, info

FORMATS = ["nm", "vnm", "samoyeds"]


def run_without(*modules, arguments=("info", "--json")):
    code = (
        f"import sys\nfor name in {modules!r}: sys.modules[name] = None\n"
        f"from nmsparse.__main__ import main\nsys.exit(main({list(arguments)!r}))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_facts():
    facts = info.collect()
    assert facts["nmsparse"] == nmsparse.__version__
    assert (facts["packages"]["numpy"], facts["packages"]["numba"]) == (np.__version__, numba.__version__)
    assert facts["packages"].keys() == set(info.PACKAGES)
    cpu = facts["cpu"]
    assert cpu["problem"] is None
    assert cpu["threads"] == numba.config.NUMBA_NUM_THREADS
    assert cpu["cores"] >= 1
    kernels = {(kernel["backend"], kernel["format"]): kernel for kernel in facts["kernels"]}
    assert len(kernels) == 3 * len(FORMATS)
    for kind in FORMATS:
        assert kernels["cpu (Numba)", kind]["usable"]
        assert kernels["reference (NumPy)", kind]["usable"]
        why = facts["gpu"]["kernels"] if kind in info.CUDA else "not part of this version"
        assert (kernels["cuda", kind]["usable"], kernels["cuda", kind]["why_not"]) == (why is None, why)
    json.dumps(facts)


def test_the_cache_is_where_numba_writes():
    nmsparse.array(np.ones((4, 16), np.float32), "2:4")
    (directory,) = {
        kernel.stats.cache_path
        for kernel in vars(sys.modules["nmsparse.cpu.pack"]).values()
        if hasattr(kernel, "stats") and kernel.stats.cache_path  # what is inlined is not cached by itself
    }
    assert info.collect()["cpu"]["cache"] == directory


HOPPER, PASCAL = {"compute_capability": "9.0"}, {"compute_capability": "6.1"}


@pytest.mark.parametrize(
    ("gpu", "numba_cuda", "why"),
    [
        ({"devices": [], "problem": "no NVIDIA driver"}, "0.30.4", "no NVIDIA driver"),
        ({"devices": [PASCAL]}, "0.30.4", "sparse tensor cores begin with compute capability 8.0"),
        ({"devices": [PASCAL, HOPPER]}, None, "numba-cuda is not installed"),
        ({"devices": [HOPPER]}, "0.30.4", None),
    ],
)
def test_what_keeps_gpu_kernels_from_running(monkeypatch, gpu, numba_cuda, why):
    monkeypatch.setattr("nmsparse.cuda.compiler.ptxas", lambda: "ptxas")
    found = info._gpu_problem(gpu, {"numba-cuda": numba_cuda})
    assert found is None if why is None else found.startswith(why)


def test_a_missing_assembler_is_named(monkeypatch):
    def missing():
        raise UnsupportedDeviceError("ptxas was not found")

    monkeypatch.setattr("nmsparse.cuda.compiler.ptxas", missing)
    assert info._gpu_problem({"devices": [HOPPER]}, {"numba-cuda": "0.30.4"}) == "ptxas was not found"


def test_text(capsys):
    assert info.main(type("Arguments", (), {"json": False})) == 0
    text = capsys.readouterr().out
    for heading in ("nmsparse ", "Python ", "Packages", "CPU", "GPU", "Kernels"):
        assert f"\n{heading}" in f"\n{text}"
    assert f"  numpy         {np.__version__}" in text
    assert "samoyeds  cpu (Numba)        yes     float16, bfloat16, float32" in text
    assert "samoyeds  cuda               no      not part of this version" in text
    assert "  compiled kernels are kept in " in text


def test_a_base_installation_is_enough():
    run = run_without("safetensors", "tqdm", "torch", "scipy", "matplotlib", "transformers", "numba.cuda", "numba_cuda")
    assert (run.returncode, run.stderr) == (0, "")
    assert json.loads(run.stdout)["cpu"]["problem"] is None


def test_a_broken_numba_is_reported():
    run = run_without("numba")
    assert (run.returncode, run.stderr) == (0, "")
    facts = json.loads(run.stdout)
    assert "the compiled kernels cannot be used (ModuleNotFoundError" in facts["cpu"]["problem"]
    usable = {(kernel["backend"], kernel["usable"]) for kernel in facts["kernels"]}
    assert usable == {("cpu (Numba)", False), ("reference (NumPy)", True), ("cuda", False)}
    text = run_without("numba", arguments=("info",))
    assert text.returncode == 0 and "the compiled kernels cannot be used" in text.stdout


class Driver:
    """A stand-in for libcuda with one GPU; ``codes`` are results other than success."""

    def __init__(self, count=1, **codes):
        self.count, self.codes = count, codes

    def __getattr__(self, name):
        def function(*arguments):
            if name in self.codes:
                return self.codes[name]
            if name == "cuDeviceGetName":
                arguments[0].value = b"NVIDIA H200"
            elif name != "cuInit":
                values = {"cuDeviceGetCount": self.count, "cuDriverGetVersion": 13000, "cuDeviceGet": 0}
                values |= {"cuDeviceTotalMem_v2": 150_000_000_000}
                if name == "cuDeviceGetAttribute":
                    values[name] = {75: 9, 76: 0}[arguments[1]]
                arguments[0]._obj.value = values[name]
            return 0

        function.__name__ = name
        return function


def test_a_gpu_is_described(monkeypatch, capsys):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    device = {"name": "NVIDIA H200", "compute_capability": "9.0", "memory": 150_000_000_000}
    assert driver.gpus() == {"devices": [device], "driver": "CUDA 13.0"}
    info.main(type("Arguments", (), {"json": False}))
    assert "  NVIDIA H200, compute capability 9.0, 150.0 GB\n  driver for CUDA 13.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("library", "problem"),
    [
        (Driver(cuInit=100), "the NVIDIA driver does not answer (cuInit returned 100)"),
        (Driver(cuDeviceGetName=3), "the NVIDIA driver does not answer (cuDeviceGetName returned 3)"),
        (Driver(count=0), "the NVIDIA driver shows no GPU"),
        (object(), "the NVIDIA driver does not answer ('object' object has no attribute 'cuInit')"),
    ],
    ids=["no device", "error", "no GPU", "another library"],
)
def test_a_driver_that_does_not_work(monkeypatch, library, problem):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert (driver.gpus()["devices"], driver.gpus()["problem"]) == ([], problem)


def test_no_driver(monkeypatch):
    def absent(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert driver.gpus()["problem"].startswith("no NVIDIA driver")
