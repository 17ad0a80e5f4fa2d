"""Writing a pruned model beside the one it came from."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import NMSparseError
from ..formats import SparseArray, stack
from ..io import Checkpoint, save
from ..io.checkpoint import INDEX
from ..io.conversion import building, copy_side_files, read_config, refuse_existing, write_json
from ..io.layouts import find_experts
from ..io.schema import KEY, SCHEMA
from .pipeline import PrunedLayer, Weight

FILE = "nmsparse-00001-of-00001.safetensors"


def write_pruned(
    source: str | PathLike[str], target: str | PathLike[str], layers: Sequence[PrunedLayer], method: str
) -> Path:
    """Write the checkpoint ``source`` with the experts of ``layers`` to a new directory ``target``; returns its path.

    The experts of a layer that share a pattern are two stacked arrays, as ``nmsparse convert`` writes them:
    ``<module>.experts.gate_up_proj`` (E, 2I, H) and ``<module>.experts.down_proj`` (E, H, I). Where patterns differ,
    each expert has its own, ``<module>.experts.<e>.gate_up_proj``. All else is copied.

    Raises :class:`FileExistsError` where ``target`` exists, and :class:`~nmsparse.errors.NMSparseError` for layers that
    are not those of ``source``.
    """
    source, target = Path(source), Path(target)
    refuse_existing(target)
    config, checkpoint = read_config(source), Checkpoint(source)
    modules = find_experts(checkpoint.tensors, config)
    if len(modules) != len(layers):
        raise NMSparseError(f"{source} has {len(modules)} layers of experts, got {len(layers)} pruned ones")
    arrays: dict[str, Any] = {}
    for module, layer in zip(modules, layers, strict=True):
        for name, weights in (("gate_up_proj", layer.gate_up), ("down_proj", layer.down)):
            arrays |= _named(module.prefix, name, weights)
    owned = {tensor.name for module in modules for tensor in module.tensors}
    arrays |= {name: checkpoint[name] for name in checkpoint if name not in owned}
    patterns = sorted({report.pattern for layer in layers for report in layer.reports})
    with building(target) as folder:
        written = Checkpoint(save(folder / FILE, arrays)).tensors
        index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in written.values())}}
        write_json(folder / INDEX, {**index, "weight_map": dict.fromkeys(written, FILE)})
        copy_side_files(source, folder)
        summary = {"schema": SCHEMA, "pattern": " ".join(patterns), "experts_only": False, "method": method}
        write_json(folder / "config.json", {**config, **_width(config, modules[0].width, layers), KEY: summary})
    return target


def _width(config: dict[str, Any], old: int, layers: Sequence[PrunedLayer]) -> dict[str, int]:
    """The field of the config that says how wide an expert is, where neurons were dropped from all alike."""
    widths = {w.shape[1] for layer in layers for w in layer.down}
    names = [name for name in ("moe_intermediate_size", "intermediate_size") if config.get(name) == old]
    return {names[0]: widths.pop()} if names and len(widths) == 1 else {}


def _named(prefix: str, name: str, weights: list[Weight]) -> dict[str, Weight]:
    kinds = {str(getattr(w, "pattern", "dense")) for w in weights}
    if len(kinds) > 1:
        return {f"{prefix}.{e}.{name}": w for e, w in enumerate(weights)}
    stacked = stack(weights) if isinstance(weights[0], SparseArray) else np.stack(weights)
    return {f"{prefix}.{name}": stacked}
