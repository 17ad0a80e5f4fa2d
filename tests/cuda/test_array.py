"""Arrays in GPU memory: copies, views, DLPack in both directions; on a stand-in for the device, and on a GPU."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import types
import weakref
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import PATTERNS, bits

import nmsparse
from nmsparse import NMSparseError, UnsupportedDeviceError
from nmsparse.cuda import array, dlpack
from nmsparse.cuda.array import DeviceArray, current_stream, empty, empty_like_kind, from_host, view

DTYPES = [np.dtype(t) for t in ("f2", "f4", "f8", "u1", "i1", "u2", "i4", "i8", "?", ml_dtypes.bfloat16)]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_pattern = pytest.mark.parametrize("pattern", PATTERNS)


def numbers(shape, dtype):
    return np.random.default_rng(0).integers(0, 99, shape).astype(dtype)


# --- memory ----------------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (0, 4)])
def test_round_trip_through_the_device(host_device, dtype, shape):
    w = numbers(shape, dtype)
    a = from_host(w, 3)
    assert (a.shape, a.dtype, a.device, a.size, a.nbytes) == (w.shape, w.dtype, 3, w.size, w.nbytes)
    for b in (a.numpy(), a.copy().numpy(), pickle.loads(pickle.dumps(a)).numpy(), copy.deepcopy(a).numpy()):
        assert b.shape == w.shape and b.dtype == w.dtype
        np.testing.assert_array_equal(b, w)


def test_memory_lives_as_long_as_its_views(host_device):
    a = from_host(numbers((3, 4, 5), np.float16))
    row = a[1][2]
    del a
    gc.collect()
    assert len(host_device.allocations) == 1
    np.testing.assert_array_equal(row.numpy(), numbers((3, 4, 5), np.float16)[1, 2])
    del row
    gc.collect()
    assert not host_device.allocations


@given(st.data())
def test_index_transpose_reshape_are_numpys(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    w = numbers(shape, np.float32)
    a = DeviceArray(w.ctypes.data, shape, w.dtype, 0)
    index = data.draw(st.integers(-shape[0], shape[0] - 1))
    views = (a[index], w[index, ...]), (a.T, w.T), (a.reshape(w.size), w.reshape(w.size)), (a.T[0], w.T[0, ...])
    for got, want in views:
        assert got.shape == want.shape and got.contiguous == want.flags.c_contiguous
        assert got.pointer == want.ctypes.data
        assert all(n == 1 or 4 * x == y for n, x, y in zip(want.shape, got.strides, want.strides, strict=True))


def test_strided_arrays_come_to_the_host(host_device):
    w = numbers((3, 4, 5), np.int32)
    np.testing.assert_array_equal(from_host(w).T.numpy(), w.T)
    np.testing.assert_array_equal(from_host(w).T[1].numpy(), w.T[1])


def test_what_it_cannot_do_is_explained(host_device):
    a = from_host(numbers((3, 4), np.float16))
    with pytest.raises(TypeError, match="call its numpy"):
        np.asarray(a)
    with pytest.raises(NMSparseError, match="one integer index"):
        a[1:2]
    with pytest.raises(IndexError):
        a[3]
    with pytest.raises(NMSparseError, match="in C order"):
        a.T.copy()
    with pytest.raises(NMSparseError, match="reshape"):
        a.reshape(5, 5)
    assert repr(a) == "DeviceArray(float16[3, 4], device='cuda:0')"


# --- interfaces ------------------------------------------------------------------------------------------------------


@pytest.fixture
def as_host(monkeypatch):
    """Exports say that the memory is the host's, which here it is, so that NumPy and torch can take it."""
    monkeypatch.setattr(DeviceArray, "__dlpack_device__", lambda self: (1, 0))


@every_dtype
def test_numpy_and_torch_take_the_capsule(host_device, as_host, dtype):
    torch = pytest.importorskip("torch")
    w = numbers((3, 4), dtype)
    a = from_host(w)
    t = torch.from_dlpack(a)
    assert t.data_ptr() == a.pointer and str(t.dtype) == f"torch.{dtype.name}"
    np.testing.assert_array_equal(t.to(torch.float64).numpy(), w.astype(np.float64))
    if dtype != ml_dtypes.bfloat16:
        b = np.from_dlpack(from_host(w))
        np.testing.assert_array_equal(b, w)


