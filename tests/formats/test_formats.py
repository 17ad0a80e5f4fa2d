"""One suite for every format: what is kept, and that nothing is lost on the way in and out."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import kept, legal
from strategies import DTYPES, PATTERNS, bits, expert_shapes, patterns, shapes, weights

import nmsparse
from nmsparse import NMSparseError, formats
from nmsparse.formats import NMArray, SamoyedsArray, SparseArray, VNMArray, parse

every_pattern = pytest.mark.parametrize("pattern", PATTERNS)


def each_matrix(*arrays):
    return zip(*arrays, strict=True) if arrays[0].ndim == 3 else [arrays]


@given(weights(), patterns())
def test_keeps_what_the_definition_keeps(w, pattern):
    mask = formats.from_dense(w, pattern).mask()
    for matrix, got in each_matrix(w, mask):
        np.testing.assert_array_equal(got, kept(matrix, pattern))


@given(weights(), patterns())
def test_stores_bits_and_zeros_the_rest(w, pattern):
    A = formats.from_dense(w, pattern)
    assert A.todense().dtype == w.dtype
    np.testing.assert_array_equal(bits(A.todense()), np.where(A.mask(), bits(w), 0))


@given(weights(), patterns())
def test_mask_is_legal(w, pattern):
    A = formats.from_dense(w, pattern)
    for (mask,) in each_matrix(A.mask()):
        assert legal(mask, pattern)


@given(st.data(), patterns().filter(lambda p: p.format != "vnm"))
def test_no_legal_mask_keeps_a_larger_total(data, pattern):
    w = data.draw(weights(shapes, special=False)).astype(np.float64)
    other = formats.random(w.shape, pattern, rng=data.draw(st.integers(0, 99))).mask()
    assert np.abs(w[formats.from_dense(w, pattern).mask()]).sum() >= np.abs(w[other]).sum() - 1e-9


@given(weights(), patterns())
def test_pruned_weight_is_a_fixed_point(w, pattern):
    once = formats.from_dense(w, pattern).todense()
    again = formats.from_dense(once, pattern, strict=True).todense()
    np.testing.assert_array_equal(np.where(again == 0, 0, bits(again)), np.where(once == 0, 0, bits(once)))


@given(patterns().filter(lambda p: p.format != "vnm"), st.integers(1, 3), st.integers(1, 2), st.integers(0, 99))
def test_round_trip_through_dense_gives_the_same_buffers(pattern, tall, wide, seed):
    shape = (tall * pattern.rows, wide * 16 * pattern.m)
    # No padding and no unused column in a V:N:M block: what is stored there has no dense counterpart.
    A = formats.random(shape, pattern, rng=seed)
    B = formats.from_dense(A.todense(), pattern, strict=True)
    for name, buffer in A.buffers().items():
        np.testing.assert_array_equal(B.buffers()[name], buffer)


@given(weights(), patterns())
def test_round_trip_through_buffers(w, pattern):
    A = formats.from_dense(w, pattern)
    B = formats.from_buffers(str(pattern), A.buffers(), A.shape)
    assert type(B) is type(A) and B.pattern == A.pattern and repr(B) == repr(A)
    assert all(B.buffers()[name] is buffer for name, buffer in A.buffers().items())


@given(weights(), patterns())
def test_zero_padding_changes_nothing(w, pattern):
    wide = np.zeros((*w.shape[:-2], w.shape[-2] + 5, w.shape[-1] + 11), w.dtype)
    wide[..., : w.shape[-2], : w.shape[-1]] = w
    got = formats.from_dense(wide, pattern).mask()[..., : w.shape[-2], : w.shape[-1]]
    np.testing.assert_array_equal(got, formats.from_dense(w, pattern).mask())


@given(weights(expert_shapes), patterns())
def test_expert_axis_is_a_stack_of_matrices(w, pattern):
    A = formats.from_dense(w, pattern)
    alone = [formats.from_dense(matrix, pattern) for matrix in w]
    for e, B in enumerate(alone):
        np.testing.assert_array_equal(bits(A[e].todense()), bits(B.todense()))
        assert A[e].values.base is not None, "an expert is a view"
    stacked = formats.stack(alone)
    assert stacked.shape == w.shape
    np.testing.assert_array_equal(stacked.meta, A.meta)


@given(weights(special=False), patterns(), st.integers(-3, 3))
def test_scores_rank_the_weights(w, pattern, exponent):
    size = np.abs(w.astype(np.float32))
    by_scores = formats.from_dense(w, pattern, scores=size * 2.0**exponent)
    np.testing.assert_array_equal(by_scores.mask(), formats.from_dense(w, pattern).mask())
    reverse = np.random.default_rng(0).random(w.shape, np.float32)
    for matrix, scores, got in each_matrix(w, reverse, formats.from_dense(w, pattern, scores=reverse).mask()):
        np.testing.assert_array_equal(got, kept(matrix, pattern, scores))


@given(weights(special=False), patterns(), st.integers(0, 99))
def test_mask_keeps_exactly_what_it_says(w, pattern, seed):
    rng = np.random.default_rng(seed)
    mask = formats.random(w.shape, pattern, rng=rng).mask() & (rng.random(w.shape) < 0.8)
    A = formats.from_dense(w, pattern, mask=mask)
    np.testing.assert_array_equal(A.todense(), np.where(mask, w, 0))


@given(st.data(), patterns())
def test_mask_and_strict_refuse_what_does_not_fit(data, pattern):
    w = data.draw(weights(shapes, special=False))
    fits = legal(w != 0, pattern)
    for option in ({"strict": True}, {"mask": w != 0}):
        if fits:
            np.testing.assert_array_equal(formats.from_dense(w, pattern, **option).todense(), w)
        else:
            with pytest.raises(NMSparseError, match=r"does not fit the pattern at row \d+, column \d+"):
                formats.from_dense(w, pattern, **option)


@given(weights(special=False), patterns())
def test_scaling_and_dtype_commute_with_todense(w, pattern):
    A = formats.from_dense(w, pattern)
    np.testing.assert_array_equal((2 * A).todense(), 2 * A.todense())
    np.testing.assert_array_equal((A * 0.5).todense(), A.todense() * w.dtype.type(0.5))
    np.testing.assert_array_equal((-A).todense(), -A.todense() + w.dtype.type(0))
    for dtype in DTYPES:
        np.testing.assert_array_equal(A.astype(dtype).todense(), A.todense().astype(dtype))
        assert A.astype(dtype).dtype == dtype and A.astype(dtype).meta is A.meta


@given(weights(), patterns())
def test_copies_share_nothing_and_equal(w, pattern):
    A = formats.from_dense(w, pattern)
    for B in (A.copy(), pickle.loads(pickle.dumps(A)), copy.deepcopy(A)):
        np.testing.assert_array_equal(bits(B.todense()), bits(A.todense()))
        assert not any(np.shares_memory(b, a) for b, a in zip(B.buffers().values(), A.buffers().values(), strict=True))


@given(st.data(), patterns())
def test_disordered_metadata_is_refused(data, pattern):
    # All zeros, so that a position moved into the padding carries nothing there.
    A = formats.from_dense(np.zeros(data.draw(shapes), np.float32), pattern)
    where = tuple(data.draw(st.integers(0, size - 1)) for size in A.meta.shape)
    meta = A.meta.copy()
    meta[where] = data.draw(st.integers(0, np.iinfo(meta.dtype).max))
    wrong = not _meta_is_legal(meta, pattern)
    if wrong:
        with pytest.raises(NMSparseError, match="corrupt"):
            formats.from_buffers(pattern, {**A.buffers(), "meta": meta}, A.shape)
    else:
        assert legal(formats.from_buffers(pattern, {**A.buffers(), "meta": meta}, A.shape).mask(), pattern)


def _meta_is_legal(meta, pattern):
    if pattern.format == "nm" and meta.dtype == np.uint8:
        groups = meta.reshape(-1, pattern.n).tolist()
        return all(sorted(set(g)) == g and g[-1] < pattern.m for g in groups)
    nibbles = [word >> shift & 15 for word in meta.ravel().tolist() for shift in (0, 4, 8, 12)]
    return all(nibble & 3 < nibble >> 2 for nibble in nibbles)


@given(st.data(), patterns().filter(lambda p: p.format != "nm"))
def test_disordered_indices_are_refused(data, pattern):
    A = formats.from_dense(data.draw(weights(shapes)), pattern)
    where = tuple(data.draw(st.integers(0, size - 1)) for size in A.indices.shape)
    indices = A.indices.copy()
    indices[where] = data.draw(st.integers(pattern.m, 255))
    with pytest.raises(NMSparseError, match="indices hold"):
        formats.from_buffers(pattern, {**A.buffers(), "indices": indices}, A.shape)
    if pattern.format == "vnm":
        with pytest.raises(NMSparseError, match="do not ascend"):
            formats.from_buffers(pattern, {**A.buffers(), "indices": A.indices[..., ::-1]}, A.shape)
    elif pattern.n > 1:
        with pytest.raises(NMSparseError, match="do not ascend"):
            formats.from_buffers(pattern, {**A.buffers(), "indices": A.indices[::-1]}, A.shape)


@given(weights(special=False), patterns(), st.sampled_from([1.0, np.nan, np.inf]))
def test_numbers_in_the_padding_are_refused(w, pattern, number):
    A = formats.from_dense(np.ones_like(w), pattern)
    stray = np.full_like(A.values, number)
    if A._padded() == A.shape[-2:]:
        formats.from_buffers(pattern, {**A.buffers(), "values": stray}, A.shape)
    elif A.nnz > A.mask().sum():
        with pytest.raises(NMSparseError, match="in the padding"):
            formats.from_buffers(pattern, {**A.buffers(), "values": stray}, A.shape)


@given(weights(), patterns(), st.sampled_from(["values", "meta", "indices"]), st.data())
def test_buffers_of_the_wrong_size_or_dtype_are_refused(w, pattern, name, data):
    A = formats.from_dense(w, pattern)
    buffers = A.buffers()
    name = name if name in buffers else "values"
    buffer = buffers[name]
    broken = data.draw(
        st.sampled_from(
            [buffer[..., :-1], buffer[None], np.zeros(buffer.shape, int), buffer.astype(complex), buffer.tolist()]
        )
    )
    with pytest.raises(NMSparseError):
        formats.from_buffers(pattern, {**buffers, name: broken}, A.shape)
    without = {key: value for key, value in buffers.items() if key != name}
    with pytest.raises(NMSparseError):
        formats.from_buffers(pattern, without, A.shape)
    with pytest.raises(NMSparseError):
        formats.from_buffers(pattern, buffers, (*A.shape[:-1], A.shape[-1] + 300))


@every_pattern
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_density_and_bytes_where_sizes_divide(pattern, dtype):
    # rows and columns that every pattern of the list divides
    numbers = parse(pattern)
    shape = (numbers.rows * 2, 16 * 7 * 5 * 3 * 4)
    A = nmsparse.random(shape, pattern, dtype=dtype, rng=1)
    assert A.density == pytest.approx(numbers.density)
    assert A.nnz == A.mask().sum() == round(numbers.density * A.size)
    assert A.nbytes == sum(b.nbytes for b in A.buffers().values())


@every_pattern
@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0), (0, 8, 8), (2, 0, 8), (2, 8, 0)])
def test_empty_weights(pattern, shape):
    A = formats.from_dense(np.zeros(shape, np.float32), pattern)
    assert A.shape == shape and A.todense().shape == shape and A.mask().shape == shape
    A.check_format(full=True)
    assert formats.from_buffers(pattern, A.buffers(), shape).density == A.density


@every_pattern
def test_random_is_reproducible_and_legal(pattern):
    A, B = (nmsparse.random((2, 40, 96), pattern, rng=7) for _ in range(2))
    np.testing.assert_array_equal(A.todense(), B.todense())
    A.check_format(full=True)
    assert not np.array_equal(A.todense(), nmsparse.random((2, 40, 96), pattern, rng=8).todense())


def test_all_zero_groups_store_the_lowest_positions():
    assert NMArray.from_dense(np.zeros((1, 16), np.float32)).meta.tolist() == [[0x4444]]
    assert VNMArray.from_dense(np.zeros((1, 32), np.float32), v=1, m=8).indices.tolist() == [[[0, 1, 2, 3]] * 4]
    assert SamoyedsArray.from_dense(np.zeros((2, 16), np.float32), v=4).indices.tolist() == [[0, 0, 0, 0]]


def test_special_values_keep_their_meaning():
    w = np.array([[-0.0, np.nan, 1e30, np.inf, -0.0, 0.0, 0.0, 0.0]], np.float32)
    A = NMArray.from_dense(w)
    assert np.isnan(A.values[0, 0]), "NaN ranks as +inf and is stored, not dropped"
    assert A.values[0, 1] == np.inf
    assert np.signbit(A.values[0, 2]), "a stored -0.0 keeps its sign"
    assert np.signbit(A.todense()[0, 4]) and not np.signbit(A.todense()[0, 0]), "what is not stored is +0"


def test_options_exclude_one_another():
    w = np.ones((4, 8), np.float32)
    with pytest.raises(NMSparseError, match="exclude one another"):
        NMArray.from_dense(w, scores=w, strict=True)


@pytest.mark.parametrize(
    ("w", "options", "message"),
    [
        (np.ones((4, 8), int), {}, "expected weights in float16, bfloat16"),
        (np.ones(8, np.float32), {}, "expected a weight"),
        (np.ones((1, 2, 3, 4), np.float32), {}, "expected a weight"),
        (np.ones((4, 8), np.float32), {"scores": np.ones((4, 7))}, "scores: expected shape"),
        (np.ones((4, 8), np.float32), {"scores": np.full((4, 8), np.nan)}, "NaN and -inf"),
        (np.ones((4, 8), np.float32), {"scores": np.full((4, 8), -np.inf)}, "NaN and -inf"),
        (np.ones((4, 8), np.float32), {"scores": np.ones((4, 8), complex)}, "real numbers"),
        (np.ones((4, 8), np.float32), {"mask": np.ones((4, 8))}, "mask: expected bool"),
        (np.ones((4, 8), np.float32), {"mask": np.ones((4, 7), bool)}, "mask: expected bool"),
    ],
)
@pytest.mark.parametrize("make", [NMArray.from_dense, VNMArray.from_dense, SamoyedsArray.from_dense])
def test_bad_arguments_are_explained(make, w, options, message):
    with pytest.raises(NMSparseError, match=message):
        make(w, **options)


def test_the_array_behaves_like_an_array_but_never_densifies_silently():
    A = NMArray.random((3, 8, 16), rng=0)
    with pytest.raises(TypeError, match="todense"):
        np.asarray(A)
    with pytest.raises(TypeError, match="todense"):
        np.asarray(A.T)
    assert A.T.T is A and A.T.shape == (3, 16, 8)
    np.testing.assert_array_equal(A.T.todense(), A.todense().transpose(0, 2, 1))
    assert A.to_device("cpu") is A
    for unknown in ("tpu", "cuda:", "cuda:x", "CPU", ""):
        with pytest.raises(nmsparse.UnsupportedDeviceError, match="expected 'cpu', 'cuda' or 'cuda:N'"):
            A.to_device(unknown)
    for wrong in (slice(0, 2), "a", (0, 1)):
        with pytest.raises(NMSparseError, match="todense"):
            A[wrong]
    with pytest.raises(IndexError):
        A[3]
    with pytest.raises(NMSparseError, match="indexed"):
        A[0][0]
    with pytest.raises(TypeError):
        A * np.ones(16)
    with pytest.raises(NMSparseError, match="stack"):
        formats.stack([A[0], VNMArray.random((8, 16), v=4, rng=0)])
    assert isinstance(A, SparseArray) and A.ndim == 3 and A.size == 384
