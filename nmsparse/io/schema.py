"""How a sparse array is written into a safetensors file: its canonical buffers, and a line about it in the metadata.

Array ``w`` becomes the tensors ``w.values``, ``w.meta`` and, where its format has them, ``w.indices``. The file's text
metadata holds, under ``"nmsparse"``, JSON of this form::

    {"schema": 1, "arrays": {"w": {"format": "nm", "pattern": "2:4", "shape": [8, 64], "dtype": "bfloat16"}}}

Experts of several patterns are an array for each kind, ``w.0``, ``w.1``, sparse or dense, and one more entry beside
``"arrays"``, which says whose weights they are::

    "experts": {"w": {"count": 4, "parts": {"w.0": [0, 3], "w.1": [2]}}}
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..errors import NMSparseError
from ..formats import CLASSES
from ..formats.pattern import FORMATS, Pattern, parse
from .tensorfile import DTYPES, Tensor, parse_json

SCHEMA = 1
KEY = "nmsparse"
_FLOATS = {DTYPES[code].name: DTYPES[code] for code in ("F16", "BF16", "F32", "F64")}


@dataclass(frozen=True)
class Entry:
    """What the metadata says of one sparse array."""

    pattern: Pattern
    shape: tuple[int, ...]
    dtype: np.dtype

    def buffer_names(self, name: str) -> dict[str, str]:
        """Buffer -> name of the tensor that holds it."""
        layout, *_ = CLASSES[self.pattern.format]._layout(self.pattern, 0, 0)
        return {buffer: f"{name}.{buffer}" for buffer in layout}


@dataclass(frozen=True)
class Mixture:
    """What the metadata says of experts of several patterns: how many there are, and whose weights each array holds."""

    count: int
    parts: Mapping[str, list[int]]


def encode(entries: Mapping[str, Entry], mixtures: Mapping[str, Mixture] | None = None) -> str:
    """The text kept under ``"nmsparse"`` in the metadata of a file."""
    arrays = {
        name: {
            "format": entry.pattern.format,
            "pattern": str(entry.pattern),
            "shape": list(entry.shape),
            "dtype": entry.dtype.name,
        }
        for name, entry in entries.items()
    }
    experts = {"experts": {name: asdict(mixture) for name, mixture in mixtures.items()}} if mixtures else {}
    return json.dumps({"schema": SCHEMA, "arrays": arrays, **experts})


def decode_mixtures(path: Path, metadata: Mapping[str, str], names: Collection[str]) -> dict[str, Mixture]:
    """The experts of several patterns in a file with arrays of these ``names``; its schema has been checked."""
    if KEY not in metadata:
        return {}
    listed = parse_json(metadata[KEY], f"{path}: the {KEY!r} metadata").get("experts", {})
    if not isinstance(listed, dict):
        raise NMSparseError(f"{path}: expected an object 'experts' in the {KEY!r} metadata, got {listed!r}")
    mixtures = {}
    for name, fields in listed.items():
        where = f"{path}: experts {name!r}"
        count, parts = (fields.get(key) if isinstance(fields, dict) else None for key in ("count", "parts"))
        if type(count) is not int or not isinstance(parts, dict) or not parts:
            raise NMSparseError(f"{where}: expected an object with count and parts, got {fields!r}")
        for part, numbers in parts.items():
            if part not in names:
                raise NMSparseError(f"{where} lack their part {part!r}")
            if not isinstance(numbers, list) or not all(type(e) is int and 0 <= e < count for e in numbers):
                raise NMSparseError(f"{where}: part {part!r} should list numbers in 0..{count - 1}, got {numbers!r}")
        mixtures[name] = Mixture(count, parts)
    return mixtures


def decode(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    """The sparse arrays of a file, each checked to be known to this version and to have its buffers."""
    if KEY not in metadata:
        return {}
    where = f"{path}: the {KEY!r} metadata"
    found = parse_json(metadata[KEY], where)
    if found.get("schema") != SCHEMA:
        raise NMSparseError(
            f"{where} has schema version {found.get('schema')!r}, this nmsparse reads version {SCHEMA}; "
            f"upgrade nmsparse, or convert the weights again"
        )
    arrays = found.get("arrays")
    if not isinstance(arrays, dict):
        raise NMSparseError(f"{where} should hold an object 'arrays', got {arrays!r}")
    entries = {}
    for name, fields in arrays.items():
        entry = _entry(f"{path}: array {name!r}", fields)
        for buffer, tensor in entry.buffer_names(name).items():
            if tensor not in tensors:
                raise NMSparseError(f"{path}: array {name!r} lacks its buffer {buffer!r} (tensor {tensor!r})")
        stored = tensors[f"{name}.values"].dtype
        if stored != entry.dtype:
            raise NMSparseError(f"{path}: array {name!r} is declared {entry.dtype}, its values are {stored}")
        entries[name] = entry
    return entries


def _entry(where: str, fields: object) -> Entry:
    if not isinstance(fields, dict):
        raise NMSparseError(f"{where}: expected an object with format, pattern, shape and dtype, got {fields!r}")
    missing = [field for field in ("format", "pattern", "shape", "dtype") if field not in fields]
    if missing:
        raise NMSparseError(f"{where}: its metadata lacks {', '.join(missing)}")
    kind, shape, dtype = fields["format"], fields["shape"], fields["dtype"]
    if not isinstance(kind, str) or kind not in FORMATS:
        raise NMSparseError(f"{where}: unknown format {kind!r}; this nmsparse knows {', '.join(FORMATS)}")
    try:
        pattern = parse(fields["pattern"])
    except ValueError as error:
        raise NMSparseError(f"{where}: {error}") from None
    if pattern.format != kind:
        raise NMSparseError(f"{where}: format {kind!r} and pattern {str(pattern)!r} disagree")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise NMSparseError(f"{where}: shape should be a list of sizes, got {shape!r}")
    if not isinstance(dtype, str) or dtype not in _FLOATS:
        raise NMSparseError(f"{where}: unknown dtype {dtype!r}; expected one of {', '.join(_FLOATS)}")
    return Entry(pattern, tuple(shape), _FLOATS[dtype])
