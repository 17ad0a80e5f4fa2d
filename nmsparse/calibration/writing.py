"""Writing a pruned model beside the one it came from."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import NMSparseError
from ..formats import stack_experts
from ..io import Checkpoint, save
from ..io.checkpoint import INDEX
from ..io.conversion import building, copy_side_files, read_config, refuse_existing, write_json
from ..io.layouts import find_experts
from ..io.schema import KEY, SCHEMA
from .channels import reordered
from .pipeline import PrunedLayer

FILE = "nmsparse-00001-of-00001.safetensors"


def write_pruned(
    source: str | PathLike[str],
    target: str | PathLike[str],
    layers: Sequence[PrunedLayer],
    method: str,
    *,
    order: np.ndarray | None = None,
) -> Path:
    """Write the checkpoint ``source`` with the experts of ``layers`` to a new directory ``target``; returns its path.

    The experts of a layer are two arrays, as ``nmsparse convert`` writes them: ``<module>.experts.gate_up_proj``
    (E, 2I, H) and ``<module>.experts.down_proj`` (E, H, I); :class:`~nmsparse.formats.MixedExperts` where patterns
    differ. All else is copied, its hidden dimension in ``order`` if the pruned layers have theirs in that
    (:mod:`~nmsparse.calibration.channels`).

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
            arrays[f"{module.prefix}.{name}"] = stack_experts(weights)
    owned, copied = (
        {tensor.name for module in modules for tensor in module.tensors},
        reordered(checkpoint.__getitem__, order),
    )
    arrays |= {name: copied(name) for name in checkpoint if name not in owned}
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
    widths = {w.shape[1] for layer in layers for w in layer.down if w is not None}
    names = [name for name in ("moe_intermediate_size", "intermediate_size") if config.get(name) == old]
    return {names[0]: widths.pop()} if names and len(widths) == 1 else {}
