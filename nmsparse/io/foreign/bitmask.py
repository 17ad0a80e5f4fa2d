"""compressed-tensors' ``sparse-24-bitmask``: the kept values, and one bit for each element of the dense weight.

A weight ``name.weight`` is stored as ``name.compressed`` (M, K/2), ``name.bitmask`` uint8 (M, K/8), first column in the
lowest bit, and ``name.shape`` (2, 1) int64 (compressed-tensors 0.9, ``sparse_24_bitmask.py``; vLLM and llm-compressor
dropped the format in 2026, the checkpoints remain).
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike

import numpy as np

from ...errors import NMSparseError
from ...formats import NMArray, metadata
from ..checkpoint import Checkpoint
from .expect import expect, expect_multiples


def from_bitmask(compressed: np.ndarray, bitmask: np.ndarray, shape: tuple[int, int]) -> NMArray:
    """The 2:4 array of kept values and their bitmask. M is any size, K a multiple of 16.

    Raises :class:`~nmsparse.errors.NMSparseError` for buffers that do not fit, and for a group of four without exactly
    two bits.

    >>> from_bitmask(np.ones((1, 8), np.float16), np.array([[0x53, 0xCA]], np.uint8), (1, 16)).todense()[0].tolist()
    [1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    """
    who = "from_bitmask"
    rows, columns = expect_multiples(who, shape, 1, 16)
    values = expect(who, "compressed", compressed, (rows, columns // 2))
    bits = np.unpackbits(expect(who, "bitmask", bitmask, (rows, columns // 8), np.uint8), axis=-1, bitorder="little")
    groups = bits.reshape(rows, columns // 4, 4)
    if (wrong := np.argwhere(groups.sum(-1) != 2)).size:
        row, group = map(int, wrong[0])
        raise NMSparseError(
            f"{who}: expected two bits in each group of four, got {groups[row, group].tolist()} at row {row}, "
            f"columns {4 * group}..{4 * group + 3}; the bitmask is corrupt or of another pattern"
        )
    positions = np.argsort(groups == 0, axis=-1, kind="stable")[..., :2]
    return NMArray.from_buffers(values, metadata.pack(positions), shape=(rows, columns))


def read_bitmask_checkpoint(path: str | PathLike[str]) -> Mapping[str, NMArray]:
    """All ``sparse-24-bitmask`` weights of a safetensors checkpoint, by the name of the dense weight.

    The other tensors of it are :class:`nmsparse.io.Checkpoint`'s to read.
    """
    checkpoint = Checkpoint(path)
    found = {}
    for name in checkpoint:
        if name.endswith(".bitmask"):
            stem = name.removesuffix(".bitmask")
            missing = [part for part in ("compressed", "shape") if f"{stem}.{part}" not in checkpoint]
            if missing:
                raise NMSparseError(f"{path}: {name} comes without {stem}.{missing[0]}; the checkpoint is not complete")
            shape = tuple(int(size) for size in np.asarray(checkpoint[f"{stem}.shape"]).reshape(-1))
            found[f"{stem}.weight"] = from_bitmask(checkpoint[f"{stem}.compressed"], checkpoint[name], shape)
    return found
