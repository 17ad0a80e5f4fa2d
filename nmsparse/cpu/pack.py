"""Prune and pack in one pass over the weight: each element is read where it lies, each buffer is written once.

The rules are those of :mod:`nmsparse.formats.selection`, and the buffers come out bit for bit as ``from_dense`` makes
them. What is allocated besides the buffers is a few rows.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from ..errors import NMSparseError
from ..formats import CLASSES, Pattern, parse
from ..formats.nm import is_24
from .doorbell import next_task, share
from .operand import INLINED
from .simd import number
from .storage import as_storage
from .threads import team

_STRIPE = 64  # rows of a task, rounded up to what is decided together
_PADDING = np.float32(-np.inf)


def pack(w: np.ndarray, pattern: str | Pattern, scores: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The canonical buffers of ``w`` ``(M, K)`` or ``(E, M, K)``, float32, float16 or bfloat16, pruned to ``pattern``.

    ``scores`` (same shape, float32, no NaN and no -inf) rank the weights; their magnitudes do by default.
    Raises :class:`~nmsparse.errors.NMSparseError` for other dtypes and for scores of another shape.

    >>> {name: buffer.tolist() for name, buffer in pack(np.float32([[0, 7, 0, -6]]), "1:2").items()}
    {'values': [[7.0, -6.0]], 'meta': [[1, 1]]}
    """
    pattern = parse(pattern)
    if scores is not None and scores.shape != w.shape:
        raise NMSparseError(f"pack: expected scores of the weight's shape {w.shape}, got {scores.shape}")
    source = as_storage(np.ascontiguousarray(w), "w")
    layout, *_ = CLASSES[pattern.format]._layout(pattern, *w.shape[-2:])
    buffers = {name: _empty((*w.shape[:-2], *size), kind or w.dtype) for name, (size, kind) in layout.items()}

    def experts(array: np.ndarray) -> np.ndarray:
        return array if w.ndim == 3 else array[None]

    ranks = np.zeros((0, 0, 0), np.float32) if scores is None else experts(np.ascontiguousarray(scores, np.float32))
    values, meta = experts(as_storage(buffers["values"], "values")), experts(buffers["meta"])
    stripe = -(-_STRIPE // pattern.rows) * pattern.rows
    head = experts(source), ranks, stripe, values, meta

    size = len(values) * -(-w.shape[-2] // stripe), 8 * w.size  # tasks, cost
    if pattern.format == "vnm":
        team.run(_pack_vnm, *size, *head, experts(buffers["indices"]), pattern.v, pattern.m)
    elif pattern.format == "samoyeds":
        team.run(_pack_samoyeds, *size, *head, experts(buffers["indices"]), pattern.n, pattern.m, pattern.v)
    elif is_24(pattern):
        team.run(_pack_24, *size, *head)
    else:
        team.run(_pack_nm, *size, *head, pattern.n, pattern.m)
    return buffers


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that starts on a cache line: NumPy's seldom do, and then every vector of the kernels straddles two."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


@njit(cache=True, nogil=True)
def _pack_24(bell, wake, *job):
    return share(bell, wake, _rows_24, job)


@njit(**INLINED)
def _rows_24(queue, w, ranks, stripe, values, meta):
    experts, height, _ = w.shape
    groups = 4 * meta.shape[2]
    scores, pairs = np.empty(4 * groups, np.float32), np.empty(groups, np.uint8)
    stripes = -(-height // stripe)
    task = next_task(queue)
    while task < experts * stripes:
        e, top = task // stripes, task % stripes * stripe
        for row in range(top, min(top + stripe, height)):
            _rank(scores, w, ranks, e, row, 0, 4 * groups)
            _choose_pairs(pairs, scores, groups)
            _put_pairs(values[e, row], meta[e, row], pairs, w, e, row, 0, groups)
        task = next_task(queue)


@njit(cache=True, nogil=True)
def _pack_nm(bell, wake, *job):
    return share(bell, wake, _rows_nm, job)


@njit(**INLINED)
def _rows_nm(queue, w, ranks, stripe, values, meta, n, m):
    experts, height, width = w.shape
    groups = meta.shape[2] // n
    scores, kept = np.empty(groups * m, np.float32), np.empty(m, np.bool_)
    stripes = -(-height // stripe)
    task = next_task(queue)
    while task < experts * stripes:
        e, top = task // stripes, task % stripes * stripe
        for row in range(top, min(top + stripe, height)):
            _rank(scores, w, ranks, e, row, 0, groups * m)
            i = 0
            for group in range(groups):
                _mark_best(scores[group * m : group * m + m], n, kept)
                for j in range(m):
                    if kept[j]:
                        column = group * m + j
                        values[e, row, i] = w[e, row, column] if column < width else 0
                        meta[e, row, i] = j
                        i += 1
        task = next_task(queue)


@njit(cache=True, nogil=True)
def _pack_vnm(bell, wake, *job):
    return share(bell, wake, _rows_vnm, job)


@njit(**INLINED)
def _rows_vnm(queue, w, ranks, stripe, values, meta, indices, v, m):
    experts, height, width = w.shape
    groups = indices.shape[2]
    scores, sums, kept = np.empty(groups * m, np.float32), np.empty(groups * m), np.empty(m, np.bool_)
    condensed, pairs = np.empty(4 * groups, np.float32), np.empty(groups, np.uint8)
    stripes = -(-height // stripe)
    task = next_task(queue)
    while task < experts * stripes:
        e, start = task // stripes, task % stripes * stripe
        for top in range(start, min(start + stripe, values.shape[1]), v):
            sums[:width] = 0
            sums[width:] = _PADDING
            for row in range(top, min(top + v, height)):
                _rank(scores, w, ranks, e, row, 0, width)
                for column in range(width):
                    sums[column] += scores[column]
            columns = indices[e, top // v]
            for group in range(groups):
                _mark_best(sums[group * m : group * m + m], 4, kept)
                i = 0
                for j in range(m):
                    if kept[j]:
                        columns[group, i] = j
                        i += 1
            for row in range(top, top + v):
                _rank(scores, w, ranks, e, row, 0, groups * m)
                for group in range(groups):
                    for p in range(4):
                        condensed[4 * group + p] = scores[group * m + columns[group, p]]
                _choose_pairs(pairs, condensed, groups)
                for group in range(groups):
                    first, second = pairs[group] & 3, pairs[group] >> 2
                    left = group * m
                    values[e, row, 2 * group] = _element(w, e, row, left + columns[group, first])
                    values[e, row, 2 * group + 1] = _element(w, e, row, left + columns[group, second])
                _put_words(meta[e, row], pairs, 0, groups)
        task = next_task(queue)


@njit(cache=True, nogil=True)
def _pack_samoyeds(bell, wake, *job):
    return share(bell, wake, _rows_samoyeds, job)


@njit(**INLINED)
def _rows_samoyeds(queue, w, ranks, stripe, values, meta, indices, n, m, v):
    experts, height, _ = w.shape
    width = 16 * meta.shape[2]
    size = min(v, width)
    scores, pairs = np.empty(size, np.float32), np.empty((m, size // 4), np.uint8)
    worth, kept = np.empty(m), np.empty(m, np.bool_)
    padded = values.shape[1] // n * m
    stripes = -(-height // stripe)
    task = next_task(queue)
    while task < experts * stripes:
        e, start = task // stripes, task % stripes * stripe
        for top in range(start, min(start + stripe, padded), m):
            first = top // m * n
            meta[e, first : first + n] = 0
            for run in range(indices.shape[2]):
                left, right = run * v, min((run + 1) * v, width)
                groups = (right - left) // 4
                for i in range(m):
                    _rank(scores, w, ranks, e, top + i, left, right)
                    _choose_pairs(pairs[i], scores, groups)
                    worth[i] = _sum_pairs(scores, pairs[i], groups) if top + i < height else _PADDING
                _mark_best(worth, n, kept)
                row = first
                for i in range(m):
                    if kept[i]:
                        indices[e, row, run] = i
                        _put_pairs(values[e, row], meta[e, row], pairs[i], w, e, top + i, left // 4, groups)
                        row += 1
        task = next_task(queue)


@njit(**INLINED)
def _rank(scores, w, ranks, e, row, left, right):
    """What columns ``left`` to ``right`` of a row are worth; padding is worth less than anything."""
    inside = max(left, min(right, w.shape[2])) if row < w.shape[1] else left
    for i in range(inside - left):
        size = ranks[e, row, left + i] if ranks.size else abs(number(w[e, row, left + i]))
        scores[i] = size if size == size else np.float32(np.inf)
    for i in range(inside - left, right - left):
        scores[i] = _PADDING


@njit(**INLINED)
def _choose_pairs(pairs, scores, groups):
    """The two of each four that are worth most, ties to the lower: their positions as a nibble of meta."""
    for group in range(groups):
        s0, s1, s2, s3 = scores[4 * group], scores[4 * group + 1], scores[4 * group + 2], scores[4 * group + 3]
        # A column stays if fewer than two others beat it.
        stays_0 = (s1 > s0) + (s2 > s0) + (s3 > s0) < 2
        stays_1 = (s0 >= s1) + (s2 > s1) + (s3 > s1) < 2
        stays_2 = (s0 >= s2) + (s1 >= s2) + (s3 > s2) < 2
        stays_3 = (s0 >= s3) + (s1 >= s3) + (s2 >= s3) < 2
        first = 0 if stays_0 else 1 if stays_1 else 2
        second = 3 if stays_3 else 2 if stays_2 else 1
        pairs[group] = first | second << 2


@njit(**INLINED)
def _sum_pairs(scores, pairs, groups):
    """What the pairs are worth together, in float64, first to last; padding adds nothing."""
    total = 0.0
    for group in range(groups):
        a, b = scores[4 * group + (pairs[group] & 3)], scores[4 * group + (pairs[group] >> 2)]
        total += (np.float64(a) if a > _PADDING else 0.0) + (np.float64(b) if b > _PADDING else 0.0)
    return total


@njit(**INLINED)
def _mark_best(worth, n, kept):
    """``kept[i]``: fewer than ``n`` others beat ``worth[i]``; ties to the lower index."""
    for i in range(len(worth)):
        beaten = 0
        for j in range(len(worth)):
            beaten += worth[j] > worth[i] or (j < i and worth[j] == worth[i])
        kept[i] = beaten < n


@njit(**INLINED)
def _put_pairs(values, meta, pairs, w, e, row, first_group, groups):
    """Store the pairs of some groups of a row: values and words."""
    whole = min(groups, max(0, w.shape[2] // 4 - first_group)) if row < w.shape[1] else 0
    for group in range(groups):
        i, column = 2 * (first_group + group), 4 * (first_group + group)
        first, second = column + (pairs[group] & 3), column + (pairs[group] >> 2)
        if group < whole:
            values[i], values[i + 1] = w[e, row, first], w[e, row, second]
        else:
            values[i], values[i + 1] = _element(w, e, row, first), _element(w, e, row, second)
    _put_words(meta, pairs, first_group, groups)


@njit(**INLINED)
def _put_words(meta, pairs, first_group, groups):
    """Store the pairs as nibbles of words; one that other groups share must hold theirs, or zeros, already."""
    if first_group % 4 == 0 and groups % 4 == 0:
        for word in range(groups // 4):
            low, high = pairs[4 * word] | pairs[4 * word + 1] << 4, pairs[4 * word + 2] | pairs[4 * word + 3] << 4
            meta[first_group // 4 + word] = low | high << 8
    else:
        for group in range(groups):
            place = first_group + group
            meta[place // 4] |= np.uint16(pairs[group] << 4 * (place % 4))


@njit(**INLINED)
def _element(w, e, row, column):
    """An element of the weight, or the zero that is stored in its padding."""
    return w[e, row, column] if row < w.shape[1] and column < w.shape[2] else w.dtype.type(0)
