"""VNMArray: blocks of V rows share 4 of every M columns, and each row keeps 2 of those 4 (VENOM)."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import metadata
from ._base import SparseArray
from .pattern import VNM
from .selection import PADDING, ceil_to, merge_last, ordered_sum, top


class VNMArray(SparseArray):
    """A weight whose blocks of ``v`` rows × ``m`` columns keep four columns, and two of those four in each row.

    Gathering the kept columns makes a *condensed* matrix of width K' = 4·⌈K/m⌉ (rounded up to 16) that is plain 2:4,
    so the sparse tensor cores run it; the price is a gather of rows of the other operand, the same for ``v`` rows.

    Canonical buffers, with ``…`` for an optional expert axis, Mp = M rounded up to v and G = K'/4 column groups:

    ===========  =======  ============================================================================
    ``values``   dtype    ``(…, Mp, K'/2)``
    ``meta``     uint16   ``(…, Mp, K'/16)``: as in 2:4, over the condensed columns
    ``indices``  uint8    ``(…, Mp/v, G, 4)``: the kept columns of each group of m, ascending
    ===========  =======  ============================================================================

    A stored value at condensed position p of group g in row i sits in dense column ``g*m + indices[i//v, g, p]``.

    By hand, v = 2 rows, one group of m = 6 columns::

        w         = [ 4  0  1  7  0  2 ]     column sums of |w|: 9 0 2 8 1 5
                    [ 5  0  1  1 -1  3 ]     the four largest columns, ascending: 0 2 3 5
        indices   = 0 2 3 5
        condensed = [ 4  1  7  2 ]           2 of 4 in each row:  4 . 7 .
                    [ 5  1  1  3 ]                                5 . . 3
        values    = [ 4 7 ], [ 5 3 ]         meta: positions 0,2 and 0,3

    >>> w = np.array([[4, 0, 1, 7, 0, 2], [5, 0, 1, 1, -1, 3]], np.float32)
    >>> A = VNMArray.from_dense(w, v=2, m=6)
    >>> A.indices[0, 0].tolist(), A.values[:, :2].tolist(), (A.meta[:, 0] & 15).tolist()
    ([0, 2, 3, 5], [[4.0, 7.0], [5.0, 3.0]], [8, 12])
    >>> A.todense().tolist()
    [[4.0, 0.0, 0.0, 7.0, 0.0, 0.0], [5.0, 0.0, 0.0, 0.0, 0.0, 3.0]]

    Reference: Castro et al., "VENOM: A Vectorized N:M Format for Unleashing the Power of Sparse Tensor Cores" (SC'23,
    arXiv 2310.02065).
    """

    format = "vnm"
    pattern: VNM
    indices: np.ndarray

    @classmethod
    def from_dense(
        cls,
        w: np.ndarray,
        v: int = 64,
        n: int = 2,
        m: int = 8,
        *,
        scores: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        strict: bool = False,
    ) -> VNMArray:
        """Prune and pack ``w`` ``(M, K)`` or ``(E, M, K)``: columns by the sum of ``|w|`` over the block, then 2:4.

        Options as in :meth:`NMArray.from_dense`. Ranking columns by their sum is the usual greedy choice, not the best
        one over all subsets.

        >>> VNMArray.from_dense(np.ones((128, 256), np.float16)).density
        0.25
        """
        return cls._from_dense(w, VNM(v, n, m), scores, mask, strict)

    @classmethod
    def from_buffers(
        cls,
        values: np.ndarray,
        meta: np.ndarray,
        indices: np.ndarray,
        *,
        shape: tuple[int, ...],
        v: int = 64,
        n: int = 2,
        m: int = 8,
    ) -> VNMArray:
        """The array that holds these canonical buffers (no copy if contiguous); every position is checked.

        >>> A = VNMArray.random((64, 128), rng=0)
        >>> VNMArray.from_buffers(A.values, A.meta, A.indices, shape=A.shape).indices is A.indices
        True
        """
        return cls._from_buffers(VNM(v, n, m), {"values": values, "meta": meta, "indices": indices}, shape)

    @classmethod
    def random(
        cls,
        shape: tuple[int, ...],
        v: int = 64,
        n: int = 2,
        m: int = 8,
        *,
        dtype: Any = np.float32,
        rng: Any = None,
    ) -> VNMArray:
        """Normal values at random positions; ``rng`` is a seed or a ``numpy.random.Generator``."""
        return cls._random(shape, VNM(v, n, m), dtype, rng)

    @classmethod
    def _layout(cls, pattern: VNM, rows: int, cols: int):
        rows = ceil_to(rows, pattern.v)
        groups = ceil_to(-(-cols // pattern.m), metadata.GROUPS_PER_WORD)
        buffers = {
            "values": ((rows, 2 * groups), None),
            "meta": ((rows, groups // 4), np.uint16),
            "indices": ((rows // pattern.v, groups, 4), np.uint8),
        }
        return buffers, rows, groups * pattern.m

    @classmethod
    def _select(cls, scores: np.ndarray, pattern: VNM) -> dict[str, np.ndarray]:
        rows, cols = scores.shape
        blocks = scores.reshape(rows // pattern.v, pattern.v, cols // pattern.m, pattern.m)
        worth = ordered_sum(np.moveaxis(blocks, 1, -1))
        worth[np.isneginf(blocks[:, 0])] = PADDING  # the first row of a block is never padding
        columns = top(worth, 4)
        condensed = np.take_along_axis(blocks, columns[:, None], axis=-1).reshape(rows, columns.shape[1], 4)
        return {"meta": metadata.pack(top(condensed, 2)), "indices": columns.astype(np.uint8)}

    def _coordinates(self) -> tuple[np.ndarray, np.ndarray]:
        positions = metadata.unpack(self.meta)
        rows, groups, _ = positions.shape
        columns = np.repeat(self.indices, self.pattern.v, axis=0)
        cols = self.pattern.m * np.arange(groups)[:, None] + np.take_along_axis(columns, positions, axis=-1)
        return np.arange(rows)[:, None], merge_last(cols)

    def _disorder(self) -> str | None:
        if not metadata.ascending(self.meta).all():
            return "meta holds positions that do not ascend"
        if (self.indices >= self.pattern.m).any():
            return f"indices hold columns outside 0..{self.pattern.m - 1}"
        ascends = (np.diff(self.indices.astype(np.int16), axis=-1) > 0).all()
        return None if ascends else "indices hold columns that do not ascend"