def test_strides_survive_dlpack(host_device, as_host):
    w = numbers((3, 4, 5), np.float32)
    np.testing.assert_array_equal(np.from_dlpack(from_host(w).T), w.T)


def test_a_consumer_keeps_the_memory(host_device, as_host):
    b = np.from_dlpack(from_host(numbers((3, 4), np.float32)))
    gc.collect()
    assert len(host_device.allocations) == 1 and dlpack._held
    np.testing.assert_array_equal(b, numbers((3, 4), np.float32))
    del b
    gc.collect()
    assert not host_device.allocations and not dlpack._held


def test_a_capsule_that_nobody_takes_frees_itself(host_device):
    capsule = from_host(numbers((3, 4), np.float32)).__dlpack__()
    gc.collect()
    assert len(host_device.allocations) == 1
    del capsule
    gc.collect()
    assert not host_device.allocations and not dlpack._held


def test_the_streams_of_dlpack_wait_for_the_legacy_stream(host_device):
    a = from_host(numbers(3, np.float32))
    for stream in (None, -1, 1, 2, 12345):
        a.__dlpack__(stream=stream)
    assert host_device.waits == [2, 12345]


def test_dlpack_never_copies(host_device):
    a = from_host(numbers(3, np.float32))
    for wrong in ({"copy": True}, {"dl_device": (1, 0)}):
        with pytest.raises(BufferError, match="without a copy"):
            a.__dlpack__(**wrong)
    with pytest.raises(BufferError, match="type code"):
        from_host(numbers(3, np.complex64)).__dlpack__()


class Foreign:
    """An array of a library that speaks one protocol only."""

    def __init__(self, a):
        self.a = a


class ByDlpack(Foreign):
    def __dlpack_device__(self):
        return self.a.__dlpack_device__()

    def __dlpack__(self, *, stream=None):
        return self.a.__dlpack__(stream=stream)


class ByInterface(Foreign):
    @property
    def __cuda_array_interface__(self):
        return self.a.__cuda_array_interface__


@every_dtype
@pytest.mark.parametrize("foreign", [ByDlpack, ByInterface])
@pytest.mark.parametrize("transpose", [False, True])
def test_views_of_others(host_device, dtype, foreign, transpose):
    if foreign is ByInterface and dtype == ml_dtypes.bfloat16:
        pytest.skip("has no type string")
    a = from_host(numbers((3, 4), dtype))
    a = a.T if transpose else a
    b = view(foreign(a))
    assert (b.pointer, b.shape, b.strides, b.dtype, b.device) == (a.pointer, a.shape, a.strides, a.dtype, a.device)
    del a
    gc.collect()
    assert len(host_device.allocations) == 1
    del b
    gc.collect()
    assert not host_device.allocations


def test_bfloat16_has_no_cuda_array_interface(host_device):
    assert not hasattr(from_host(numbers(3, ml_dtypes.bfloat16)), "__cuda_array_interface__")
    assert from_host(numbers((3, 4), np.float16)).__cuda_array_interface__["strides"] is None


def test_a_view_of_itself(host_device):
    a = empty((3,), np.float32)
    assert view(a) is a and current_stream(a) == 0
    b = empty_like_kind(a, (2, 2), np.dtype(np.float16))
    assert isinstance(b, DeviceArray) and b.shape == (2, 2) and b.dtype == np.float16


def test_arrays_on_the_host_are_refused():
    torch = pytest.importorskip("torch")
    for x in (np.ones(3), [1.0], torch.ones(3), torch.nn.Parameter(torch.ones(3))):
        with pytest.raises(UnsupportedDeviceError, match="expected an array on an NVIDIA GPU, got"):
            view(x)
    with pytest.raises(NMSparseError, match="not consumed"):
        dlpack.inspect(object())


def test_torch_is_recognised_without_an_import():
    code = "import sys; from nmsparse.cuda import array; array.kind_of(object()); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    torch = pytest.importorskip("torch")
    kind = array.kind_of(torch.nn.Parameter(torch.ones(3)))
    assert kind is not array.kind_of(np.ones(3))
    y = kind.empty(torch.ones(3), (2, 5), np.dtype(ml_dtypes.bfloat16))
    assert y.dtype == torch.bfloat16 and y.shape == (2, 5)


