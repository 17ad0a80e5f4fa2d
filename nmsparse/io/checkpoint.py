"""Reading: a checkpoint as a lazy mapping from names to arrays, sparse or dense, over one file or many."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np

from ..errors import NMSparseError
from ..formats import MixedExperts, SparseArray, from_buffers
from .schema import KEY, Entry, Mixture, decode, decode_mixtures
from .tensorfile import Tensor, parse_json, read_header

INDEX = "nmsparse.safetensors.index.json"
_INDICES = (INDEX, "model.safetensors.index.json")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class ArrayInfo:
    """What is known of an array before it is read; a dense one has no ``pattern``. ``stored`` counts its values."""

    name: str
    pattern: str | None
    format: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    stored: int

    @property
    def density(self) -> float:
        """Stored values per element of the shape: values in padding count, so it can exceed the pattern's."""
        size = math.prod(self.shape)
        return self.stored / size if size else 0.0


class Checkpoint(Mapping[str, "SparseArray | MixedExperts | np.ndarray"]):
    """The arrays of a safetensors checkpoint by name; each is read when it is asked for, and not kept.

    ``path`` is a ``.safetensors`` file, an ``.index.json``, or a directory with one of the two: written by
    :func:`nmsparse.save` or ``nmsparse convert``, or any from Hugging Face. Opening reads and checks every header, no
    data. Sparse arrays come back as the class that was saved, after a full check of their buffers.

    Raises :class:`~nmsparse.errors.NMSparseError` for a damaged or unknown checkpoint, naming the file, and
    :class:`FileNotFoundError` where there is none.

    >>> import tempfile, numpy as np, nmsparse
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = nmsparse.save(folder + "/w.safetensors", {"bias": np.zeros(3, np.float32)})
    ...     checkpoint = Checkpoint(folder + "/w.safetensors")
    ...     list(checkpoint), checkpoint["bias"].shape
    (['bias'], (3,))
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        self.metadata: dict[str, str] = {}
        self.tensors: dict[str, Tensor] = {}
        self._entries: dict[str, Entry] = {}
        self._mixtures: dict[str, Mixture] = {}
        for file, wanted in _files(self.path).items():
            self._add(file, wanted)
        self.metadata.pop(KEY, None)
        buffers = {part for name, entry in self._entries.items() for part in entry.buffer_names(name).values()}
        dense = [name for name in self.tensors if name not in buffers]
        for name in dense:
            if name in self._entries:
                raise NMSparseError(f"{self.path}: {name!r} names both a sparse array and a dense tensor")
        parts = {part for mixture in self._mixtures.values() for part in mixture.parts}
        for name in self._mixtures:
            if name in self._entries or name in self.tensors:
                raise NMSparseError(f"{self.path}: {name!r} names both experts of several patterns and an array")
        arrays = [name for name in (*self._entries, *dense) if name not in parts]
        self._names = dict.fromkeys([*self._mixtures, *arrays])

    def _add(self, file: Path, wanted: list[str] | None) -> None:
        tensors, metadata = read_header(file)
        entries = decode(file, metadata, tensors)
        mixtures = decode_mixtures(file, metadata, {*entries, *tensors})
        if wanted is not None:
            missing = [name for name in wanted if name not in tensors]
            if missing:
                raise NMSparseError(
                    f"{file}: tensor {missing[0]!r} is not in this shard, though {self.path} lists it here"
                )
            tensors = {name: tensors[name] for name in wanted}
            entries = {name: entry for name, entry in entries.items() if self._listed(file, name, entry, tensors)}
        self.metadata.update(metadata)
        self.tensors.update(tensors)
        self._entries.update(entries)
        held = {*entries, *tensors}
        self._mixtures |= {name: mixture for name, mixture in mixtures.items() if held.issuperset(mixture.parts)}

    def _listed(self, file: Path, name: str, entry: Entry, tensors: Mapping[str, Tensor]) -> bool:
        absent = [part for part in entry.buffer_names(name).values() if part not in tensors]
        if absent and len(absent) < len(entry.buffer_names(name)):
            raise NMSparseError(
                f"{self.path}: the index does not list tensor {absent[0]!r} of array {name!r} in {file.name}"
            )
        return not absent

    def __getitem__(self, name: str) -> SparseArray | MixedExperts | np.ndarray:
        self._require(name)
        if name in self._mixtures:
            mixture = self._mixtures[name]
            parts = [(numbers, self._array(part)) for part, numbers in mixture.parts.items()]
            try:
                return MixedExperts(parts, mixture.count)
            except NMSparseError as error:
                raise NMSparseError(f"{self.path}: experts {name!r}: {error}") from None
        return self._array(name)

    def _array(self, name: str) -> SparseArray | np.ndarray:
        if name in self._entries:
            return self._sparse(name, self._entries[name])
        return self.tensors[name].read()

    def _sparse(self, name: str, entry: Entry) -> SparseArray:
        parts = {buffer: self.tensors[tensor] for buffer, tensor in entry.buffer_names(name).items()}
        try:
            return from_buffers(entry.pattern, {buffer: part.read() for buffer, part in parts.items()}, entry.shape)
        except NMSparseError as error:
            raise NMSparseError(f"{parts['values'].path}: array {name!r}: {error}") from None

    def _require(self, name: str) -> None:
        if name not in self._names:
            import difflib

            close = difflib.get_close_matches(str(name), self._names, 3)
            hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise KeyError(f"{self.path} holds no array {name!r}{hint}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def describe(self, name: str) -> ArrayInfo:
        """Name, pattern, dtype, shape and sizes of an array, from the headers alone."""
        self._require(name)
        if name not in self._mixtures:
            return self._describe(name)
        mixture = self._mixtures[name]
        parts = [self._describe(part) for part in mixture.parts]
        kinds, shape = " + ".join(part.pattern or "dense" for part in parts), (mixture.count, *parts[0].shape[1:])
        nbytes, stored = (sum(getattr(part, count) for part in parts) for count in ("nbytes", "stored"))
        return ArrayInfo(name, kinds, "mixed", parts[0].dtype, shape, nbytes, stored)

    def _describe(self, name: str) -> ArrayInfo:
        entry = self._entries.get(name)
        if entry is None:
            tensor = self.tensors[name]
            return ArrayInfo(
                name, None, "dense", _dtype_name(tensor), tensor.shape, tensor.nbytes, math.prod(tensor.shape)
            )
        nbytes = sum(self.tensors[tensor].nbytes for tensor in entry.buffer_names(name).values())
        stored = math.prod(self.tensors[f"{name}.values"].shape)
        return ArrayInfo(name, str(entry.pattern), entry.pattern.format, entry.dtype.name, entry.shape, nbytes, stored)

    @property
    def sparse_names(self) -> list[str]:
        """Arrays that are sparse, or have sparse parts."""
        return [name for name in self._names if name in self._entries or name in self._mixtures]

    def __repr__(self) -> str:
        sparse = len(self.sparse_names)
        return f"Checkpoint({str(self.path)!r}, {sparse} sparse and {len(self) - sparse} dense arrays)"


def load(
    path: str | PathLike[str], select: str | Callable[[str], bool] | None = None
) -> dict[str, SparseArray | MixedExperts | np.ndarray]:
    """Read all arrays of a checkpoint (see :class:`Checkpoint`), or those that ``select`` chooses.

    ``select`` is a prefix of the names, or a function from a name to whether to read it.

    >>> import tempfile, numpy as np, nmsparse
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = nmsparse.save(folder + "/w.safetensors", {"a.x": np.ones(2), "b.x": np.ones(3)})
    ...     nmsparse.load(folder + "/w.safetensors", select="a.")
    {'a.x': array([1., 1.])}
    """
    if not (select is None or isinstance(select, str) or callable(select)):
        raise NMSparseError(f"select: expected a prefix or a function of a name, got {type(select).__name__}")
    checkpoint = Checkpoint(path)
    chosen = select if callable(select) else lambda name: name.startswith(select or "")
    return {name: checkpoint[name] for name in checkpoint if chosen(name)}


def _dtype_name(tensor: Tensor) -> str:
    try:
        return tensor.dtype.name
    except NMSparseError:
        return tensor.code


def _files(path: Path) -> dict[Path, list[str] | None]:
    """The files of a checkpoint, each with the tensors to take from it (None: all)."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or directory")
    if path.is_dir():
        path = _main_file(path)
    if path.name.endswith(".index.json"):
        return _shards(path)
    if path.suffix in _PICKLED:
        raise NMSparseError(_pickled(path))
    return {path: None}


