"""Prune and pack: bit for bit what the selection rules say, by an oracle in plain Python and by ``from_dense``."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import best
from strategies import PATTERNS, bits, patterns, weights

from nmsparse import formats
from nmsparse.cpu.pack import pack
from nmsparse.errors import NMSparseError
from nmsparse.formats import NM, VNM, Pattern


def packed_by_hand(w: np.ndarray, pattern: Pattern, scores: np.ndarray | None) -> dict[str, np.ndarray]:
    """The canonical buffers of one matrix, an element at a time, from the documentation of the formats."""
    height, width = w.shape
    worth = np.abs(w.astype(np.float64)) if scores is None else scores.astype(np.float64)
    worth = np.where(np.isnan(worth), np.inf, worth).tolist()

    def score(row: int, col: int) -> float:
        return worth[row][col] if row < height and col < width else -np.inf

    def value(row: int, col: int):
        return w[row, col] if row < height and col < width else w.dtype.type(0)

    def total(terms: list[float]) -> float:
        result = 0.0
        for term in terms:
            result += 0.0 if term == -np.inf else term
        return result

    def up(size: int, multiple: int) -> int:
        return -(-size // multiple) * multiple

    def words(nibbles: list[list[int]]) -> np.ndarray:
        rows = [
            [sum(n << 4 * i for i, n in enumerate(row[g : g + 4])) for g in range(0, len(row), 4)] for row in nibbles
        ]
        return np.array(rows, np.uint16)

    if isinstance(pattern, NM) and (pattern.n, pattern.m) != (2, 4):
        values, meta = [], []
        for row in range(height):
            values.append([])
            meta.append([])
            for left in range(0, up(width, pattern.m), pattern.m):
                kept = best([score(row, left + j) for j in range(pattern.m)], pattern.n)
                values[-1] += [value(row, left + j) for j in kept]
                meta[-1] += kept
        return {"values": np.array(values, w.dtype), "meta": np.array(meta, np.uint8)}

    if isinstance(pattern, NM):
        sources = [[[(row, c + j) for j in range(4)] for c in range(0, up(width, 16), 4)] for row in range(height)]
        indices = None
    elif isinstance(pattern, VNM):
        groups = up(-(-width // pattern.m), 4)
        sources, indices = [], []
        for top in range(0, up(height, pattern.v), pattern.v):
            block = range(top, top + pattern.v)
            columns = []
            for g in range(groups):
                cols = [g * pattern.m + j for j in range(pattern.m)]
                sums = [total([score(row, c) for row in block]) if c < width else -np.inf for c in cols]
                columns.append(best(sums, 4))
            indices.append(columns)
            sources += [[[(row, g * pattern.m + j) for j in columns[g]] for g in range(groups)] for row in block]
        indices = np.array(indices, np.uint8)
    else:
        padded = up(width, 16)
        sources, indices = [], []
        for top in range(0, up(height, pattern.m), pattern.m):
            kept_rows = []
            for left in range(0, padded, pattern.v):
                quads = range(left, min(left + pattern.v, padded), 4)
                sums = []
                for row in range(top, top + pattern.m):
                    four = [[score(row, c + j) for j in range(4)] for c in quads]
                    pairs = [total([quad[j] for j in best(quad, 2)]) for quad in four]
                    sums.append(total(pairs) if row < height else -np.inf)
                kept_rows.append(best(sums, pattern.n))
            for i in range(pattern.n):
                indices.append([rows[i] for rows in kept_rows])
                sources.append(
                    [[(top + kept_rows[c // pattern.v][i], c + j) for j in range(4)] for c in range(0, padded, 4)]
                )
        indices = np.array(indices, np.uint8)

    values, nibbles = [], []
    for row in sources:
        kept = [best([score(*place) for place in quad], 2) for quad in row]
        nibbles.append([first | second << 2 for first, second in kept])
        values.append([value(*quad[p]) for quad, pair in zip(row, kept, strict=True) for p in pair])
    buffers = {"values": np.array(values, w.dtype), "meta": words(nibbles)}
    return buffers if indices is None else {**buffers, "indices": indices}


def assert_same_bits(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for name, buffer in want.items():
        assert (got[name].shape, got[name].dtype) == (buffer.shape, buffer.dtype), name
        assert got[name].flags.c_contiguous
        if name == "values":
            np.testing.assert_array_equal(bits(got[name]), bits(buffer))
        else:
            np.testing.assert_array_equal(got[name], buffer)


def stacked_by_hand(w: np.ndarray, pattern: Pattern, scores: np.ndarray | None = None) -> dict[str, np.ndarray]:
    if w.ndim == 2:
        return packed_by_hand(w, pattern, scores)
    matrices = [packed_by_hand(w[e], pattern, None if scores is None else scores[e]) for e in range(len(w))]
    return {name: np.stack([matrix[name] for matrix in matrices]) for name in matrices[0]}


@given(weights(), patterns())
def test_pack_keeps_what_the_rules_say(w, pattern):
    assert_same_bits(pack(w, pattern), stacked_by_hand(w, pattern))


@given(weights(special=False), patterns(), st.integers(0, 2**32), st.booleans())
def test_scores_rank_instead(w, pattern, seed, ties):
    rng = np.random.default_rng(seed)
    scores = (rng.integers(-2, 3, w.shape) if ties else rng.standard_normal(w.shape)).astype(np.float32)
    assert_same_bits(pack(w, pattern, scores), stacked_by_hand(w, pattern, scores))


@given(weights(), patterns())
def test_pack_is_from_dense(w, pattern):
    assert_same_bits(pack(w, pattern), formats.from_dense(w, pattern).buffers())


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16], ids=["fp32", "bf16", "fp16"])
def test_many_tasks_leave_no_seam(pattern, dtype):
    w = np.random.default_rng(0).standard_normal((3, 200, 150), np.float32).astype(dtype)
    assert_same_bits(pack(w, pattern), formats.from_dense(w, pattern).buffers())


@pytest.mark.parametrize("shape", [(0, 16), (16, 0), (0, 4, 16), (2, 0, 16), (1, 1)])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "vnm:4:2:8", "samoyeds:1:2:16"])
def test_empty_and_tiny_weights(shape, pattern):
    w = np.ones(shape, np.float32)
    assert_same_bits(pack(w, pattern), formats.from_dense(w, pattern).buffers())


def test_a_weight_need_not_be_contiguous():
    w = np.random.default_rng(0).standard_normal((70, 96), np.float32)
    assert_same_bits(pack(w.T[::2], "2:4"), pack(np.ascontiguousarray(w.T[::2]), "2:4"))


def test_values_start_on_a_cache_line():
    assert pack(np.ones((8, 64), np.float32), "2:4")["values"].ctypes.data % 64 == 0


def test_what_pack_refuses():
    with pytest.raises(NMSparseError, match="float64"):
        pack(np.ones((4, 16)), "2:4")
    with pytest.raises(NMSparseError, match=r"scores of the weight's shape \(4, 16\), got \(4, 8\)"):
        pack(np.ones((4, 16), np.float32), "2:4", np.ones((4, 8), np.float32))