def test_cupy_is_recognised(monkeypatch):
    class Device:
        id = 2

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    class ndarray:
        data, shape, strides = types.SimpleNamespace(ptr=4096), (3, 4), (8, 2)
        dtype, device = np.dtype(np.float16), Device()

    ndarray.__module__ = "cupy"
    stream = types.SimpleNamespace(ptr=77)
    cuda = types.SimpleNamespace(get_current_stream=lambda: stream)
    cupy = types.SimpleNamespace(cuda=cuda, empty=lambda shape, dtype: ("empty", shape, dtype))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    x = ndarray()
    a = view(x)
    assert (a.pointer, a.shape, a.strides, a.dtype, a.device, a.owner) == (4096, (3, 4), (4, 1), x.dtype, 2, x)
    assert current_stream(x) == 77 and empty_like_kind(x, (5,), x.dtype) == ("empty", (5,), x.dtype)


# --- sparse arrays on the device -------------------------------------------------------------------------------------


@every_pattern
@pytest.mark.parametrize("shape", [(24, 80), (3, 24, 80)])
def test_sparse_arrays_move_and_come_back(host_device, pattern, shape):
    A = nmsparse.random(shape, pattern, dtype=np.float16, rng=0)
    B = A.to_device("cuda:0")
    assert A.device == "cpu" and B.device == "cuda:0" and B.T.device == "cuda:0"
    assert repr(B) == repr(A).replace("'cpu'", "'cuda:0'")
    assert (B.shape, B.dtype, B.nnz, B.nbytes, B.density) == (A.shape, A.dtype, A.nnz, A.nbytes, A.density)
    assert B.to_device("cuda") is B and B.to_device("cuda:0") is B and A.to_device("cuda").device == "cuda:0"
    B.check_format(full=True)
    for C in (B.to_device("cpu"), B.copy().to_device("cpu"), pickle.loads(pickle.dumps(B)).to_device("cpu")):
        for name, buffer in A.buffers().items():
            np.testing.assert_array_equal(bits(C.buffers()[name]), bits(buffer))
    np.testing.assert_array_equal(bits(B.todense().numpy()), bits(A.todense()))
    assert B.copy().values.pointer != B.values.pointer and B.copy().meta.pointer != B.meta.pointer


@every_pattern
def test_an_expert_is_a_view(host_device, pattern):
    A = nmsparse.random((3, 24, 80), pattern, dtype=np.float16, rng=0)
    B = A.to_device("cuda")
    held = len(host_device.allocations)
    for e in (0, 2, -1):
        assert B[e].device == "cuda:0"
        np.testing.assert_array_equal(B[e].values.numpy(), A[e].values)
    assert len(host_device.allocations) == held


@every_pattern
def test_what_runs_on_the_host_only_says_so(host_device, pattern):
    A = nmsparse.random((24, 80), pattern, dtype=np.float16, rng=0).to_device("cuda")
    calls = [A.mask, lambda: A.astype(np.float32), lambda: -A, lambda: 2 * A, A.T.todense, lambda: nmsparse.stack([A])]
    for call in calls:
        with pytest.raises(UnsupportedDeviceError, match=r"to_device\('cpu'\)"):
            call()
    with pytest.raises(TypeError, match="todense"):
        np.asarray(A)


@every_pattern
def test_buffers_on_a_gpu_are_adopted(host_device, pattern):
    A = nmsparse.random((24, 80), pattern, rng=0)
    B = A.to_device("cuda")
    C = nmsparse.formats.from_buffers(pattern, {n: ByDlpack(b) for n, b in B.buffers().items()}, A.shape)
    assert all(C.buffers()[name].pointer == buffer.pointer for name, buffer in B.buffers().items())
    with pytest.raises(NMSparseError, match="one device"):
        nmsparse.formats.from_buffers(pattern, {**B.buffers(), "meta": A.meta}, A.shape)
    turned = from_host(np.ascontiguousarray(A.values.T)).T
    with pytest.raises(NMSparseError, match="in C order"):
        nmsparse.formats.from_buffers(pattern, {**B.buffers(), "values": turned}, A.shape)
    broken = from_host(np.full_like(A.meta, 255))
    with pytest.raises(NMSparseError, match="corrupt"):
        nmsparse.formats.from_buffers(pattern, {**B.buffers(), "meta": broken}, A.shape)


