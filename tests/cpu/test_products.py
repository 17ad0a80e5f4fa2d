"""Products of sparse weights on the CPU: against float64 on the decoded weights, for every kernel and its edges."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, PATTERNS, bits, patterns

from nmsparse import formats
from nmsparse.cpu import threads
from nmsparse.cpu.matmul import grouped_matmul, matmul
from nmsparse.errors import NMSparseError

# Around the sizes where the kernels change: 1 | 2-16 | 17-32 | 33-64 | 65-96, two tiles | 97-128 | more tiles.
TOKENS = [0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 32, 33, 64, 65, 97, 128, 130]
# All products have a tail: rows, columns, half a block of columns, a run that ends inside one.
SHAPES = [(1, 1), (7, 20), (65, 130), (130, 272), (48, 1000)]


def exact(x: np.ndarray, a: formats.SparseArray) -> tuple[np.ndarray, np.ndarray]:
    """``x @ a.T`` in float64, and the sum of the magnitudes of its terms."""
    w, x = a.todense().astype(np.float64), x.astype(np.float64)
    return x @ w.T, np.abs(x) @ np.abs(w).T


def assert_exact(y: np.ndarray, want: np.ndarray, size: np.ndarray, k: int) -> None:
    """Within what float32 sums of k terms can lose at most (Higham, §3.1)."""
    assert y.dtype == np.float32 and y.shape == want.shape
    np.testing.assert_array_less(np.abs(y - want), (k + 4) * 2.0**-24 * size + 1e-30)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_matmul(pattern, dtype):
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        a = formats.random(shape, pattern, dtype=dtype, rng=rng)
        for tokens in TOKENS:
            x = rng.standard_normal((tokens, shape[1]), np.float32)
            assert_exact(matmul(a, x), *exact(x, a), shape[1])


@pytest.mark.parametrize("pattern", ["2:4", "3:7", "vnm:64:2:8", "samoyeds:1:2:128", "samoyeds:2:4:32"])
def test_a_weight_larger_than_the_tiles_and_chunks(pattern):
    rng = np.random.default_rng(0)
    a = formats.random((1100, 2100), pattern, rng=rng)
    for tokens in (1, 16, 200):
        x = rng.standard_normal((tokens, 2100), np.float32)
        assert_exact(matmul(a, x), *exact(x, a), 2100)


@pytest.mark.parametrize(
    "pattern", ["1:2", "1:3", "1:4", "4:5", "4:8", "5:7", "8:16", "7:32", "16:32", "17:20", "1:33"]
)
def test_groups_that_fill_a_block_and_groups_that_do_not(pattern):
    rng = np.random.default_rng(0)
    for cols in (31, 32, 33, 96, 250):
        a = formats.random((70, cols), pattern, rng=rng)
        for tokens in (1, 3, 16, 20):
            x = rng.standard_normal((tokens, cols), np.float32)
            assert_exact(matmul(a, x), *exact(x, a), cols)


@given(patterns(), st.data())
def test_grouped_matmul(pattern, data):
    counts = data.draw(st.lists(st.sampled_from([0, 0, 1, 2, 5, 17, 40]), min_size=1, max_size=5), "tokens of experts")
    rows, cols = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 90))
    dtype, ids_dtype = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from([np.int32, np.int64]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    a = formats.random((len(counts), rows, cols), pattern, dtype=dtype, rng=rng)
    slots, offsets = sum(counts), np.cumsum(counts).astype(ids_dtype)
    ids = rng.integers(0, 9, slots).astype(ids_dtype) if data.draw(st.booleans(), "gathered") else None
    x = rng.standard_normal((slots if ids is None else 9, cols), np.float32)
    y = grouped_matmul(a, x, offsets, ids)
    assert y.shape == (slots, rows)
    read = x if ids is None else x[ids]
    for e, count in enumerate(counts):
        mine = slice(offsets[e] - count, offsets[e])
        assert_exact(y[mine], *exact(read[mine], a[e]), cols)


@given(patterns(), st.integers(0, 2**32), st.sampled_from([1, 3, 20, 40]), st.sampled_from([np.nan, np.inf]))
def test_what_is_not_finite_reaches_what_it_meets_and_nothing_else(pattern, seed, tokens, value):
    rng = np.random.default_rng(seed)
    rows, cols = rng.integers(1, 40), rng.integers(1, 80)
    a = formats.random((rows, cols), pattern, rng=rng)
    a.values[a.values == 0] = 1  # 0 · inf would be a NaN of its own; what is stored in the padding meets zeros only
    a = formats.from_dense(np.where(a.mask(), a.todense(), 0), pattern, scores=a.mask().astype(np.float32))
    x = rng.standard_normal((tokens, cols), np.float32)
    token, column = rng.integers(tokens), rng.integers(cols)
    x[token, column] = value
    met = np.zeros((tokens, rows), bool)
    met[token] = a.mask()[:, column]
    np.testing.assert_array_equal(~np.isfinite(matmul(a, x)), met)

    w = a.todense()
    row = rng.integers(rows)
    w[row, np.flatnonzero(a.mask()[row])[:1]] = value
    b = formats.from_dense(w, pattern, scores=a.mask().astype(np.float32))
    x[token, column] = 1
    y = matmul(b, x)
    np.testing.assert_array_equal(np.isfinite(y).all(axis=0), np.isfinite(w).all(axis=1))


@pytest.mark.parametrize("tokens", [1, 7, 30, 200])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "vnm:64:2:8", "samoyeds:1:2:128"])
def test_the_bits_do_not_depend_on_the_threads(pattern, tokens, monkeypatch):
    rng = np.random.default_rng(0)
    a, x = formats.random((500, 512), pattern, rng=rng), rng.standard_normal((tokens, 512), np.float32)
    together = [matmul(a, x) for _ in range(3)]
    monkeypatch.setattr(threads, "_WORTH_SHARING", 10**12)
    for y in together:
        np.testing.assert_array_equal(bits(y), bits(matmul(a, x)))


def test_a_tile_does_not_see_the_other_tokens():
    rng = np.random.default_rng(0)
    a, x = formats.random((96, 256), "2:4", rng=rng), rng.standard_normal((64, 256), np.float32)
    y = matmul(a, x)
    x[::2] = np.nan
    np.testing.assert_array_equal(matmul(a, x)[1::2], y[1::2])


def test_python_threads_may_call_at_once():
    rng = np.random.default_rng(0)
    a, x = formats.random((600, 512), "samoyeds:1:2:128", rng=rng), rng.standard_normal((20, 512), np.float32)
    want, wrong = matmul(a, x), []

    def call():
        for _ in range(30):
            if not np.array_equal(matmul(a, x), want):
                wrong.append(True)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_can_multiply():
    code = """
