"""The vocabulary of the kernels: each word against NumPy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from numba import njit

from nmsparse.cpu.pick import word
from nmsparse.cpu.simd import address, at, fma, lane_sums, load, number, repeat, splat, store, transpose, widen
from nmsparse.cpu.storage import as_storage
from nmsparse.errors import NMSparseError


@njit
def convert(stored, out):
    source, target = address(stored), address(out)
    for i in range(0, stored.size, 16):
        store(target, i, load(source, i, 16))


@njit
def convert_one_by_one(stored, out):
    for i in range(stored.size):
        out[i] = number(stored[i])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("convert", [convert, convert_one_by_one], ids=["vector", "scalar"])
def test_every_16_bit_float_is_read_as_itself(dtype, convert):
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    got = np.empty(1 << 16, np.float32)
    convert(as_storage(every, "every"), got)
    np.testing.assert_array_equal(got, every.astype(np.float32))
    numbers = ~np.isnan(got)
    np.testing.assert_array_equal(np.signbit(got[numbers]), np.signbit(every.astype(np.float32)[numbers]))


def test_storage_is_a_view_and_refuses_other_dtypes():
    w = np.ones(4, np.float16)
    assert np.shares_memory(as_storage(w, "w"), w)
    with pytest.raises(NMSparseError, match="w: the compiled kernels take float32"):
        as_storage(np.ones(4), "w")


@njit
def sums_of_lanes(x):
    store(address(x), 0, lane_sums(address(x), 0))


def test_lane_sums_are_in_order():
    x = np.arange(256, dtype=np.float32)
    want = x.reshape(16, 16).sum(axis=1)
    sums_of_lanes(x)
    np.testing.assert_array_equal(x[:16], want)


@njit
def arrange(x, out):
    source, target = address(x), address(out)
    store(target, 0, repeat(load(source, 0, 2), 4))
    store(target, 8, widen(load(source, 0, 4), 8))
    store(target, 16, fma(splat(at(source, 3), 8), load(source, 0, 8), splat(np.float32(1), 8)))


def test_repeat_widen_splat_and_fma():
    x, out = np.arange(2, 10, dtype=np.float32), np.empty(24, np.float32)
    arrange(x, out)
    np.testing.assert_array_equal(out[:8], [2, 3] * 4)
    np.testing.assert_array_equal(out[8:16], [2, 3, 4, 5, 0, 0, 0, 0])
    np.testing.assert_array_equal(out[16:], 5 * x + 1)


@njit
def turn_16(x, rows, column, out, start, stride):
    transpose(address(x), address(rows), column, address(out), start, stride, 16)


@njit
def turn_8(x, rows, column, out, start, stride):
    transpose(address(x), address(rows), column, address(out), start, stride, 8)


@pytest.mark.parametrize(("turn", "side"), [(turn_16, 16), (turn_8, 8)])
def test_transpose_writes_its_square_and_nothing_else(turn, side):
    rng = np.random.default_rng(0)
    x, rows = rng.standard_normal((20, 40), np.float32), rng.permutation(20)[:side]
    out = np.zeros((side + 2, side + 3), np.float32)
    turn(x, 40 * rows, 5, out, out.shape[1] + 2, out.shape[1])
    want = np.zeros_like(out)
    want[1 : 1 + side, 2 : 2 + side] = x[rows, 5 : 5 + side].T
    np.testing.assert_array_equal(out, want)


@njit
def read_word(meta, i):
    return word(address(meta), i)


def test_a_word_may_start_anywhere():
    meta = np.array([1, 0x8002, 0xFFFF], np.uint16)
    assert [read_word(meta, i) for i in (0, 1)] == [0x8002_0001, 0xFFFF_8002]
