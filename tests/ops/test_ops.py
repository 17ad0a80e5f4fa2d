"""Products and packing through the public functions, against the reference."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, PATTERNS, bits, expert_shapes, patterns, shapes, weights

import nmsparse
from nmsparse import NMSparseError, UnsupportedDeviceError, formats, ops, reference
from nmsparse.cuda.array import DeviceArray
from nmsparse.testing import assert_close

every_pattern = pytest.mark.parametrize("pattern", PATTERNS)
tokens = st.integers(0, 40)
seeds = st.integers(0, 999)


def result_of(a, b):
    """Products keep the dtype that both have; different 16-bit floats meet in float32."""
    return a if a == b else np.dtype(np.float32)


def product_of(draw, shape, pattern):
    rng = np.random.default_rng(draw(seeds))
    A = formats.random(draw(shape), pattern, dtype=draw(st.sampled_from(DTYPES)), rng=rng)
    return A, rng, draw(st.sampled_from(DTYPES))


@given(st.data(), patterns(), tokens)
def test_token_major_product(data, pattern, count):
    A, rng, dtype = product_of(data.draw, shapes, pattern)
    x = rng.standard_normal((count, A.shape[1])).astype(dtype)
    y = x @ A.T
    assert y.shape == (count, A.shape[0]) and y.dtype == result_of(dtype, A.dtype)
    assert_close(y, reference.matmul(x, A.T), A.shape[1], scale=16)


@given(st.data(), patterns(), tokens)
def test_column_major_product_is_its_transpose(data, pattern, count):
    A, rng, dtype = product_of(data.draw, shapes, pattern)
    b = rng.standard_normal((A.shape[1], count)).astype(dtype)
    np.testing.assert_array_equal(bits(A @ b), bits(np.ascontiguousarray((b.T @ A.T).T)))
    np.testing.assert_array_equal(bits(nmsparse.matmul(A, np.asfortranarray(b))), bits(A @ b))


@given(st.data(), patterns())
def test_vectors(data, pattern):
    A, rng, dtype = product_of(data.draw, shapes, pattern)
    right, left = rng.standard_normal(A.shape[1]).astype(dtype), rng.standard_normal(A.shape[0]).astype(dtype)
    assert (A @ right).shape == (A.shape[0],) and (left @ A).shape == (A.shape[1],)
    assert_close(A @ right, reference.matmul(A, right), A.shape[1], scale=16)
    assert_close(right @ A.T, reference.matmul(A, right), A.shape[1], scale=16)
    assert_close(left @ A, reference.matmul(left, A), A.shape[0], scale=16)
    assert_close(A.T @ left, reference.matmul(left, A), A.shape[0], scale=16)


@given(st.data(), patterns(), st.integers(0, 9))
def test_batches_of_experts(data, pattern, count):
    A, rng, dtype = product_of(data.draw, expert_shapes, pattern)
    x = rng.standard_normal((A.shape[0], count, A.shape[2])).astype(dtype)
    assert_close(x @ A.T, reference.matmul(x, A.T), A.shape[2], scale=16)
    assert_close(A @ x.transpose(0, 2, 1), reference.matmul(A, x.transpose(0, 2, 1)), A.shape[2], scale=16)
    z = rng.standard_normal((A.shape[0], count, A.shape[1])).astype(dtype)
    assert_close(z @ A, reference.matmul(z, A), A.shape[1], scale=16)


@given(st.data(), patterns())
def test_leading_axes_are_tokens(data, pattern):
    A, rng, _ = product_of(data.draw, shapes, pattern)
    x = rng.standard_normal((2, 3, A.shape[1])).astype(np.float32)
    np.testing.assert_array_equal(x @ A.T, (x.reshape(6, -1) @ A.T).reshape(2, 3, -1))


@given(st.data(), patterns(), st.integers(1, 30), st.sampled_from([np.int32, np.int64]))
def test_grouped_product_is_one_product_per_expert(data, pattern, rows, kind):
    A, rng, dtype = product_of(data.draw, expert_shapes, pattern)
    x = rng.standard_normal((rows, A.shape[2])).astype(dtype)
    ends = np.sort(rng.integers(0, rows + 1, A.shape[0])).astype(kind)
    ends[-1] = rows
    y = nmsparse.grouped_matmul(x, A, ends)
    assert y.dtype == result_of(dtype, A.dtype)
    assert_close(y, reference.grouped_matmul(x, A, ends), A.shape[2], scale=16)


@given(weights(), patterns())
def test_array_is_bitwise_from_dense(w, pattern):
    A, B = nmsparse.array(w, pattern), formats.from_dense(w, pattern)
    assert A.dtype == w.dtype and A.shape == w.shape
    for name, buffer in B.buffers().items():
        got = A.buffers()[name]
        assert got.dtype == buffer.dtype
        np.testing.assert_array_equal(bits(got), bits(buffer), err_msg=name)


@given(weights(special=False), patterns(), seeds)
def test_array_takes_the_options_of_from_dense(w, pattern, seed):
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal(w.shape).astype(rng.choice([np.float16, np.float32, np.float64]))
    mask = formats.random(w.shape, pattern, rng=rng).mask()
    for options in ({"scores": scores}, {"mask": mask}):
        got, want = nmsparse.array(w, pattern, **options), formats.from_dense(w, pattern, **options)
        for name, buffer in want.buffers().items():
            np.testing.assert_array_equal(bits(got.buffers()[name]), bits(buffer), err_msg=name)


@given(st.data(), patterns())
def test_product_is_linear_and_repeatable(data, pattern):
    A, rng, _ = product_of(data.draw, shapes, pattern)
    x = rng.standard_normal((5, A.shape[1])).astype(np.float32)
    np.testing.assert_array_equal(x @ A.T, x @ A.T)
    np.testing.assert_array_equal((4 * x) @ A.T, 4 * (x @ A.T))
    assert_close((x + 1) @ A.T - x @ A.T, reference.matmul(np.ones_like(x), A.T), A.shape[1], scale=32)


@given(st.data(), patterns())
def test_what_is_not_stored_is_not_multiplied(data, pattern):
    A, rng, _ = product_of(data.draw, shapes, pattern)
    for count in (1, 20):
        x = rng.standard_normal((count, A.shape[1])).astype(np.float32)
        column = data.draw(st.integers(0, A.shape[1] - 1))
        x[0, column] = np.nan
        y = x @ A.T
        np.testing.assert_array_equal(np.isnan(y[0]), A.mask()[:, column])
        assert not np.isnan(y[1:]).any()


@every_pattern
def test_out_receives_the_product(pattern):
    A = nmsparse.random((24, 80), pattern, rng=0)
    x = np.ones((3, 80), np.float32)
    out = np.full((3, 24), np.nan, np.float32)
    assert nmsparse.matmul(x, A.T, out=out) is out
    np.testing.assert_array_equal(out, x @ A.T)
    for wrong in (out[:2], out.astype(np.float64), out.tolist()):
        with pytest.raises(NMSparseError, match="expected out as float32"):
            nmsparse.matmul(x, A.T, out=wrong)


@every_pattern
def test_float64_is_multiplied_in_float64(pattern):
    A = nmsparse.array(np.random.default_rng(0).standard_normal((24, 80)), pattern)
    x = np.random.default_rng(1).standard_normal((3, 80))
    assert A.dtype == np.float64
    np.testing.assert_allclose(x @ A.T, reference.matmul(x, A.T), rtol=1e-14, atol=1e-14)
    narrow = A.astype(np.float32)
    np.testing.assert_allclose(x @ narrow.T, reference.matmul(x, narrow.T), rtol=1e-13, atol=1e-13)


def test_inf_and_overflow_follow_ieee():
    A = nmsparse.array(np.array([[3e38, 0, 0, 3e38], [np.inf, 0, 0, 1]], np.float32), "2:4")
    np.testing.assert_array_equal(A @ np.array([1, 0, 0, 1], np.float32), [np.inf, np.inf])
    np.testing.assert_array_equal(np.isnan(A @ np.array([0, 0, 0, 1], np.float32)), [False, True])


def test_operands_that_do_not_fit_are_explained():
    A, E = nmsparse.random((8, 16), "2:4", rng=0), nmsparse.random((2, 8, 16), "2:4", rng=0)
    x = np.ones((3, 16), np.float32)
    cases = [
        (lambda: A @ np.ones(15, np.float32), r"dimension mismatch, \(8, 16\) @ \(15,\)"),
        (lambda: x[:, :4] @ A.T, r"dimension mismatch, \(3, 4\) @ \(16, 8\)"),
        (lambda: A @ np.ones((16, 2), int), "expected activations in float16"),
        (lambda: A @ A, "one sparse and one dense"),
        (lambda: nmsparse.matmul(x, x), "one sparse and one dense"),
        (lambda: A @ np.float32(3), "right operand"),
        (lambda: np.float32(3) @ A.T, "dimension mismatch"),
        (lambda: E @ np.ones((3, 16, 2), np.float32), "expert axis"),
        (lambda: x @ E.T, "expert axis"),
        (lambda: nmsparse.grouped_matmul(x, A, np.array([3])), "sparse array"),
        (lambda: nmsparse.grouped_matmul(x[:, :4], E, np.array([1, 3])), "expected x"),
        (lambda: nmsparse.grouped_matmul(x, E, np.array([1, 2])), "the last one 3"),
        (lambda: nmsparse.grouped_matmul(x, E, np.array([4, 3])), "non-decreasing"),
        (lambda: nmsparse.grouped_matmul(x, E, np.array([-1, 3])), "non-decreasing"),
        (lambda: nmsparse.grouped_matmul(x, E, np.array([3])), "int32 or int64"),
        (lambda: nmsparse.grouped_matmul(x, E, np.array([1.0, 3.0])), "int32 or int64"),
    ]
    for call, message in cases:
        with pytest.raises(NMSparseError, match=message):
            call()


def test_other_libraries_enter_through_dlpack():
    class OnCpu:
        def __init__(self, a):
            self.a = a

        def __dlpack_device__(self):
            return self.a.__dlpack_device__()

        def __dlpack__(self, **options):
            return self.a.__dlpack__(**options)

    class OnGpu(OnCpu):
        def __dlpack_device__(self):
            return (2, 0)

    A = nmsparse.random((8, 16), "2:4", rng=0)
    x = np.ones((3, 16), np.float32)
    np.testing.assert_array_equal(nmsparse.matmul(OnCpu(x), A.T), x @ A.T)
    with pytest.raises(UnsupportedDeviceError, match=r"OnGpu is on cuda:0 and .* on the host"):
        nmsparse.matmul(OnGpu(x), A.T)


def test_every_buffer_goes_through_dlpack():
    A = nmsparse.random((32, 64), "samoyeds:1:2:16", rng=0)
    for buffer in A.buffers().values():
        assert np.shares_memory(np.from_dlpack(buffer), buffer)


def test_bfloat16_results_are_rounded_once():
    A = nmsparse.array(np.full((1, 4), 1 / 3, ml_dtypes.bfloat16), "4:4")
    third = float(ml_dtypes.bfloat16(1 / 3))
    assert float((A @ np.ones(4, ml_dtypes.bfloat16))[0]) == float(ml_dtypes.bfloat16(4 * third))


class OnGpu:
    """What ``matmul`` needs to see of an operand on a GPU; ``moves`` says what was done to it on the way."""

    def __init__(self, shape, moves=(), device=0):
        self.shape, self.moves, self.device = shape, moves, device

    def get_device(self):
        return self.device

    @property
    def T(self):
        return OnGpu(self.shape[::-1], (*self.moves, "T"), self.device)


@pytest.fixture
def gpu(monkeypatch):
    """The GPU's product, replaced by one that notes its arguments; and a sparse array that is on "cuda:0"."""
    calls = []

    def matmul(x, A, *, out=None, config=None):
        calls.append((x, A, out, config))
        return OnGpu((*x.shape[:-1], A.shape[0]), (*x.moves, "matmul"))

    monkeypatch.setattr(ops, "_gpu_matmul", lambda: matmul)

    def place(shape):
        A = nmsparse.random(shape, "2:4", dtype=np.float16, rng=0)
        buffers = {name: DeviceArray(0, buffer.shape, buffer.dtype, 0) for name, buffer in A.buffers().items()}
        return formats.NMArray(A.pattern, A.shape, buffers)

    return place, calls


