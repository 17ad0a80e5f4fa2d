"""Memory shared between torch and nmsparse: the same bytes on both sides, and results of the caller's kind."""

from __future__ import annotations

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from strategies import DTYPES, PATTERNS, bits, patterns, weights

import nmsparse
from nmsparse import NMSparseError, formats
from nmsparse.formats import SparseArray
from nmsparse.moe import MoELayer, Router, SparseExperts, route
from nmsparse.torch import as_array, as_tensor

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@given(weights(), patterns())
def test_every_buffer_is_shared(w, pattern):
    A = formats.from_dense(w, pattern)
    tensors = A.to_torch()
    assert tensors.keys() == A.buffers().keys()
    for name, buffer in A.buffers().items():
        tensor = tensors[name]
        assert tensor.data_ptr() == buffer.ctypes.data or not buffer.size
        assert tuple(tensor.shape) == buffer.shape and str(tensor.dtype) == f"torch.{buffer.dtype.name}"
    B = SparseArray.from_torch(tensors, pattern, A.shape)
    for name, buffer in B.buffers().items():
        assert buffer.dtype == getattr(A, name).dtype
        assert np.array_equal(bits(buffer), bits(getattr(A, name)))
    if A.nnz:
        tensors["values"].view(torch.uint8).flatten()[0] ^= 1
        assert np.array_equal(bits(A.values), bits(B.values))


def test_positions_from_tensors_are_checked():
    A = formats.random((4, 32), "2:4", rng=0)
    tensors = A.to_torch()
    tensors["meta"].zero_()
    with pytest.raises(NMSparseError, match="do not ascend"):
        SparseArray.from_torch(tensors, "2:4", (4, 32))


@pytest.mark.parametrize("dtype", [*DTYPES, np.dtype(np.float64), np.dtype(np.uint16), np.dtype(np.int32)])
def test_views_of_any_strides(dtype):
    a = np.arange(24).astype(dtype).reshape(4, 6)[::2, 1:]
    tensor = as_tensor(a)
    assert tensor.data_ptr() == a.ctypes.data and tensor.shape == a.shape
    back = as_array(tensor)
    assert back.dtype == dtype and np.shares_memory(back, a) and np.array_equal(bits(back), bits(a))


def test_a_read_only_array_is_copied():
    a = np.ones(3, np.float32)
    a.flags.writeable = False
    as_tensor(a)[0] = 5
    assert a[0] == 1


def test_gradients_are_not_lost_silently():
    A, x = formats.random((4, 32), "2:4", rng=0), torch.ones(2, 32, requires_grad=True)
    with pytest.raises(NMSparseError, match=r"nmsparse\.torch\.linear"):
        x @ A.T
    with torch.no_grad():
        assert (x @ A.T).shape == (2, 4)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_tensors(pattern, dtype):
    A = formats.random((24, 70), pattern, dtype=dtype, rng=0)
    x = np.random.default_rng(0).standard_normal((5, 70)).astype(dtype)
    t = as_tensor(x)
    for got, want in (
        (t @ A.T, x @ A.T),
        (A @ t.T, A @ x.T),
        (nmsparse.matmul(t[0], A.T), x[0] @ A.T),
        (t[:, :24] @ A, x[:, :24] @ A),
    ):
        assert isinstance(got, torch.Tensor) and got.dtype == t.dtype
        assert np.array_equal(bits(as_array(got)), bits(want))
    out = torch.empty(5, 24, dtype=t.dtype)
    assert nmsparse.matmul(t, A.T, out=out) is out
    assert np.array_equal(bits(as_array(out)), bits(x @ A.T))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_moe_layer_of_tensors(dtype):
    rng = np.random.default_rng(0)
    gate_up, down = (rng.standard_normal(s).astype(dtype) for s in ((4, 48, 32), (4, 32, 24)))
    experts = SparseExperts.from_dense(as_tensor(gate_up), as_tensor(down), "2:4")
    assert np.array_equal(bits(experts.down.values), bits(nmsparse.array(down, "2:4").values))
    x, logits = rng.standard_normal((6, 32)).astype(dtype), rng.standard_normal((6, 4), np.float32)
    ids, scores = route(logits, 2)
    tensor_ids, tensor_scores = route(as_tensor(logits), 2)
    assert tensor_ids.dtype == torch.int32 and torch.equal(tensor_scores, as_tensor(scores))
    y = experts(as_tensor(x), tensor_ids, tensor_scores)
    assert isinstance(y, torch.Tensor) and np.array_equal(bits(as_array(y)), bits(experts(x, ids, scores)))
    layer = MoELayer(rng.standard_normal((4, 32), np.float32), experts, Router(2))
    assert np.array_equal(bits(as_array(layer(as_tensor(x)))), bits(layer(x)))
    offsets = np.array([1, 1, 4, 6], np.int32)
    grouped = nmsparse.grouped_matmul(as_tensor(x), experts.gate_up, torch.from_numpy(offsets))
    assert np.array_equal(bits(as_array(grouped)), bits(nmsparse.grouped_matmul(x, experts.gate_up, offsets)))


def test_numpy_stays_numpy_and_torch_stays_out():
    code = (
        "import sys, numpy as np, nmsparse; A = nmsparse.random((4, 32), '2:4', rng=0); "
        "y = np.ones((2, 32), np.float32) @ A.T; nmsparse.route(np.zeros((1, 4)), 2); "
        "print(type(y).__name__, 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["ndarray", "False"]
