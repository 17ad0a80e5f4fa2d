"""Writing arrays, sparse and dense, into one safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import NMSparseError
from ..formats import MixedExperts, SparseArray
from .schema import KEY, Entry, Mixture, encode
from .tensorfile import replacing, write_file


def save(
    path: str | PathLike[str],
    arrays: Mapping[str, SparseArray | MixedExperts | np.ndarray],
    metadata: Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write arrays to a safetensors file, which :func:`nmsparse.load` reads back bit for bit; returns its path.

    Sparse arrays are stored by their canonical buffers, dense ones as they are, experts of several patterns as an array
    for each; ``metadata`` is free text by key. The file appears under its name only when it is complete.

    Raises :class:`FileExistsError` where the file exists and ``overwrite`` is false, and
    :class:`~nmsparse.errors.NMSparseError` for names that collide or values that a safetensors file cannot hold.

    >>> import tempfile, numpy as np, nmsparse
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     nmsparse.save(folder + "/w.safetensors", {"w": np.eye(2)}).name
    'w.safetensors'
    """
    parts, mixtures = _taken_apart(arrays)
    tensors, entries = tensors_and_entries(parts)
    text = dict(metadata or {})
    if KEY in text or not all(isinstance(part, str) for pair in text.items() for part in pair):
        raise NMSparseError(f"metadata should map strings to strings and leave {KEY!r} to nmsparse, got {text!r}")
    path = Path(path)
    with replacing(path, overwrite) as temporary:
        write_file(temporary, tensors, text | {KEY: encode(entries, mixtures)})
    return path


def _taken_apart(arrays: Mapping[str, Any]) -> tuple[dict[str, SparseArray | np.ndarray], dict[str, Mixture]]:
    """Every array, experts of several patterns by their parts, and what these are the parts of."""
    parts: dict[str, SparseArray | np.ndarray] = {}
    mixtures: dict[str, Mixture] = {}
    for name, array in arrays.items():
        found = {name: array}
        if isinstance(array, MixedExperts):
            found = {f"{name}.{i}": weight for i, (_, weight) in enumerate(array.parts)}
            numbers = [part.numbers.tolist() for part in array.parts]
            mixtures[name] = Mixture(array.shape[0], dict(zip(found, numbers, strict=True)))
        for part in found:
            if part in parts or (part != name and part in arrays):
                raise NMSparseError(f"two arrays would both be named {part!r}; rename one of them")
        parts |= found
    return parts, mixtures


def tensors_and_entries(
    arrays: Mapping[str, SparseArray | np.ndarray],
) -> tuple[dict[str, np.ndarray], dict[str, Entry]]:
    """What a file holds for these arrays: the tensors to store, and the entries of its metadata."""
    tensors: dict[str, np.ndarray] = {}
    entries: dict[str, Entry] = {}
    for name, array in arrays.items():
        if not isinstance(name, str) or not name or name == "__metadata__":
            raise NMSparseError(f"an array needs a name (a string that is not empty or '__metadata__'), got {name!r}")
        if isinstance(array, SparseArray):
            parts = {f"{name}.{buffer}": value for buffer, value in array.buffers().items()}
            entries[name] = Entry(array.pattern, array.shape, array.dtype)
        elif isinstance(array, (np.ndarray, np.generic)):
            parts = {name: np.asarray(array)}
        else:
            raise NMSparseError(f"{name!r}: expected a sparse array or a NumPy array, got {type(array).__name__}")
        for part, value in parts.items():
            if part in tensors:
                raise NMSparseError(f"two arrays would both be stored as {part!r}; rename one of them")
            tensors[part] = value
    for name in entries:
        if name in tensors:
            raise NMSparseError(f"two arrays would both be named {name!r}; rename one of them")
    return tensors, entries
