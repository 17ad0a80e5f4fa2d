"""Products of tokens with the weights of their experts: cut into tiles, each run by the kernel that suits its size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import NMSparseError
from ..formats import MixedExperts
from .llvm import AVX512
from .narrow import TOKENS, narrow_1, narrow_4
from .operand import AnyNM, TwoFour, operand
from .planes import COLUMNS
from .threads import count, team
from .wide import wide_8, wide_32, wide_64, wide_128

_NARROW = TOKENS if AVX512 else 8  # tokens of one expert up to which narrow beats wide with half of its lanes empty
_ROWS = 32  # rows of a task, at least: fewer are not worth fetching
_TASKS = 6  # for each thread, so that none waits long for the last
_NO_IDS = np.zeros(0, np.int64)


def matmul(a: Any, x: np.ndarray) -> np.ndarray:
    """``x @ a.T``: tokens ``(T, K)`` times a sparse array or ndarray ``(M, K)``, as ``(T, M)`` float32.

    >>> from nmsparse.formats import random
    >>> a, x = random((8, 64), "2:4", rng=0), np.ones((3, 64), np.float32)
    >>> np.allclose(matmul(a, x), x @ a.todense().T, atol=1e-5)
    True
    """
    _check_tokens(a, x)
    if isinstance(a, np.ndarray):
        return np.asarray(x, np.float32) @ a.astype(np.float32, copy=False).T
    return _multiply(a, x, [(0, 0, len(x))], np.empty((len(x), a.shape[0]), np.float32), _NO_IDS)


def grouped_matmul(a: Any, x: np.ndarray, offsets: np.ndarray, token_ids: np.ndarray | None = None) -> np.ndarray:
    """Each expert's tokens times its weights: ``(S, M)`` float32.

    ``a`` is a sparse array or ndarray ``(E, M, K)``, or :class:`~nmsparse.formats.MixedExperts`, whose dropped experts
    give zeros; float32, float16 or bfloat16, sums are float32. Slot s reads row
    ``token_ids[s]`` of ``x`` ``(T, K)``, or row s without ``token_ids``; expert e has the slots from ``offsets[e - 1]``
    to ``offsets[e]``, cumulative ends. Raises :class:`~nmsparse.errors.NMSparseError` for operands that do not fit.

    >>> from nmsparse.formats import random
    >>> a, x = random((2, 8, 64), "samoyeds:1:2:32", rng=0), np.ones((3, 64), np.float32)
    >>> y = grouped_matmul(a, x, np.array([1, 3]), token_ids=np.array([2, 0, 2]))
    >>> np.allclose(y, [x[2] @ a[0].todense().T, x[0] @ a[1].todense().T, x[2] @ a[1].todense().T], atol=1e-5)
    True
    """
    work, slots = expert_work(a, x, offsets, token_ids), len(x) if token_ids is None else len(token_ids)
    if not isinstance(a, MixedExperts):
        return _multiply_experts(a, x, work, np.empty((slots, a.shape[1]), np.float32), token_ids)
    y = np.zeros((slots, a.shape[1]), np.float32)
    for numbers, weight in a.parts:
        local = {number: i for i, number in enumerate(numbers.tolist())}
        mine = [(local[expert], *rows) for expert, *rows in work if expert in local]
        _multiply_experts(weight, x, mine, y, token_ids)
    return y


Work = list[tuple[int, int, int]]  # (expert, its first slot, slots)


def expert_work(a: Any, x: np.ndarray, offsets: np.ndarray, token_ids: np.ndarray | None) -> Work:
    """The experts that have slots; raises NMSparseError if what :func:`grouped_matmul` is to multiply does not fit."""
    _check_tokens(a, x)
    slots = len(x) if token_ids is None else len(token_ids)
    ends = np.asarray(offsets, np.int64)
    counts = ends.copy()
    counts[1:] -= ends[:-1]
    if a.ndim != 3 or ends.shape != a.shape[:1] or (counts < 0).any() or counts.sum() != slots:
        raise NMSparseError(
            f"grouped_matmul: expected weights (E, M, K) and E non-decreasing ends, the last one {slots}; "
            f"got weights of shape {a.shape} and offsets {ends.tolist()}"
        )
    if token_ids is not None and slots and not 0 <= token_ids.min() <= token_ids.max() < len(x):
        raise NMSparseError(f"grouped_matmul: expected token_ids in 0..{len(x) - 1}, got {token_ids.tolist()}")
    experts = np.flatnonzero(counts)
    return list(zip(experts.tolist(), (ends - counts)[experts].tolist(), counts[experts].tolist(), strict=True))


def _check_tokens(a: Any, x: np.ndarray) -> None:
    if x.ndim != 2 or x.shape[1] != a.shape[-1]:
        raise NMSparseError(f"expected tokens (T, K={a.shape[-1]}), got shape {x.shape}")


def _multiply_experts(a: Any, x: np.ndarray, work: Work, y: np.ndarray, token_ids: np.ndarray | None) -> np.ndarray:
    if isinstance(a, np.ndarray):
        return _multiply_dense(a, x, work, y, token_ids)
    return _multiply(a, x, work, y, _NO_IDS if token_ids is None else np.ascontiguousarray(token_ids, np.int64))


def _multiply(a: Any, x: np.ndarray, work: Work, y: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
    """Writes the rows of ``y`` that ``work`` names; returns it."""
    height, width = a.shape[-2:]
    if 0 in (height, width, len(y)):
        y[...] = 0
        return y
    x, weights = np.ascontiguousarray(x, np.float32), operand(a)
    for kernel, tiles in _tiles(weights, work).items():
        parts = max(1, min(_TASKS * count() // len(tiles), height // _ROWS))
        cost = sum(tile[2] for tile in tiles) * a.nnz // (a.shape[0] if a.ndim == 3 else 1)
        numbers = np.array(tiles, np.int64)
        team.run(kernel, len(tiles) * parts, cost, weights, x, token_ids, numbers, parts, y)
    return y


def _tiles(weights: TwoFour | AnyNM, work: Work) -> dict[Callable, list[tuple[int, int, int]]]:
    """Which kernel runs which tiles."""
    few = _NARROW if _suits_narrow(weights) else 0
    plan: dict[Callable, list[tuple[int, int, int]]] = {}
    for expert, first, left in work:
        while left:
            if left > 96:
                kernel, size = wide_128, 128
            elif left > 32:
                kernel, size = wide_64, 64
            elif left > max(few, 8):
                kernel, size = wide_32, 32
            elif few == 0:
                kernel, size = wide_8, 8
            else:
                kernel, size = (narrow_4, TOKENS) if left > 1 else (narrow_1, 1)
            size = min(size, left)
            plan.setdefault(kernel, []).append((expert, first, size))
            first, left = first + size, left - size
    return plan


def _suits_narrow(weights: TwoFour | AnyNM) -> bool:
    if isinstance(weights, AnyNM):
        return AVX512 and weights.together > 0
    # The narrow kernels pass over 32 columns at a time, and those must not belong to different rows.
    return weights.runs <= 1 or weights.run % COLUMNS == 0


def _multiply_dense(
    a: np.ndarray, x: np.ndarray, work: Work, y: np.ndarray, token_ids: np.ndarray | None
) -> np.ndarray:
    """The same with dense experts, through BLAS."""
    for expert, first, size in work:
        rows = slice(first, first + size)
        tokens = x[rows if token_ids is None else token_ids[rows]]
        np.matmul(tokens, a[expert].astype(np.float32, copy=False).T, out=y[rows])
    return y