import os, numpy as np
from nmsparse import formats
from nmsparse.cpu.matmul import matmul
a, x = formats.random((600, 1024), "2:4", rng=0), np.ones((8, 1024), np.float32)
want = matmul(a, x)
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(matmul(a, x), want) else 1)
_, status = os.waitpid(child, 0)
assert status == 0 and np.array_equal(matmul(a, x), want)
"""
    subprocess.run([sys.executable, "-W", "ignore::DeprecationWarning", "-c", code], check=True, timeout=120)


@pytest.mark.slow
def test_a_machine_without_avx512(tmp_path):
    """The other body of ``pick``, and vectors that LLVM cuts into narrow ones: the plainest CPU there is."""
    code = """
import numpy as np
from nmsparse import formats
from nmsparse.cpu import pick
from nmsparse.cpu.matmul import matmul
assert pick.CANDIDATES == 3
rng = np.random.default_rng(0)
for pattern in ("2:4", "vnm:16:2:8", "samoyeds:1:2:32", "1:4"):
    a = formats.random((70, 208), pattern, rng=rng)
    for tokens in (1, 5, 40, 100):
        x = rng.standard_normal((tokens, 208), np.float32)
        np.testing.assert_allclose(matmul(a, x), x @ a.todense().T, rtol=1e-4, atol=1e-4)
"""
    settings = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600, env={**os.environ, **settings})


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16], ids=["fp32", "bf16", "fp16"])
def test_dense_experts_take_the_same_calls(dtype):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((3, 24, 40), np.float32).astype(dtype)
    x, ids, offsets = rng.standard_normal((5, 40), np.float32), np.array([4, 0, 0, 2]), np.array([1, 1, 4])
    dense = w.astype(np.float32)
    want = np.stack([dense[0] @ x[4], dense[2] @ x[0], dense[2] @ x[0], dense[2] @ x[2]])
    np.testing.assert_allclose(grouped_matmul(w, x, offsets, ids), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grouped_matmul(w, x[ids], offsets), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(matmul(w[0], x), x @ dense[0].T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "offsets", "ids"),
    [
        ((4, 63), [2, 4], None),  # K
        ((4, 64), [2, 3], None),  # a last end that is not S
        ((4, 64), [3, 2], None),  # ends that decrease
        ((4, 64), [4], None),  # an end for each expert
        ((4, 64), [-1, 4], None),
        ((4, 64), [1, 2], [0, 4]),  # a token that does not exist
        ((4, 64), [1, 2], [0, -1]),
    ],
)
def test_operands_that_do_not_fit_are_refused(shape, offsets, ids):
    a = formats.random((2, 8, 64), "2:4", rng=0)
    with pytest.raises(NMSparseError, match="expected"):
        grouped_matmul(a, np.ones(shape, np.float32), np.array(offsets), None if ids is None else np.array(ids))


def test_values_of_another_dtype_are_refused():
    with pytest.raises(NMSparseError, match="values: the compiled kernels take float32"):
        matmul(formats.random((8, 64), "2:4", dtype=np.float64, rng=0), np.ones((1, 64), np.float32))


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages by mmap and mprotect")
def test_nothing_is_read_beyond_the_buffers():
    """Every buffer ends where a page begins that cannot be read."""
    code = """
import ctypes, mmap
import numpy as np
from nmsparse import formats
from nmsparse.cpu.matmul import matmul
from nmsparse.cpu.pack import pack

libc, page, held = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE, []

def at_the_brink(array):
    size = -(-array.nbytes // page) * page
    held.append(mmap.mmap(-1, size + page))
    start = ctypes.addressof(ctypes.c_char.from_buffer(held[-1]))
    assert libc.mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(page), 0) == 0
    last = np.frombuffer(held[-1], np.uint8, array.nbytes, size - array.nbytes).view(array.dtype).reshape(array.shape)
    last[...] = array
    return last

rng = np.random.default_rng(0)
for pattern in ("2:4", "3:7", "vnm:4:2:8", "samoyeds:1:2:32", "samoyeds:2:3:12"):
    for shape in ((5, 33), (12, 80), (6, 200)):
        for dtype in (np.float32, np.float16):
            a = formats.random(shape, pattern, dtype=dtype, rng=rng)
            w = at_the_brink(a.todense())
            assert pack(w, pattern, at_the_brink(a.mask().astype(np.float32))).keys() == a.buffers().keys()
            want = {tokens: rng.standard_normal((tokens, shape[1]), np.float32) for tokens in (1, 3, 20, 40, 100)}
            for name, buffer in a.buffers().items():
                setattr(a, name, at_the_brink(buffer))
            for tokens, x in want.items():
                np.testing.assert_allclose(matmul(a, at_the_brink(x)), x @ a.todense().T.astype(np.float32), atol=1e-4)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
