"""SamoyedsArray: N of every M rows per run of V columns, then 2:4 inside what is kept."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import metadata
from ._base import SparseArray
from .pattern import Samoyeds
from .selection import PADDING, ceil_to, merge_last, ordered_sum, top


class SamoyedsArray(SparseArray):
    """A weight sparse on two levels: of ``m`` rows keep ``n`` *sub-rows* in each run of ``v`` columns, each one 2:4.

    The kept sub-rows of a row group slide together into n full-length stored rows, so what is stored is a plain 2:4
    matrix of R = M·n/m rows; only the destination of a stored row changes, at every v columns.

    Canonical buffers, with ``…`` for an optional expert axis, Mp = M rounded up to m, R = Mp·n/m, Kp = K up to 16:

    ===========  =======  =================================================================================
    ``values``   dtype    ``(…, R, Kp/2)``
    ``meta``     uint16   ``(…, R, Kp/16)``: as in 2:4
    ``indices``  uint8    ``(…, R, ⌈Kp/v⌉)``: which of the m rows; the n of one group differ and ascend
    ===========  =======  =================================================================================

    Stored row r in column chunk c belongs to dense row ``(r//n)*m + indices[r, c]``. Which sub-rows stay: those whose
    2:4 groups keep the largest sum of scores, so that the whole keeps the most that the pattern allows.

    By hand, 1 of 2 rows, runs of v = 4 columns (after the worked example of the paper's format)::

        w = [ 1 -5  2  0 |  3  0  1 -1 ]     kept sums:  7 |  4     rows 0, 1: row 1 wins both runs
            [ 0  1  7 -6 | -1  8  0  9 ]                13 | 17
            [ 4  0 -3  1 |  0  0  1  0 ]                 7 |  1     rows 2, 3: row 2 wins the first run,
            [ 1  1  0  2 |  5 -2  0  6 ]                 3 | 11                row 3 the second
        values  = [ 7 -6 |  8  9 ]           meta = 2,3 | 1,3       indices = 1 1
                  [ 4 -3 |  5  6 ]                  0,2 | 0,3                 0 1

    >>> w = np.array([[1, -5, 2, 0, 3, 0, 1, -1], [0, 1, 7, -6, -1, 8, 0, 9],
    ...               [4, 0, -3, 1, 0, 0, 1, 0], [1, 1, 0, 2, 5, -2, 0, 6]], np.float32)
    >>> A = SamoyedsArray.from_dense(w, v=4)
    >>> A.values[:, :4].tolist(), A.indices[:, :2].tolist()
    ([[7.0, -6.0, 8.0, 9.0], [4.0, -3.0, 5.0, 6.0]], [[1, 1], [0, 1]])
    >>> [hex(word & 0xFF) for word in A.meta[:, 0]]
    ['0xde', '0xc8']
    >>> A.todense().astype(int).tolist()[2:]
    [[4, 0, -3, 0, 0, 0, 0, 0], [0, 0, 0, 0, 5, 0, 0, 6]]

    Reference: Wu et al., "Samoyeds: Accelerating MoE Models with Structured Sparsity Leveraging Sparse Tensor Cores"
    (EuroSys'25, arXiv 2503.10725).
    """

    format = "samoyeds"
    pattern: Samoyeds
    indices: np.ndarray

    @classmethod
    def from_dense(
        cls,
        w: np.ndarray,
        n: int = 1,
        m: int = 2,
        v: int = 128,
        *,
        scores: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        strict: bool = False,
    ) -> SamoyedsArray:
        """Prune and pack ``w`` ``(M, K)`` or ``(E, M, K)``. Options as in :meth:`NMArray.from_dense`.

        >>> SamoyedsArray.from_dense(np.ones((256, 512), np.float16)).density
        0.25
        """
        return cls._from_dense(w, Samoyeds(n, m, v), scores, mask, strict)

    @classmethod
    def from_buffers(
        cls,
        values: np.ndarray,
        meta: np.ndarray,
        indices: np.ndarray,
        *,
        shape: tuple[int, ...],
        n: int = 1,
        m: int = 2,
        v: int = 128,
    ) -> SamoyedsArray:
        """The array that holds these canonical buffers (no copy if contiguous); every position is checked.

        >>> A = SamoyedsArray.random((64, 256), rng=0)
        >>> SamoyedsArray.from_buffers(A.values, A.meta, A.indices, shape=A.shape).values is A.values
        True
        """
        return cls._from_buffers(Samoyeds(n, m, v), {"values": values, "meta": meta, "indices": indices}, shape)

    @classmethod
    def random(
        cls,
        shape: tuple[int, ...],
        n: int = 1,
        m: int = 2,
        v: int = 128,
        *,
        dtype: Any = np.float32,
        rng: Any = None,
    ) -> SamoyedsArray:
        """Normal values at random positions; ``rng`` is a seed or a ``numpy.random.Generator``."""
        return cls._random(shape, Samoyeds(n, m, v), dtype, rng)

    @classmethod
    def _layout(cls, pattern: Samoyeds, rows: int, cols: int):
        rows, cols = ceil_to(rows, pattern.m), ceil_to(cols, metadata.COLUMNS_PER_WORD)
        stored = rows // pattern.m * pattern.n
        buffers = {
            "values": ((stored, cols // 2), None),
            "meta": ((stored, cols // 16), np.uint16),
            "indices": ((stored, -(-cols // pattern.v)), np.uint8),
        }
        return buffers, rows, cols

    @classmethod
    def _select(cls, scores: np.ndarray, pattern: Samoyeds) -> dict[str, np.ndarray]:
        rows, cols = scores.shape
        quads = scores.reshape(rows, cols // 4, 4)
        positions = top(quads, 2)
        pairs = ordered_sum(np.take_along_axis(quads, positions, axis=-1))
        worth = _chunk_sums(pairs, pattern.v // 4)
        worth[np.isneginf(scores).all(axis=1)] = PADDING  # rows below the weight
        kept = top(np.moveaxis(worth.reshape(rows // pattern.m, pattern.m, worth.shape[1]), 1, -1), pattern.n)
        indices = np.moveaxis(kept, -1, 1).reshape(rows // pattern.m * pattern.n, worth.shape[1])
        source = _repeat_chunks(_dense_rows(indices, pattern), pattern.v // 4, cols // 4)
        return {
            "meta": metadata.pack(positions[source, np.arange(cols // 4)]),
            "indices": indices.astype(np.uint8),
        }

    def _coordinates(self) -> tuple[np.ndarray, np.ndarray]:
        positions = metadata.unpack(self.meta)
        cols = merge_last(4 * np.arange(positions.shape[1])[:, None] + positions)
        rows = _dense_rows(self.indices, self.pattern)
        return _repeat_chunks(rows, self.pattern.v // 2, cols.shape[1]), cols

    def _disorder(self) -> str | None:
        if not metadata.ascending(self.meta).all():
            return "meta holds positions that do not ascend"
        if (self.indices >= self.pattern.m).any():
            return f"indices hold rows outside 0..{self.pattern.m - 1}"
        *lead, stored, chunks = self.indices.shape
        groups = self.indices.astype(np.int16).reshape(*lead, stored // self.pattern.n, self.pattern.n, chunks)
        return (
            None if (np.diff(groups, axis=-2) > 0).all() else "indices hold rows that do not ascend within their group"
        )


def _dense_rows(indices: np.ndarray, pattern: Samoyeds) -> np.ndarray:
    """Dense row of each stored row in each chunk: ``(R, C)``."""
    return np.arange(indices.shape[0])[:, None] // pattern.n * pattern.m + indices


def _repeat_chunks(per_chunk: np.ndarray, length: int, total: int) -> np.ndarray:
    """One entry per chunk ``(R, C)`` -> one per element ``(R, total)``, each repeated ``length`` times."""
    return per_chunk[:, np.arange(total) // length]


def _chunk_sums(pairs: np.ndarray, length: int) -> np.ndarray:
    """Sum of every ``length`` consecutive columns of ``(rows, G)``: ``(rows, ⌈G/length⌉)``."""
    rows, groups = pairs.shape
    length = max(1, min(length, groups))
    chunks = -(-groups // length)
    padded = np.zeros((rows, chunks * length))
    padded[:, :groups] = pairs
    return ordered_sum(padded.reshape(rows, chunks, length))
