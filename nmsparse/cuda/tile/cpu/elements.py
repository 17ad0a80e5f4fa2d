"""The NumPy twin of :mod:`~nmsparse.cuda.tile.gpu.elements`: a word is one equation on all threads of a launch at once.

A register is an array with an entry for each thread, memory an array of bytes. What the GPU would do silently raises:
an access outside its array, two threads that store to one place, an address that is not a multiple of its size.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

__all__ = ["Memory", "run"]

DTYPES = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}


class Memory:
    """The bytes of an array, and which of them a kernel has stored."""

    def __init__(self, array: np.ndarray):
        self.bytes = array.reshape(-1).view(np.uint8)
        self.stored = np.zeros(self.bytes.size, bool)

    def _places(self, at: np.ndarray, size: int) -> np.ndarray:
        at = np.asarray(at, np.int64)
        assert (at % size == 0).all(), f"an address that is not a multiple of {size}"
        assert ((at >= 0) & (at + size <= self.bytes.size)).all(), "an access outside the array"
        return at[:, None] + np.arange(size)

    def load(self, at: np.ndarray, size: int, inside: np.ndarray) -> np.ndarray:
        """``size`` bytes a thread; zeros where not inside."""
        found = np.zeros((len(inside), size), np.uint8)
        found[inside] = self.bytes[self._places(at[inside], size)]
        return found

    def store(self, at: np.ndarray, data: np.ndarray, inside: np.ndarray) -> None:
        """The bytes of ``data`` of the threads that are inside."""
        rows = np.ascontiguousarray(data).reshape(len(data), -1).view(np.uint8)
        places = self._places(at[inside], rows.shape[1])
        assert not self.stored[places].any() and np.unique(places).size == places.size, "a place was stored twice"
        self.stored[places] = True
        self.bytes[places] = rows[inside]


def run(make_kernel: Any, cfg: Any, grid: int, *arguments: Any, words: Any = None) -> None:
    """Launch a kernel text on ``grid`` blocks of ``cfg.threads``; arrays among the arguments are its memory.

    ``words(cfg, grid)`` makes the vocabulary, :func:`make` if not given.
    """
    arguments = tuple(Memory(a) if isinstance(a, np.ndarray) else a for a in arguments)
    make_kernel((words or make)(cfg, grid), cfg)(*arguments)


def make(cfg: Any, grid: int) -> SimpleNamespace:
    """The words for ``cfg`` and a launch of ``grid`` blocks."""
    thread = np.arange(grid * cfg.threads)

    def place():
        return thread >> 7, thread >> 5 & 3, thread >> 2 & 7, thread & 3

    def unravel(block, row_blocks, k_blocks):
        return block // k_blocks // row_blocks, block // k_blocks % row_blocks, block % k_blocks

    def load_16(gmem, at, inside):
        return tuple(gmem.load(at, 16, inside).view(np.uint32).T)

    def load_2(gmem, at, inside, otherwise):
        return np.where(inside, gmem.load(at, 2, inside).view(np.uint16)[:, 0], otherwise).astype(np.uint32)

    def store_16(gmem, at, piece, inside):
        gmem.store(at, np.stack(piece, axis=1), inside)

    def store_4(gmem, at, word, inside):
        gmem.store(at, word, inside)

    def store_2(gmem, at, word, inside):
        gmem.store(at, word.astype(np.uint16), inside)

    def load_columns(gmem, index, left):
        if cfg.aligned:
            assert ((left <= 0) | (left >= 8)).all(), "a piece that exists in part"
            return load_16(gmem, index * 2, left >= 8)
        columns = [load_2(gmem, (index + i) * 2, left > i, 0) for i in range(8)]
        return tuple(low | high << np.uint32(16) for low, high in zip(columns[::2], columns[1::2], strict=True))

    def store_columns(gmem, index, piece, left):
        if cfg.aligned:
            assert ((left <= 0) | (left >= 8)).all(), "a piece that exists in part"
            store_16(gmem, index * 2, piece, left >= 8)
        else:
            for i in range(8):
                store_2(gmem, (index + i) * 2, piece[i // 2] >> np.uint32(16 * (i % 2)), left > i)

    def four(low, high):
        return np.stack([low, high], axis=1).view(np.uint16)

    def keep_two(low, high):
        numbers = four(low, high)
        size = np.abs(numbers.view(DTYPES[cfg.dtype]).astype(np.float32))
        order = np.argsort(-np.where(np.isnan(size), np.inf, size), axis=1, kind="stable")
        positions = np.sort(order[:, :2], axis=1)
        kept = np.ascontiguousarray(np.take_along_axis(numbers, positions, axis=1)).view(np.uint32)[:, 0]
        return kept, (positions[:, 0] | positions[:, 1] << 2).astype(np.uint32)

    def spread(pair, word, group):
        numbers = np.zeros((len(pair), 4), np.uint16)
        positions = np.stack([word >> 4 * group & 3, word >> 4 * group + 2 & 3], axis=1).astype(np.int64)
        np.put_along_axis(numbers, positions, np.ascontiguousarray(pair)[:, None].view(np.uint16), axis=1)
        return tuple(numbers.view(np.uint32).T)

    def word(p, q, r, s):
        return p | q << 4 | r << 8 | s << 12

    def halves(p, q):
        return (p | q << 16).astype(np.uint32)

    return SimpleNamespace(
        place=place,
        unravel=unravel,
        load_16=load_16,
        load_2=load_2,
        store_16=store_16,
        store_4=store_4,
        store_2=store_2,
        load_columns=load_columns,
        store_columns=store_columns,
        keep_two=keep_two,
        spread=spread,
        word=word,
        halves=halves,
        choose=np.where,
        inline=lambda function: function,
    )
