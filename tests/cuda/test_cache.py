"""The disk cache of compiled kernels: hits, damage, concurrent processes, and that a hit is quick."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nmsparse.cuda import cache
from nmsparse.cuda.cache import cached
from nmsparse.cuda.compiler import Cubin
from nmsparse.cuda.pack import PackConfig

CUBIN = Cubin(code=b"\x7fELF\n\x00code\n", entry="kernel", log="Used 32 registers\n0 bytes spill stores")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NMSPARSE_CACHE_DIR", str(tmp_path / "deep" / "cache"))
    return tmp_path / "deep" / "cache"


def never():
    raise AssertionError("compiled again")


def test_the_second_time_nothing_is_built(folder):
    assert cached("gemm", PackConfig(), "sm_90a", lambda: CUBIN) == CUBIN
    assert cached("gemm", PackConfig(), "sm_90a", never) == CUBIN
    assert cached("gemm", PackConfig(), "sm_90a", never).resources()["registers"] == 32
    assert len(list(folder.iterdir())) == 1 and cache.size() > len(CUBIN.code)
    assert cache.folder() == folder and cache.clear() == 1 and cache.size() == 0 and cache.clear() == 0


@pytest.mark.parametrize(
    "other",
    [("pack", PackConfig(), "sm_90a"), ("gemm", PackConfig(aligned=False), "sm_90a"), ("gemm", PackConfig(), "sm_80")],
)
def test_what_differs_is_built(other):
    cached("gemm", PackConfig(), "sm_90a", lambda: CUBIN)
    with pytest.raises(AssertionError, match="compiled again"):
        cached(*other, never)


@pytest.mark.parametrize("part", range(5))
def test_other_tools_or_sources_are_another_entry(monkeypatch, part):
    cached("gemm", PackConfig(), "sm_90a", lambda: CUBIN)
    changed = tuple(text + "x" * (i == part) for i, text in enumerate(cache._toolchain()))
    assert len(changed) == 5
    monkeypatch.setattr(cache, "_toolchain", lambda: changed)
    with pytest.raises(AssertionError, match="compiled again"):
        cached("gemm", PackConfig(), "sm_90a", never)


@pytest.mark.parametrize("where", [0, 5, 30, 90, 150, -1])
@pytest.mark.parametrize("damage", [lambda b, i: b[:i], lambda b, i: b[:i] + bytes([b[i] ^ 1]) + b[i + 1 :] * (i >= 0)])
def test_damage_is_ignored_and_mended(folder, damage, where):
    cached("gemm", PackConfig(), "sm_90a", lambda: CUBIN)
    (path,) = folder.iterdir()
    path.write_bytes(damage(path.read_bytes(), where))
    other = Cubin(b"new", "kernel", "")
    assert cached("gemm", PackConfig(), "sm_90a", lambda: other) == other
    assert cached("gemm", PackConfig(), "sm_90a", never) == other


def test_a_folder_that_cannot_be_written_costs_a_compilation(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("NMSPARSE_CACHE_DIR", str(tmp_path / "file"))
    assert cached("gemm", PackConfig(), "sm_90a", lambda: CUBIN) == CUBIN


def test_a_build_that_fails_leaves_nothing(folder):
    with pytest.raises(AssertionError):
        cached("gemm", PackConfig(), "sm_90a", never)
    assert not folder.exists()


def test_many_at_once(folder):
    def work(i):
        return cached(
            "gemm", PackConfig(threads=i % 3), "sm_90a", lambda: Cubin(bytes([i % 3]) * 100_000, "kernel", "")
        )

    with ThreadPoolExecutor(8) as pool:
        for i, found in enumerate(pool.map(work, range(60))):
            assert found.code == bytes([i % 3]) * 100_000
    assert len(list(folder.iterdir())) == 3, "no half-written files stay"


def test_many_processes_at_once(folder):
    code = (
        "from nmsparse.cuda.cache import cached; from nmsparse.cuda.compiler import Cubin\n"
        "for i in range(50):\n"
        "    assert cached('gemm', i % 5, 'sm_80', lambda: Cubin(bytes([i % 5]) * 10**5, 'k', '')).code[0] == i % 5"
    )
    workers = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [worker.wait() for worker in workers] == [0] * 4
    assert len(list(folder.iterdir())) == 5


def test_the_users_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("NMSPARSE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    for platform, end in (("linux", tmp_path / "nmsparse"), ("win32", tmp_path / "local" / "nmsparse")):
        monkeypatch.setattr(sys, "platform", platform)
        assert cache.folder() == end
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache.folder().parts[-3:] == ("Library", "Caches", "nmsparse")


def test_a_hit_is_quick_and_needs_no_numba():
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from nmsparse.cuda.cache import cached; from nmsparse.cuda.compiler import Cubin\n"
        "from nmsparse.cuda.pack import PackConfig\n"
        "built = []; build = lambda: built.append(1) or Cubin(b'code', 'kernel', '')\n"
        "assert cached('gemm', PackConfig(), 'sm_90a', build).entry == 'kernel' and 'numba' not in sys.modules\n"
        "print(len(built), time.perf_counter() - start)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(4)]
    (first, _), *later = (run.stdout.split() for run in runs)
    assert first == "1"
    assert min(float(seconds) for built, seconds in later if built == "0") < 0.5


@pytest.mark.gpu
def test_gpu_first_call_of_a_new_process():
    """From a warm cache, import included; of what remains, most is the driver's own start."""
    code = (
        "import time, numpy as np, nmsparse\n"
        "from nmsparse.cuda.array import from_host\n"
        "w = from_host(np.ones((256, 256), np.float16)); start = time.perf_counter()\n"
        "nmsparse.array(w, '2:4'); print(time.perf_counter() - start)"
    )
    times = []
    for _ in range(3):
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        times.append(float(run.stdout))
        time.sleep(0.1)
    assert min(times[1:]) < 0.5, times
