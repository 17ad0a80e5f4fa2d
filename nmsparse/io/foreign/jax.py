"""2:4 of JAX's former ``jax.experimental.sparse.nm``: kept values, and the words of ``nm_pack``.

``nm_pack`` writes the positions of kept elements as digits in base 4, the first in the lowest digit, eight to a uint16;
rows are not reordered. These are our words: only the checks are left to do. (jax-ml/jax, ``jax/experimental/sparse/
nm.py`` of 2025; removed in 2026.)
"""

from __future__ import annotations

import numpy as np

from ...formats import NMArray
from .expect import expect, expect_multiples


def from_jax(values: np.ndarray, metadata: np.ndarray, shape: tuple[int, int]) -> NMArray:
    """The 2:4 array of the sparse operand of ``nm_spmm`` (M, K/2), K minor, and its metadata uint16 (M, K/16).

    >>> words = np.array([[0b1110_1101_1001_0100]], np.uint16)
    >>> from_jax(np.arange(1, 9, dtype=np.float16)[None], words, (1, 16)).todense()[0].astype(int).tolist()
    [1, 2, 0, 0, 0, 3, 4, 0, 0, 5, 0, 6, 0, 0, 7, 8]
    """
    who = "from_jax"
    rows, columns = expect_multiples(who, shape, 1, 16)
    held = expect(who, "values", values, (rows, columns // 2))
    words = expect(who, "metadata", metadata, (rows, columns // 16), np.uint16)
    return NMArray.from_buffers(held, words, shape=(rows, columns))
