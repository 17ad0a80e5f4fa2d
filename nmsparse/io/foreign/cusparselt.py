"""2:4 as cuSPARSELt packs it on Hopper: the ``packed`` tensor of ``torch.sparse.SparseSemiStructuredTensorCUSPARSELT``.

The values come first, row by row: that torch documents. The metadata behind them NVIDIA does not document, and says it
may change (CUDALibrarySamples issue 167). What is read here is the order that others found for 16-bit weights on
compute capability 9.x (FlagGems pull request 5281, checked there against the library for 15 sizes): tiles of 64 rows by
32 columns, 512 four-bit codes each. Other architectures pack in another order, which is read without an error, since a
code says nothing about its place: compare a product where the origin of a weight is not certain.
"""

from __future__ import annotations

import numpy as np

from ...formats import NMArray, metadata
from .expect import expect, expect_multiples


def from_cusparselt(packed: np.ndarray, shape: tuple[int, int]) -> NMArray:
    """The 2:4 array of ``packed``, what ``torch._cslt_compress`` returned on Hopper for a 16-bit weight of ``shape``.

    M is a multiple of 16 and K of 16. Raises :class:`~nmsparse.errors.NMSparseError` for a size that does not fit and
    for positions that are none.
    """
    rows, columns = expect_multiples("from_cusparselt", shape, 16, 16)
    raw = np.ascontiguousarray(packed).reshape(-1)
    kept, nibbles = rows * columns // 2, _places(rows, columns // 4)
    needed = kept + int(nibbles.max(initial=-1)) // 4 + 1
    if raw.itemsize != 2 or raw.size < needed:
        expect("from_cusparselt", "packed", raw, (needed,), np.float16)
    words = raw[kept:].view(np.uint16)
    codes = words[nibbles // 4] >> (nibbles % 4 * 4).astype(np.uint16) & 15
    positions = np.stack([codes & 3, codes >> 2], axis=-1)
    return NMArray.from_buffers(raw[:kept].reshape(rows, -1), metadata.pack(positions), shape=(rows, columns))


def _places(rows: int, groups: int) -> np.ndarray:
    """Which four-bit code is that of each row and group of four columns: int64 ``(rows, groups)``."""
    row, group = np.arange(rows)[:, None], np.arange(groups)
    tile = row // 64 * -(-groups // 8) + group // 8
    # Inside a tile of 64 x 8: halves of 32 rows; there two halves of 16; there 8 rows of 16 codes, in which the
    # groups stand 0 4 1 5 2 6 3 7, each for this row and the one 8 below.
    row, group = row % 64, group % 8
    return (
        512 * tile
        + row // 32 * 256
        + row // 16 % 2 * 128
        + row % 8 * 16
        + group % 4 * 4
        + group // 4 * 2
        + row // 8 % 2
    )