def test_a_dense_weight_on_a_gpu_is_not_packed_by_from_dense(host_device):
    with pytest.raises(UnsupportedDeviceError, match=r"nmsparse\.array"):
        nmsparse.NMArray.from_dense(from_host(np.ones((4, 16), np.float32)))


def test_without_a_driver_the_message_says_so():
    with pytest.raises(UnsupportedDeviceError, match=r"NVIDIA driver|device 99"):
        nmsparse.random((4, 16), "2:4").to_device("cuda:99")


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@every_dtype
def test_gpu_round_trip(dtype):
    w = numbers((3, 4, 5), dtype)
    a = from_host(w)
    for b in (a, a.copy(), a[1].copy()):
        np.testing.assert_array_equal(b.numpy(), w if b.ndim == 3 else w[1])
    np.testing.assert_array_equal(a.T.numpy(), w.T)


@pytest.mark.gpu
def test_gpu_memory_is_given_back(torch):
    before, _ = torch.cuda.mem_get_info()
    for _ in range(8):
        a = empty((1 << 28,), np.uint8)
        alive = weakref.ref(a)
        del a
        gc.collect()
        assert alive() is None
    assert torch.cuda.mem_get_info()[0] >= before - (1 << 28)


@pytest.mark.gpu
@every_dtype
def test_gpu_torch_shares_memory_both_ways(torch, dtype):
    w = numbers((3, 4), dtype)
    a = from_host(w)
    t = torch.from_dlpack(a)
    assert t.is_cuda and t.data_ptr() == a.pointer
    np.testing.assert_array_equal(t.cpu().to(torch.float64).numpy(), w.astype(np.float64))
    b = view(t)
    assert (b.pointer, b.shape, b.dtype, b.device) == (a.pointer, a.shape, a.dtype, 0) and b.contiguous
    via = view(ByDlpack(t))
    assert (via.pointer, via.shape, via.dtype) == (a.pointer, a.shape, a.dtype)
    np.testing.assert_array_equal(via.numpy(), w)
    del a, b, via
    gc.collect()
    t.zero_()  # the memory is still there
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_gpu_current_stream_and_outputs(torch):
    x = torch.ones(3, device="cuda")
    assert current_stream(x) == 0
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        assert current_stream(x) == stream.cuda_stream
    y = empty_like_kind(x, (2, 5), np.dtype(ml_dtypes.bfloat16))
    assert y.is_cuda and y.dtype == torch.bfloat16 and y.shape == (2, 5)


@pytest.mark.gpu
def test_gpu_dlpack_waits_for_the_legacy_stream(torch):
    stream = torch.cuda.Stream()
    t = torch.zeros(1 << 26, device="cuda")
    torch.cuda._sleep(50_000_000)
    t += 1  # on the legacy stream, after the sleep
    a = view(t)
    with torch.cuda.stream(stream):
        assert torch.from_dlpack(a).sum().item() == 1 << 26


@pytest.mark.gpu
def test_gpu_interface_is_readable(torch):
    w = numbers((3, 4), np.float32)
    t = torch.as_tensor(from_host(w), device="cuda")
    np.testing.assert_array_equal(t.cpu().numpy(), w)


@pytest.mark.gpu
def test_gpu_threads_without_a_context():
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda i: from_host(np.full(1000, i)).numpy(), range(16)):
            assert (result == result[0]).all()


@pytest.mark.gpu
def test_gpu_exit_with_arrays_alive(torch):
    code = (
        "import numpy as np, torch; from nmsparse.cuda.array import from_host; "
        "a = from_host(np.ones(5, np.float32)); t = torch.from_dlpack(from_host(np.ones(5, np.float32))); print('end')"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "end\n" and not out.stderr


@pytest.mark.gpu
@every_pattern
def test_gpu_sparse_arrays_move_and_come_back(pattern):
    A = nmsparse.random((3, 24, 80), pattern, dtype=np.float16, rng=0)
    B = A.to_device("cuda")
    np.testing.assert_array_equal(bits(B.todense().numpy()), bits(A.todense()))
    np.testing.assert_array_equal(bits(B[1].todense().numpy()), bits(A[1].todense()))
    C = nmsparse.formats.from_buffers(pattern, B.buffers(), A.shape)
    assert C.values is B.values
