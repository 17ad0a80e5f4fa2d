"""One safetensors file: where each tensor lies, reading one at a time, and writing a whole file at once.

The ``safetensors`` package validates every file and writes ours. Tensor bytes are read here, by offset, because its
NumPy reader knows no 8-bit floats; so every dtype comes through bit for bit.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..errors import NMSparseError, require

# The dtype code of the file format -> NumPy's dtype. Sub-byte floats have a code but no array dtype here.
DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies: file, dtype code of the format, shape, and its bytes."""

    path: Path
    name: str
    code: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def dtype(self) -> np.dtype:
        if self.code not in DTYPES:
            raise NMSparseError(f"{self.path}: tensor {self.name!r} has dtype {self.code}, which NumPy cannot hold")
        return DTYPES[self.code]

    def read(self, index: int | None = None) -> np.ndarray:
        """The tensor, or its part ``[index]``, as an array that owns its memory; nothing else is read."""
        shape, offset = self.shape, self.offset
        if index is not None:
            shape = shape[1:]
            offset += index * math.prod(shape) * self.dtype.itemsize
        count = math.prod(shape)
        array = np.fromfile(self.path, self.dtype, count, offset=offset)
        if array.size != count:
            raise NMSparseError(f"{self.path}: the file ends inside tensor {self.name!r}; it changed while it was read")
        try:
            return array.reshape(shape)
        except ValueError as error:  # an empty array with one absurd size
            raise NMSparseError(f"{self.path}: tensor {self.name!r} has shape {shape}: {error}") from None

    def bytes(self) -> np.ndarray:
        """The raw bytes, mapped into memory rather than read."""
        if self.nbytes == 0:
            return np.empty(0, np.uint8)
        return np.memmap(self.path, np.uint8, mode="r", offset=self.offset, shape=(self.nbytes,))


def read_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file by name, and its free text metadata; the header is read, the data is not.

    Raises :class:`~nmsparse.errors.NMSparseError` where the file is not one, or is damaged.
    """
    _validate(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(length), f"{path}: the header")
    metadata = header.pop("__metadata__", None) or {}
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = Tensor(path, name, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
    return tensors, metadata


def _validate(path: Path) -> None:
    safetensors = require("safetensors", "hf")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file():
        raise NMSparseError(f"{path}: expected a safetensors file, this is no regular file")
    try:
        with safetensors.safe_open(path, "np"):
            pass
    except safetensors.SafetensorError as error:
        raise NMSparseError(
            f"{path}: not a safetensors file, or a damaged or truncated one ({error}); copy or download it again"
        ) from None


def parse_json(text: str | bytes, what: str) -> dict[str, Any]:
    """A JSON object in which no name occurs twice; ``what`` begins the message of any error."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise NMSparseError(f"{what} holds the name {twice!r} twice")
        return found

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except NMSparseError:
        raise
    except (ValueError, RecursionError) as error:
        raise NMSparseError(f"{what} is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise NMSparseError(f"{what} should be a JSON object, got {type(value).__name__}")
    return value


def write_file(path: Path, tensors: Mapping[str, np.ndarray | Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file; a :class:`Tensor` is copied from its file bit for bit, not read into memory."""
    safetensors = require("safetensors", "hf")
    specs, alive = {}, []
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            data, dtype, shape = tensor.bytes(), tensor.dtype, tensor.shape
        else:
            data = np.ascontiguousarray(tensor, dtype=tensor.dtype.newbyteorder("<")).reshape(tensor.shape)
            dtype, shape = data.dtype, data.shape
        if dtype not in CODES:
            raise NMSparseError(f"{name!r} has dtype {dtype}, which a safetensors file cannot hold; convert it first")
        alive.append(data)
        specs[name] = safetensors.TensorSpec(
            dtype=dtype.name, shape=shape, data_ptr=data.ctypes.data, data_len=data.nbytes
        )
    path.touch()
    mode = path.stat().st_mode
    try:
        safetensors.serialize_file(specs, path, metadata=metadata)
    except safetensors.SafetensorError as error:
        raise OSError(f"{path}: could not be written ({error})") from error
    path.chmod(mode)  # safetensors makes files that only their owner can read


@contextmanager
def replacing(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary name beside ``path`` that takes its place when the block ends well, and vanishes when it does not."""
    refuse_existing(path, overwrite)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such directory to write {path.name!r} in")
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        yield temporary
        refuse_existing(path, overwrite)
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def refuse_existing(path: Path, overwrite: bool = False) -> None:
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(f"{path} already exists; remove it or choose another name")
