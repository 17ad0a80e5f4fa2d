"""Converting the experts of a Hugging Face checkpoint to a sparse format, one expert matrix in memory at a time."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from .. import ops
from ..errors import NMSparseError
from ..formats import Pattern, SparseArray, parse
from .checkpoint import INDEX, Checkpoint
from .layouts import Experts, find_experts, natural_order
from .schema import KEY, SCHEMA, Entry, encode
from .tensorfile import DTYPES, Tensor, parse_json, refuse_existing, write_file

VALUE_DTYPES = {"keep": None, "float16": DTYPES["F16"], "bfloat16": DTYPES["BF16"], "float32": DTYPES["F32"]}
ROUNDING = 1e-13  # relative difference of two float64 sums of the same numbers in different orders
# Small files that belong to a model: config, tokenizer, code, licence. Weights are rewritten, the rest stays behind.
_SIDE_FILES = re.compile(
    r"(?!.*\.index\.json$).+\.(json|jinja|model|tiktoken|txt|md|py)|LICEN[CS]E.*|NOTICE.*", re.IGNORECASE
)


@dataclass
class LayerReport:
    """What the conversion did to the experts of one layer, or of all.

    ``error`` is the relative Frobenius error of pruning, |w - pruned| / |w|, over all matrices together; the rounding
    of a change of dtype is not in it.
    """

    name: str
    experts: int
    gate_up: tuple[int, int]
    down: tuple[int, int]
    elements: int = 0
    stored: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    squares: float = 0.0
    squares_kept: float = 0.0

    def add(self, w: np.ndarray, packed: SparseArray) -> None:
        self.elements += w.size
        self.stored += packed.nnz
        self.bytes_before += w.nbytes
        self.squares += _sum_of_squares(w)
        self.squares_kept += _sum_of_squares(packed.values)

    @property
    def density(self) -> float:
        return self.stored / self.elements if self.elements else 0.0

    @property
    def error(self) -> float:
        if not self.squares:
            return 0.0
        # Kept values are unchanged, so what is lost is the difference of the squares; two orders of summation leave
        # a difference that is none.
        lost = 1 - self.squares_kept / self.squares
        return 0.0 if lost < ROUNDING else math.sqrt(lost)


@dataclass
class Conversion:
    """What :func:`convert` wrote: ``layers`` has a report for each layer with experts."""

    path: Path
    pattern: Pattern
    layers: list[LayerReport] = field(default_factory=list)
    dense_bytes: int = 0

    @property
    def total(self) -> LayerReport:
        """The layers as one; ``gate_up`` and ``down`` are those of the first."""
        first, *others = self.layers
        total = replace(first, name="total")
        for layer in others:
            total.experts += layer.experts
            for counter in ("elements", "stored", "bytes_before", "bytes_after", "squares", "squares_kept"):
                setattr(total, counter, getattr(total, counter) + getattr(layer, counter))
        return total


@dataclass
class _Shard:
    """What goes into one file: the experts of a layer, and its other tensors."""

    experts: list[Experts] = field(default_factory=list)
    rest: list[Tensor] = field(default_factory=list)


def convert(
    source: str | PathLike[str],
    target: str | PathLike[str],
    pattern: str | Pattern,
    *,
    experts_only: bool = False,
    dtype: str = "keep",
    on_start: Callable[[int], None] | None = None,
    on_matrix: Callable[[], None] | None = None,
    on_layer: Callable[[LayerReport], None] | None = None,
) -> Conversion:
    """Write a copy of a Mixture-of-Experts checkpoint whose experts are sparse; :func:`nmsparse.load` reads it.

    ``source`` is a directory in the Hugging Face layout (``config.json`` and safetensors, sharded or not). In
    ``target``, a new directory, the experts of a layer are two stacked arrays: ``<module>.experts.gate_up_proj``
    (E, 2I, H), the rows of the gate first, and ``<module>.experts.down_proj`` (E, H, I), pruned by magnitude to
    ``pattern``. All else is copied bit for bit, or left out with ``experts_only``. ``dtype`` is that of the kept
    values: "keep", "float16", "bfloat16" or "float32". The callbacks follow the work: ``on_start`` gets the number of
    matrices, ``on_matrix`` is called after each, ``on_layer`` gets the report of each layer.

    One layer's packed experts and one dense expert are in memory at a time. ``target`` appears when it is complete.

    Raises :class:`~nmsparse.errors.NMSparseError` for a checkpoint that cannot be converted, and
    :class:`FileExistsError` where ``target`` exists.
    """
    pattern, source, target = parse(pattern), Path(source), Path(target)
    if dtype not in VALUE_DTYPES:
        raise NMSparseError(f"dtype: expected one of {', '.join(VALUE_DTYPES)}, got {dtype!r}")
    refuse_existing(target)
    config = read_config(source)
    checkpoint = Checkpoint(source)
    if checkpoint.sparse_names:
        raise NMSparseError(
            f"{source} is converted already: {checkpoint.sparse_names[0]!r} is sparse; start from the dense model"
        )
    experts = find_experts(checkpoint.tensors, config)
    shards = _plan(checkpoint, experts, experts_only)
    if on_start:
        on_start(sum(2 * layer.count for layer in experts))
    conversion = Conversion(target, pattern)
    weight_map: dict[str, str] = {}
    with building(target) as folder:
        for number, shard in enumerate(shards, 1):
            file = f"nmsparse-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors: dict[str, np.ndarray | Tensor] = {tensor.name: tensor for tensor in shard.rest}
            entries: dict[str, Entry] = {}
            reports = []
            for layer in shard.experts:
                reports.append(_pack_layer(layer, pattern, dtype, tensors, entries, on_matrix))
            write_file(folder / file, tensors, {KEY: encode(entries)})
            weight_map |= dict.fromkeys(tensors, file)
            conversion.dense_bytes += sum(tensor.nbytes for tensor in shard.rest)
            conversion.layers += reports
            for report in reports if on_layer else ():
                on_layer(report)
        size = conversion.total.bytes_after + conversion.dense_bytes
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
        copy_side_files(source, folder)
        summary = {"schema": SCHEMA, "pattern": str(pattern), "experts_only": experts_only}
        write_json(folder / "config.json", {**config, KEY: summary})
    return conversion


def read_config(source: Path) -> dict[str, Any]:
    if not source.is_dir():
        kind = "no directory" if source.exists() else "no such directory"
        raise FileNotFoundError(
            f"{source}: {kind}; convert takes a checkpoint directory with config.json and safetensors"
        )
    path = source / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a Hugging Face checkpoint has one beside its weights")
    return parse_json(path.read_bytes(), f"{path}:")


def _plan(checkpoint: Checkpoint, experts: list[Experts], experts_only: bool) -> list[_Shard]:
    """One shard per layer, after one for what lies outside the layers."""
    shards: dict[str, _Shard] = {}
    for layer in experts:
        shards.setdefault(_layer_of(layer.prefix), _Shard()).experts.append(layer)
    if not experts_only:
        owned = {tensor.name for layer in experts for tensor in layer.tensors}
        for name, tensor in checkpoint.tensors.items():
            if name not in owned:
                shards.setdefault(_layer_of(name), _Shard()).rest.append(tensor)
    return [shards[name] for name in sorted(shards, key=natural_order)]


def _layer_of(name: str) -> str:
    """``model.layers.3`` of ``model.layers.3.mlp.gate.weight``; nothing for a name without a number."""
    match = re.match(r".*?\.[0-9]+(?=\.)", name)
    return match[0] if match else ""


def _pack_layer(
    layer: Experts,
    pattern: Pattern,
    dtype: str,
    tensors: dict[str, np.ndarray | Tensor],
    entries: dict[str, Entry],
    on_matrix: Callable[[], None] | None,
) -> LayerReport:
    """Add the packed experts of one layer to ``tensors`` and ``entries``, expert by expert."""
    gate_up, down = (2 * layer.width, layer.hidden), (layer.hidden, layer.width)
    report = LayerReport(layer.prefix, layer.count, gate_up, down)
    for matrix, shape, read in (("gate_up_proj", gate_up, layer.gate_up), ("down_proj", down, layer.down)):
        name = f"{layer.prefix}.{matrix}"
        for expert in range(layer.count):
            w = read(expert)
            packed = ops.array(w, pattern)
            report.add(w, packed)
            packed = _cast(packed, dtype, f"{name}, expert {expert}")
            for buffer, value in packed.buffers().items():
                if expert == 0:
                    tensors[f"{name}.{buffer}"] = np.empty((layer.count, *value.shape), value.dtype)
                tensors[f"{name}.{buffer}"][expert] = value
                report.bytes_after += value.nbytes
            if on_matrix:
                on_matrix()
        entries[name] = Entry(pattern, (layer.count, *shape), packed.dtype)
    tensors.update(layer.biases())
    return report


def _cast(packed: SparseArray, dtype: str, where: str) -> SparseArray:
    if dtype == "keep":
        return packed
    with np.errstate(over="ignore", invalid="ignore"):
        cast = packed.astype(VALUE_DTYPES[dtype])
    if (np.isinf(cast.values) & ~np.isinf(packed.values)).any():
        raise NMSparseError(
            f"{where}: weights up to {np.abs(packed.values).max()} do not fit {dtype}; choose another --dtype"
        )
    return cast


def _sum_of_squares(array: np.ndarray, block: int = 1 << 20) -> float:
    """In float64, a block at a time so that no large copy is made."""
    flat = array.reshape(-1)
    blocks = (flat[start : start + block].astype(np.float64) for start in range(0, flat.size, block))
    return float(sum(np.dot(part, part) for part in blocks))


def copy_side_files(source: Path, folder: Path) -> None:
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name != "config.json" and _SIDE_FILES.fullmatch(file.name):
            shutil.copyfile(file, folder / file.name)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """A directory beside ``target`` that takes its name when the block ends well, and is removed when it does not."""
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent}: no such directory to make {target.name!r} in")
    folder = target.with_name(f"{target.name}.{os.urandom(4).hex()}.tmp")
    folder.mkdir()
    try:
        yield folder
        refuse_existing(target)
        os.rename(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
