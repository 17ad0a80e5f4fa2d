"""2:4 as torch keeps it for CUTLASS: ``torch.sparse.SparseSemiStructuredTensorCUTLASS`` of 16-bit weights.

The two positions of a group are four bits, low position first, four groups in an int16: our words. What differs is
their order in memory, which is the one that ``mma.sp`` kernels of CUTLASS load: ``reorder_meta`` in CUTLASS
(tools/util/include/cutlass/util/host_reorder.h), stored as ``ColumnMajorInterleaved<2>``.
"""

from __future__ import annotations

import numpy as np

from ...formats import NMArray
from .expect import expect, expect_multiples


def from_cutlass(packed: np.ndarray, meta: np.ndarray, shape: tuple[int, int]) -> NMArray:
    """The 2:4 array of ``packed`` (M, K/2) and ``meta`` (M, K/16) int16: attributes of the torch tensor.

    M is a multiple of 32 and K of 16, as CUTLASS asks. Raises :class:`~nmsparse.errors.NMSparseError` for other sizes
    and for positions that are none.

    >>> A = NMArray.random((32, 64), dtype=np.float16, rng=0)
    >>> reordered = np.empty(32 * 4, np.int16)
    >>> reordered[places(32, 4)] = A.meta.view(np.int16)
    >>> np.array_equal(from_cutlass(A.values, reordered.reshape(32, 4), (32, 64)).todense(), A.todense())
    True
    """
    who = "from_cutlass"
    rows, columns = expect_multiples(who, shape, 32, 16)
    values = expect(who, "packed", packed, (rows, columns // 2))
    words = expect(who, "meta", meta, (rows, columns // 16), np.int16, np.uint16).view(np.uint16)
    return NMArray.from_buffers(values, words.reshape(-1)[places(rows, columns // 16)], shape=(rows, columns))


def places(rows: int, words: int) -> np.ndarray:
    """Where the word of each row and column of words lies: int64 ``(rows, words)``."""
    row, column = np.arange(rows)[:, None], np.arange(words)
    # Of 32 rows, the four that are 8 apart come next to each other.
    row = row // 32 * 32 + row % 8 * 4 + row % 32 // 8
    # Of each 2 x 2 words, the two off the diagonal change places.
    above, below = (row % 2 == 0) & (column % 2 == 1), (row % 2 == 1) & (column % 2 == 0)
    shift = above.astype(int) - below
    row, column = row + shift, column - shift
    # Two columns of words at a time, row by row.
    return column // 2 * 2 * rows + 2 * row + column % 2
