"""NMArray: N of every M consecutive columns. 2:4 is what sparse tensor cores multiply."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import metadata
from ._base import SparseArray
from .pattern import NM
from .selection import ceil_to, merge_last, top


class NMArray(SparseArray):
    """A weight of which every row keeps ``n`` of every ``m`` consecutive columns.

    Canonical buffers, with ``…`` for an optional expert axis:

    =========  ==================  =======  ==========================================================================
    2:4        ``values``          dtype    ``(…, M, Kp/2)``, Kp = K rounded up to 16
    \\          ``meta``            uint16   ``(…, M, Kp/16)``: four groups a word, two 2-bit positions a group
    other n:m  ``values``          dtype    ``(…, M, Kp·n/m)``, Kp = K rounded up to a multiple of m
    \\          ``meta``            uint8    same shape: the position inside the group of m
    =========  ==================  =======  ==========================================================================

    By hand, one row of eight columns in 2:4::

        w       = [ 1 -5  2  0 |  3  0  1 -1 ]
        kept    =     -5  2    |  3     1          the two largest of each four; 1 and -1 tie, the lower column stays
        values  = [-5  2 | 3 1]
        meta    = 1, 2 | 0, 2                      positions, two bits each, first group in the low bits:
                = 0b1000_1001 = 0x89               1 | 2<<2 = 9, (0 | 2<<2) << 4 = 0x80

    >>> A = NMArray.from_dense(np.array([[1, -5, 2, 0, 3, 0, 1, -1]], np.float32))
    >>> A.values[0, :4].tolist(), hex(A.meta[0, 0] & 0xFF)
    ([-5.0, 2.0, 3.0, 1.0], '0x89')
    >>> A.todense().tolist()
    [[0.0, -5.0, 2.0, 0.0, 3.0, 0.0, 1.0, 0.0]]
    >>> NMArray.random((8, 64, 256), n=1, m=4, rng=0)
    NMArray(float32[8, 64, 256], 1:4, nnz=32768, device='cpu')

    References: Mishra et al., "Accelerating Sparse Deep Neural Networks" (arXiv 2104.08378); PTX ISA, ``mma.sp``.
    """

    format = "nm"
    pattern: NM

    @classmethod
    def from_dense(
        cls,
        w: np.ndarray,
        n: int = 2,
        m: int = 4,
        *,
        scores: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        strict: bool = False,
    ) -> NMArray:
        """Prune and pack ``w`` ``(M, K)`` or ``(E, M, K)``; the largest ``|w|`` of each group stay.

        ``scores`` (same shape) rank instead of ``|w|``; ``mask`` (bool) says what to keep; ``strict=True`` keeps every
        non-zero. The last two raise :class:`~nmsparse.errors.NMSparseError` where the pattern has no room.

        >>> NMArray.from_dense(np.eye(4, 8, dtype=np.float32), strict=True).todense()[1].tolist()
        [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
        """
        return cls._from_dense(w, NM(n, m), scores, mask, strict)

    @classmethod
    def from_buffers(
        cls, values: np.ndarray, meta: np.ndarray, *, shape: tuple[int, ...], n: int = 2, m: int = 4
    ) -> NMArray:
        """The array that holds these canonical buffers (no copy if contiguous); every position is checked.

        >>> A = NMArray.random((4, 32), rng=0)
        >>> B = NMArray.from_buffers(A.values, A.meta, shape=A.shape)
        >>> B.values is A.values
        True
        """
        return cls._from_buffers(NM(n, m), {"values": values, "meta": meta}, shape)

    @classmethod
    def random(
        cls, shape: tuple[int, ...], n: int = 2, m: int = 4, *, dtype: Any = np.float32, rng: Any = None
    ) -> NMArray:
        """Normal values at uniformly random positions; ``rng`` is a seed or a ``numpy.random.Generator``."""
        return cls._random(shape, NM(n, m), dtype, rng)

    @classmethod
    def _layout(cls, pattern: NM, rows: int, cols: int):
        if is_24(pattern):
            padded = ceil_to(cols, metadata.COLUMNS_PER_WORD)
            return {"values": ((rows, padded // 2), None), "meta": ((rows, padded // 16), np.uint16)}, rows, padded
        padded = ceil_to(cols, pattern.m)
        stored = (rows, padded // pattern.m * pattern.n)
        return {"values": (stored, None), "meta": (stored, np.uint8)}, rows, padded

    @classmethod
    def _select(cls, scores: np.ndarray, pattern: NM) -> dict[str, np.ndarray]:
        rows, cols = scores.shape
        positions = top(scores.reshape(rows, cols // pattern.m, pattern.m), pattern.n).astype(np.uint8)
        return {"meta": metadata.pack(positions) if is_24(pattern) else merge_last(positions)}

    def _positions(self) -> np.ndarray:
        """Position of each kept value inside its group: ``(…, G, n)``."""
        if is_24(self.pattern):
            return metadata.unpack(self.meta)
        *lead, stored = self.meta.shape
        return self.meta.reshape(*lead, stored // self.pattern.n, self.pattern.n)

    def _coordinates(self) -> tuple[np.ndarray, np.ndarray]:
        positions = self._positions()
        cols = self.pattern.m * np.arange(positions.shape[-2])[:, None] + positions
        return np.arange(self.shape[0])[:, None], merge_last(cols)

    def _disorder(self) -> str | None:
        if is_24(self.pattern):
            return None if metadata.ascending(self.meta).all() else "meta holds positions that do not ascend"
        positions = self._positions().astype(np.int16)
        if (positions >= self.pattern.m).any():
            return f"meta holds positions outside 0..{self.pattern.m - 1}"
        return None if (np.diff(positions, axis=-1) > 0).all() else "meta holds positions that do not ascend"


def is_24(pattern: NM) -> bool:
    """Whether positions are packed two bits each, as the hardware reads them."""
    return (pattern.n, pattern.m) == (2, 4)
