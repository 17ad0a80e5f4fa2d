"""The two metadata bits: positions of the kept columns <-> packed 16-bit words.

A 2:4 group keeps two of four columns, so each kept value needs a two-bit position. ``mma.sp`` and ``wgmma.sp`` want the
positions of a group in ascending order, the first in the low bits (PTX ISA, "Sparse matrix storage"). A word of the
canonical metadata holds four groups, the first in the low bits: 16 columns, 8 values, one ``uint16``.
"""

from __future__ import annotations

import numpy as np

GROUPS_PER_WORD = 4
COLUMNS_PER_WORD = 16

_SHIFT = 4 * np.arange(GROUPS_PER_WORD, dtype=np.uint16)  # of each group inside its word


def pack(positions: np.ndarray) -> np.ndarray:
    """Positions ``(..., G, 2)`` in 0..3, ascending in each pair, as words ``(..., G/4)`` uint16.

    >>> pack(np.array([[2, 3], [1, 3], [0, 2], [0, 3]], np.uint8))  # 0b1100_1000_1101_1110
    array([51422], dtype=uint16)
    """
    positions = positions.astype(np.uint16)
    nibbles = positions[..., 0] | positions[..., 1] << 2
    words = nibbles.reshape(*nibbles.shape[:-1], nibbles.shape[-1] // GROUPS_PER_WORD, GROUPS_PER_WORD) << _SHIFT
    return np.bitwise_or.reduce(words, axis=-1, dtype=np.uint16)


def unpack(words: np.ndarray) -> np.ndarray:
    """Words ``(..., W)`` uint16 as positions ``(..., 4W, 2)`` uint8: the inverse of :func:`pack`.

    >>> unpack(np.array([51422], np.uint16)).tolist()
    [[2, 3], [1, 3], [0, 2], [0, 3]]
    """
    nibbles = (words[..., None] >> _SHIFT) & 15
    pairs = np.stack([nibbles & 3, nibbles >> 2], axis=-1).astype(np.uint8)
    return pairs.reshape(*words.shape[:-1], words.shape[-1] * GROUPS_PER_WORD, 2)


def ascending(words: np.ndarray) -> np.ndarray:
    """Whether each word ``(..., W)`` holds four ascending pairs, as the hardware demands: bool ``(..., W)``.

    >>> ascending(np.array([51422, 0], np.uint16)).tolist()  # the word 0 says "column 0 twice"
    [True, False]
    """
    pairs = unpack(np.arange(1 << 16, dtype=np.uint16)[:, None])
    return (pairs[..., 0] < pairs[..., 1]).all(axis=-1)[words]