def test_products_on_a_gpu_go_to_its_kernels(gpu):
    place, calls = gpu
    A, x, y = place((8, 16)), OnGpu((3, 16)), OnGpu((3, 8))
    assert nmsparse.matmul(x, A.T, out=y, config="plan").moves == ("matmul",)
    assert calls.pop() == (x, A, y, "plan")
    assert nmsparse.matmul(A, x.T).moves == ("T", "T", "matmul", "T")
    assert nmsparse.matmul(A, OnGpu((16,))).moves == ("matmul",)
    assert nmsparse.matmul(OnGpu((2, 3, 16)), A.T).shape == (2, 3, 8)


def test_torch_reaches_the_product_without_a_detour(gpu, monkeypatch):
    torch = pytest.importorskip("torch")
    place, calls = gpu
    A, x = place((8, 16)), torch.ones(3, 16, dtype=torch.float16)
    monkeypatch.setattr(ops, "_gpu_of", lambda a: 0)
    monkeypatch.setattr(ops, "_gpu_matmul", lambda: lambda *operands, **options: calls.append((operands, options)))
    for product in (lambda: x @ A.T, lambda: torch.matmul(x, A.T), lambda: nmsparse.matmul(x, A.T)):
        product()
        assert calls.pop() == ((x, A), {"out": None, "config": None})
    with pytest.raises(TypeError):
        torch.add(x, A)