def _main_file(directory: Path) -> Path:
    indices = sorted(directory.glob("*.safetensors.index.json"))
    files = sorted(directory.glob("*.safetensors"))
    for name in _INDICES:
        if directory / name in indices:
            return directory / name
    if len(indices) == 1:
        return indices[0]
    if indices:
        raise NMSparseError(
            f"{directory} holds several indices ({', '.join(p.name for p in indices)}): name one of them"
        )
    if directory / "model.safetensors" in files:
        return directory / "model.safetensors"
    if len(files) == 1:
        return files[0]
    if files:
        raise NMSparseError(
            f"{directory} holds {len(files)} safetensors files and no *.safetensors.index.json: name one file"
        )
    pickled = [file for file in sorted(directory.iterdir()) if file.suffix in _PICKLED]
    raise NMSparseError(_pickled(pickled[0]) if pickled else f"{directory} holds no safetensors checkpoint")


def _pickled(path: Path) -> str:
    return (
        f"{path} is a pickled checkpoint, which nmsparse never opens (loading one can run any code); "
        f"save the model as safetensors first, as with model.save_pretrained(..., safe_serialization=True)"
    )


def _shards(index: Path) -> dict[Path, list[str] | None]:
    weight_map = parse_json(index.read_bytes(), f"{index}:").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise NMSparseError(f"{index}: expected an object 'weight_map' from tensor names to files, got {weight_map!r}")
    shards: dict[Path, list[str] | None] = {}
    for name, file in weight_map.items():
        # A plain file name beside the index, so that an index cannot reach out of its directory.
        if not isinstance(file, str) or not file or file in (".", "..") or any(c in file for c in "/\\\0"):
            raise NMSparseError(
                f"{index}: tensor {name!r} lies in {file!r}; expected the name of a file beside the index"
            )
        shards.setdefault(index.parent / file, []).append(name)
    for shard in shards:
        if not shard.exists():
            raise FileNotFoundError(
                f"{shard}: no such file, though {index.name} lists it; download the checkpoint again"
            )
    return shards
