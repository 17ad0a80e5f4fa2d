"""Sparse weight formats and the ragged token lists that meet them: what a matrix is, in NumPy and integers only."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import NMSparseError
from . import pattern as _pattern
from ._base import SparseArray, Transposed, stack
from .mixed import MixedExperts, stack_experts
from .nm import NMArray
from .pattern import NM, VNM, Pattern, Samoyeds, parse
from .samoyeds import SamoyedsArray
from .tokens import DROPPED, RaggedTokens
from .vnm import VNMArray

__all__ = [
    "DROPPED",
    "NM",
    "VNM",
    "MixedExperts",
    "NMArray",
    "Pattern",
    "RaggedTokens",
    "Samoyeds",
    "SamoyedsArray",
    "SparseArray",
    "Transposed",
    "VNMArray",
    "from_buffers",
    "from_dense",
    "parse",
    "random",
    "stack",
    "stack_experts",
]

CLASSES: dict[str, type[SparseArray]] = {kind.format: kind for kind in (NMArray, VNMArray, SamoyedsArray)}
assert CLASSES.keys() == _pattern.FORMATS.keys()


def from_dense(w: np.ndarray, pattern: str | Pattern, **options: Any) -> SparseArray:
    """``Format.from_dense`` of the format that ``pattern`` names; options ``scores=``, ``mask=``, ``strict=``.

    >>> from_dense(np.eye(4, 32, dtype=np.float32), "samoyeds:1:2:16")
    SamoyedsArray(float32[4, 32], samoyeds:1:2:16, nnz=32, device='cpu')
    """
    pattern = parse(pattern)
    return CLASSES[pattern.format]._from_dense(w, pattern, **options)


def from_buffers(pattern: str | Pattern, buffers: dict[str, np.ndarray], shape: tuple[int, ...]) -> SparseArray:
    """The array of ``pattern`` and ``shape`` that holds these canonical buffers, every position checked.

    >>> A = NMArray.random((4, 32), rng=0)
    >>> from_buffers("2:4", A.buffers(), A.shape)
    NMArray(float32[4, 32], 2:4, nnz=64, device='cpu')
    """
    pattern = parse(pattern)
    unknown = set(buffers) - {"values", "meta", "indices"}
    if unknown or "values" not in buffers or "meta" not in buffers:
        raise NMSparseError(f"expected the buffers values, meta (and indices), got {sorted(buffers)}")
    return CLASSES[pattern.format]._from_buffers(pattern, buffers, shape)


def random(shape: tuple[int, ...], pattern: str | Pattern, *, dtype: Any = np.float32, rng: Any = None) -> SparseArray:
    """Normal values at random positions of ``pattern``; ``rng`` is a seed or a ``numpy.random.Generator``.

    >>> random((8, 128, 256), "vnm:64:2:8", rng=0)
    VNMArray(float32[8, 128, 256], vnm:64:2:8, nnz=65536, device='cpu')
    """
    pattern = parse(pattern)
    return CLASSES[pattern.format]._random(shape, pattern, dtype, rng)
