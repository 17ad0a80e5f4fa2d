"""Prune and pack in one pass over the weight: each element is read where it lies, each buffer is written once.

The rules are those of :mod:`nmsparse.formats.selection`, and the buffers come out bit for bit as ``from_dense`` makes
them. Nothing of the weight's size is allocated besides the buffers.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numba import njit

from ..formats import CLASSES, Pattern, parse
from ..formats.nm import is_24
from . import threads
from .simd import address
from .storage import as_storage
from .threads import done, next_task

_STRIPE = 64  # rows of a task, rounded up to what is decided together
_PADDING = np.float32(-np.inf)


def _magnitudes(dtype: type) -> np.ndarray:
    """The magnitude of every 16-bit float, by its bits without the sign; NaN counts as inf."""
    size = np.arange(1 << 15, dtype=np.uint16).view(dtype).astype(np.float32)
    return np.where(np.isnan(size), np.float32(np.inf), size)


_TABLES = {
    np.dtype(np.float32): np.zeros(0, np.float32),  # needs none
    np.dtype(np.float16): _magnitudes(np.float16),
    np.dtype(ml_dtypes.bfloat16): _magnitudes(ml_dtypes.bfloat16),
}


def pack(w: np.ndarray, pattern: str | Pattern, scores: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The canonical buffers of ``w`` ``(M, K)`` or ``(E, M, K)``, float32, float16 or bfloat16, pruned to ``pattern``.

    ``scores`` (same shape, float32, no NaN and no -inf) rank the weights; their magnitudes do by default.

    >>> {name: buffer.tolist() for name, buffer in pack(np.float32([[0, 7, 0, -6]]), "1:2").items()}
    {'values': [[7.0, -6.0]], 'meta': [[1, 1]]}
    """
    pattern = parse(pattern)
    layout, *_ = CLASSES[pattern.format]._layout(pattern, *w.shape[-2:])
    buffers = {name: np.empty((*w.shape[:-2], *size), kind or w.dtype) for name, (size, kind) in layout.items()}
    source = as_storage(np.ascontiguousarray(w), "w")
    ranks = np.zeros((0, 0, 0), np.float32) if scores is None else np.ascontiguousarray(scores, np.float32)
    values = as_storage(buffers["values"], "values")
    meta, indices = buffers["meta"], buffers.get("indices")
    if w.ndim == 2:
        source, values, meta = source[None], values[None], meta[None]
        ranks = ranks if scores is None else ranks[None]
        indices = None if indices is None else indices[None]
    stripe = -(-_STRIPE // pattern.rows) * pattern.rows
    head = source, ranks, _TABLES[w.dtype], stripe, values, meta

    def job(queue: np.ndarray, caller: bool) -> None:
        if pattern.format == "vnm":
            _pack_vnm(queue, *head, indices, pattern.v, pattern.m)
        elif pattern.format == "samoyeds":
            _pack_samoyeds(queue, *head, indices, pattern.n, pattern.m, pattern.v // 4)
        elif is_24(pattern):
            _pack_24(queue, *head)
        else:
            _pack_nm(queue, *head, pattern.n, pattern.m)

    threads.team.run(job, tasks=len(source) * -(-source.shape[1] // stripe), cost=8 * w.size)
    return buffers


@njit(cache=True, nogil=True)
def _pack_24(queue, w, scores, table, stripe, values, meta):
    experts, height, _ = w.shape
    stripes = -(-height // stripe)
    queue = address(queue)
    task = next_task(queue)
    while task < experts * stripes:
        e, top = task // stripes, task % stripes * stripe
        for row in range(top, min(top + stripe, height)):
            for word in range(meta.shape[2]):
                packed = 0
                for g in range(4):
                    column = 16 * word + 4 * g
                    first, second = _best_pair(w, scores, table, e, row, column, column + 1, column + 2, column + 3)
                    _put_pair(values, w, e, row, 2 * (4 * word + g), row, column + first, column + second)
                    packed |= (first | second << 2) << 4 * g
                meta[e, row, word] = packed
        done(queue)
        task = next_task(queue)


@njit(cache=True, nogil=True)
def _pack_nm(queue, w, scores, table, stripe, values, meta, n, m):
    experts, height, width = w.shape
    stripes = -(-height // stripe)
    worth, kept = np.empty(m), np.empty(m, np.bool_)
    queue = address(queue)
    task = next_task(queue)
    while task < experts * stripes:
        e, top = task // stripes, task % stripes * stripe
        for row in range(top, min(top + stripe, height)):
            for group in range(meta.shape[2] // n):
                for j in range(m):
                    worth[j] = _score(w, scores, table, e, row, group * m + j)
                _mark_best(worth, n, kept)
                i = group * n
                for j in range(m):
                    if kept[j]:
                        column = group * m + j
                        values[e, row, i] = w[e, row, column] if column < width else 0
                        meta[e, row, i] = j
                        i += 1
        done(queue)
        task = next_task(queue)


@njit(cache=True, nogil=True)
def _pack_vnm(queue, w, scores, table, stripe, values, meta, indices, v, m):
    experts, height, width = w.shape
    stripes = -(-height // stripe)
    sums, worth, kept = np.empty(width), np.empty(m), np.empty(m, np.bool_)
    queue = address(queue)
    task = next_task(queue)
    while task < experts * stripes:
        e, start = task // stripes, task % stripes * stripe
        for top in range(start, min(start + stripe, values.shape[1]), v):
            sums[:] = 0
            for row in range(top, min(top + v, height)):
                for column in range(width):
                    sums[column] += _score(w, scores, table, e, row, column)
            columns = indices[e, top // v]
            for group in range(columns.shape[0]):
                for j in range(m):
                    column = group * m + j
                    worth[j] = sums[column] if column < width else _PADDING
                _mark_best(worth, 4, kept)
                i = 0
                for j in range(m):
                    if kept[j]:
                        columns[group, i] = j
                        i += 1
            for row in range(top, top + v):
                for word in range(meta.shape[2]):
                    packed = 0
                    for g in range(4):
                        group = 4 * word + g
                        c = columns[group]
                        left = group * m
                        c0, c1, c2, c3 = left + c[0], left + c[1], left + c[2], left + c[3]
                        first, second = _best_pair(w, scores, table, e, row, c0, c1, c2, c3)
                        _put_pair(values, w, e, row, 2 * group, row, left + c[first], left + c[second])
                        packed |= (first | second << 2) << 4 * g
                    meta[e, row, word] = packed
        done(queue)
        task = next_task(queue)


@njit(cache=True, nogil=True)
def _pack_samoyeds(queue, w, scores, table, stripe, values, meta, indices, n, m, chunk):
    """``chunk`` is the length of a run in groups of four columns."""
    experts, height, _ = w.shape
    groups = values.shape[1] // n
    stripes = -(-height // stripe)
    worth, kept = np.empty(m), np.empty(m, np.bool_)
    quads = 4 * meta.shape[2]
    queue = address(queue)
    task = next_task(queue)
    while task < experts * stripes:
        e, start = task // stripes, task % stripes * stripe
        for top in range(start, min(start + stripe, groups * m), m):
            stored = top // m * n
            for row in range(stored, stored + n):
                meta[e, row, :] = 0
            for run in range(indices.shape[2]):
                left, right = run * chunk, min((run + 1) * chunk, quads)
                for i in range(m):
                    worth[i] = _run_worth(w, scores, table, e, top + i, left, right) if top + i < height else _PADDING
                _mark_best(worth, n, kept)
                row = stored
                for i in range(m):
                    if kept[i]:
                        indices[e, row, run] = i
                        for quad in range(left, right):
                            c = 4 * quad
                            first, second = _best_pair(w, scores, table, e, top + i, c, c + 1, c + 2, c + 3)
                            _put_pair(values, w, e, row, 2 * quad, top + i, c + first, c + second)
                            meta[e, row, quad // 4] |= np.uint16((first | second << 2) << 4 * (quad % 4))
                        row += 1
        done(queue)
        task = next_task(queue)


@njit(cache=True, nogil=True)
def _run_worth(w, scores, table, e, row, left, right):
    """What 2:4 keeps of the groups ``left`` to ``right`` of a row, in float64, first to last; padding adds 0."""
    total = 0.0
    for quad in range(left, right):
        c = 4 * quad
        first, second = _best_pair(w, scores, table, e, row, c, c + 1, c + 2, c + 3)
        a, b = _score(w, scores, table, e, row, c + first), _score(w, scores, table, e, row, c + second)
        total += np.float64(0 if a == _PADDING else a) + np.float64(0 if b == _PADDING else b)
    return total


@njit(cache=True, nogil=True)
def _score(w, scores, table, e, row, column):
    """What an element is worth; padding is worth less than anything."""
    if row >= w.shape[1] or column >= w.shape[2]:
        return _PADDING
    if scores.size:
        return scores[e, row, column]
    element = w[e, row, column]
    if table.size:
        return table[np.int64(element) & 0x7FFF]
    size = np.float32(abs(element))
    return size if size == size else np.float32(np.inf)


@njit(cache=True, nogil=True)
def _best_pair(w, scores, table, e, row, c0, c1, c2, c3):
    """Which two of four columns are worth most, in ascending order; ties to the lower one."""
    s0, s1 = _score(w, scores, table, e, row, c0), _score(w, scores, table, e, row, c1)
    s2, s3 = _score(w, scores, table, e, row, c2), _score(w, scores, table, e, row, c3)
    # A column stays if fewer than two others beat it.
    stays_0 = (s1 > s0) + (s2 > s0) + (s3 > s0) < 2
    stays_1 = (s0 >= s1) + (s2 > s1) + (s3 > s1) < 2
    stays_2 = (s0 >= s2) + (s1 >= s2) + (s3 > s2) < 2
    stays_3 = (s0 >= s3) + (s1 >= s3) + (s2 >= s3) < 2
    return 0 if stays_0 else 1 if stays_1 else 2, 3 if stays_3 else 2 if stays_2 else 1


@njit(cache=True, nogil=True)
def _mark_best(worth, n, kept):
    """``kept[i]``: fewer than ``n`` others beat ``worth[i]``; ties to the lower index."""
    for i in range(len(worth)):
        beaten = 0
        for j in range(len(worth)):
            beaten += worth[j] > worth[i] or (j < i and worth[j] == worth[i])
        kept[i] = beaten < n


@njit(cache=True, nogil=True)
def _put_pair(values, w, e, stored_row, i, row, first, second):
    """Store two elements of a row, zeros for those in the padding."""
    inside = row < w.shape[1]
    values[e, stored_row, i] = w[e, row, first] if inside and first < w.shape[2] else 0
    values[e, stored_row, i + 1] = w[e, row, second] if inside and second < w.shape[2] else 0