def test_torch_on_the_host_gives_numpy():
    torch = pytest.importorskip("torch")
    A, x = nmsparse.random((8, 16), "2:4", rng=0), np.ones((3, 16), np.float32)
    for y in (torch.from_numpy(x) @ A.T, torch.matmul(torch.from_numpy(x), A.T), (A @ torch.from_numpy(x.T)).T):
        np.testing.assert_array_equal(y, x @ A.T)


def test_what_has_no_gpu_kernel_is_explained(gpu):
    place, calls = gpu
    A, E = place((8, 16)), place((2, 8, 16))
    cases = [
        (lambda: nmsparse.matmul(OnGpu((3, 8)), A), r"torch\.from_dlpack\(A\.todense\(\)\)"),
        (lambda: nmsparse.matmul(A.T, OnGpu((8, 3))), r"torch\.from_dlpack\(A\.todense\(\)\)"),
        (lambda: nmsparse.matmul(OnGpu((2, 3, 16)), E.T), "batches of experts"),
        (lambda: nmsparse.matmul(A, OnGpu((2, 16, 3))), "2-D right operand"),
    ]
    for call, message in cases:
        with pytest.raises((UnsupportedDeviceError, NMSparseError), match=message):
            call()
    assert not calls


def test_operands_in_two_places_are_refused(gpu):
    place, calls = gpu
    A, B = place((8, 16)), nmsparse.random((8, 16), "2:4", rng=0)
    on_host, elsewhere = np.ones((3, 16), np.float16), OnGpu((3, 16), device=1)
    cases = [
        (lambda: on_host @ A.T, r"float16\[3, 16\] is on the host and .* on cuda:0"),
        (lambda: A @ on_host.T, "is on cuda:0 and .* on the host"),
        (lambda: nmsparse.matmul(OnGpu((3, 16)), B.T), "OnGpu is on cuda:0 and .* on the host"),
        (lambda: nmsparse.matmul(elsewhere, A.T), "OnGpu is on cuda:1 and .* on cuda:0"),
        (lambda: nmsparse.grouped_matmul(on_host, place((2, 8, 16)), np.array([1, 3])), "on the host and .* on cuda:0"),
    ]
    for call, message in cases:
        with pytest.raises(UnsupportedDeviceError, match=message + r".*to_device\('cuda:N'\)"):
            call()
    with pytest.raises(NMSparseError, match="config chooses a kernel of a GPU"):
        nmsparse.matmul(on_host, B.T, config="plan")
    assert not calls
