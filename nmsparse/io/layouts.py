"""Where a Hugging Face checkpoint keeps its experts: one tensor per expert and matrix, or all experts stacked in one.

Every layout is read as two matrices per expert: ``gate_up`` (2I, H), the rows of the gate then those of the up
projection, and ``down`` (H, I); H is the hidden size, I the width of an expert.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import NMSparseError
from .tensorfile import Tensor

# Names of the three matrices on disk: Mixtral's, and everyone else's.
_ROLES = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
_SEPARATE = re.compile(r"(?P<prefix>(?:.+\.)?experts)\.(?P<expert>[0-9]{1,6})\.(?P<matrix>\w+)\.(?P<part>\w+)")
_FUSED = re.compile(r"(?P<prefix>(?:.+\.)?experts)\.(?P<matrix>gate_up_proj|down_proj)(?P<part>\w*)")
_FLOATS = ("F16", "BF16", "F32", "F64")

# Models that stack their experts as (E, in, out): are the columns of gate and up in halves, or do they alternate?
_ALTERNATE = {
    "aria": False,
    "gpt_oss": True,
    "llama4": False,
    "llama4_text": False,
    "openai_privacy_filter": False,
    "qwen3_vl_moe": False,
    "qwen3_vl_moe_text": False,
}
KNOWN_LAYOUTS = (
    "experts.E.{w1,w3,w2}.weight (Mixtral), experts.E.{gate_proj,up_proj,down_proj}.weight (Qwen, OLMoE, DeepSeek), "
    "experts.{gate_up_proj,down_proj} (transformers 5, gpt-oss, Llama 4)"
)


@dataclass(frozen=True)
class Experts(ABC):
    """The experts of one layer. ``prefix`` is the name of their module; all of ``tensors`` belong to them."""

    prefix: str
    count: int
    width: int
    hidden: int
    tensors: tuple[Tensor, ...]

    @abstractmethod
    def gate_up(self, expert: int) -> np.ndarray:
        """(2I, H), the gate's rows first."""

    @abstractmethod
    def down(self, expert: int) -> np.ndarray:
        """(H, I)"""

    def biases(self) -> dict[str, np.ndarray]:
        """The bias vectors of the experts by name, in the row order of :meth:`gate_up` and :meth:`down`."""
        return {}


@dataclass(frozen=True)
class SeparateExperts(Experts):
    """One tensor for each expert and matrix; ``table[expert][role]``."""

    table: tuple[Mapping[str, Tensor], ...]

    def gate_up(self, expert: int) -> np.ndarray:
        return np.concatenate([self.table[expert]["gate"].read(), self.table[expert]["up"].read()])

    def down(self, expert: int) -> np.ndarray:
        return self.table[expert]["down"].read()


@dataclass(frozen=True)
class StackedExperts(Experts):
    """Two tensors for all experts: ``transposed`` ones are (E, in, out), ``alternate`` gate and up by column."""

    parts: Mapping[str, Tensor]
    transposed: bool
    alternate: bool

    def gate_up(self, expert: int) -> np.ndarray:
        return np.ascontiguousarray(self._gate_first(self._read("gate_up_proj", expert)))

    def down(self, expert: int) -> np.ndarray:
        return np.ascontiguousarray(self._read("down_proj", expert))

    def biases(self) -> dict[str, np.ndarray]:
        found = {name: part.read() for name, part in self.parts.items() if name.endswith("_bias")}
        if "gate_up_proj_bias" in found:
            found["gate_up_proj_bias"] = self._gate_first(found["gate_up_proj_bias"].T).T
        return {f"{self.prefix}.{name}": bias for name, bias in found.items()}

    def _read(self, name: str, expert: int) -> np.ndarray:
        weight = self.parts[name].read(expert)
        return weight.T if self.transposed else weight

    def _gate_first(self, rows: np.ndarray) -> np.ndarray:
        return np.concatenate([rows[::2], rows[1::2]]) if self.alternate else rows


def find_experts(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> list[Experts]:
    """The experts of every layer of a checkpoint, in the order of the layers.

    Raises :class:`~nmsparse.errors.NMSparseError` where there are none, where some are missing or quantised, and where
    the layout is not clear.
    """
    modules: dict[str, list[tuple[re.Match[str], Tensor]]] = {}
    for name, tensor in tensors.items():
        match = _SEPARATE.fullmatch(name) or _FUSED.fullmatch(name)
        if match:
            modules.setdefault(match["prefix"], []).append((match, tensor))
    if not modules:
        raise NMSparseError(
            f"no experts found: this is no Mixture-of-Experts checkpoint in a known layout ({KNOWN_LAYOUTS})"
        )
    return [_module(prefix, modules[prefix], config) for prefix in sorted(modules, key=natural_order)]


def natural_order(name: str) -> str:
    """A sort key by which layer 10 follows layer 9.

    >>> sorted(["layers.10", "layers.9"], key=natural_order)
    ['layers.9', 'layers.10']
    """
    return re.sub("[0-9]+", lambda number: number[0].zfill(12), name)


def _module(prefix: str, found: list[tuple[re.Match[str], Tensor]], config: Mapping[str, Any]) -> Experts:
    for _, tensor in found:
        _refuse_quantised(tensor)
    separate = [(match, tensor) for match, tensor in found if "expert" in match.groupdict()]
    if separate and len(separate) < len(found):
        raise NMSparseError(f"{prefix}: holds both separate and stacked experts")
    experts = _separate(prefix, separate) if separate else _stacked(prefix, [tensor for _, tensor in found], config)
    dtypes = {tensor.code for tensor in experts.tensors}
    if len(dtypes) > 1:
        raise NMSparseError(
            f"{prefix}: the experts have several dtypes ({', '.join(sorted(dtypes))}); save them in one"
        )
    declared = _declared_count(config)
    if declared not in (None, experts.count):
        raise NMSparseError(
            f"{prefix}: config.json says {declared} experts, the tensors hold {experts.count}; "
            f"the checkpoint is not complete"
        )
    return experts


def _refuse_quantised(tensor: Tensor) -> None:
    plain = tensor.name.endswith((".weight", "gate_up_proj", "down_proj"))
    bias = tensor.name.endswith(("gate_up_proj_bias", "down_proj_bias"))
    if tensor.name.endswith(".bias"):
        raise NMSparseError(f"{tensor.name}: separate experts with a bias are not supported")
    if not (plain or bias) or tensor.code not in _FLOATS:
        raise NMSparseError(
            f"{tensor.name} ({tensor.code}): the experts are quantised; nmsparse prunes float16, bfloat16 or float32 "
            f"weights, so dequantise the checkpoint first"
        )


def _separate(prefix: str, found: list[tuple[re.Match[str], Tensor]]) -> SeparateExperts:
    table: dict[int, dict[str, Tensor]] = {}
    for match, tensor in found:
        role = _ROLES.get(match["matrix"])
        if role is None:
            raise NMSparseError(
                f"{tensor.name}: an expert has no matrix {match['matrix']!r} in a known layout ({KNOWN_LAYOUTS})"
            )
        expert = table.setdefault(int(match["expert"]), {})
        if role in expert:
            raise NMSparseError(f"{tensor.name} and {expert[role].name} are both the {role} matrix of one expert")
        expert[role] = tensor
    for expert in range(max(table) + 1):
        for role in ("gate", "up", "down"):
            if role not in table.get(expert, {}):
                raise NMSparseError(f"{prefix}: expert {expert} has no {role} matrix; the checkpoint is not complete")
    width, hidden = _matrix(table[0]["gate"])
    shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    for expert in table.values():
        for role, tensor in expert.items():
            if tensor.shape != shapes[role]:
                raise NMSparseError(f"{tensor.name}: expected shape {shapes[role]}, got {tensor.shape}")
    tensors = tuple(tensor for _, tensor in found)
    return SeparateExperts(prefix, len(table), width, hidden, tensors, tuple(table[e] for e in range(len(table))))


def _matrix(tensor: Tensor) -> tuple[int, int]:
    if len(tensor.shape) != 2:
        raise NMSparseError(f"{tensor.name}: expected a matrix, got shape {tensor.shape}")
    return tensor.shape


def _stacked(prefix: str, found: list[Tensor], config: Mapping[str, Any]) -> StackedExperts:
    parts = {tensor.name.removeprefix(f"{prefix}."): tensor for tensor in found}
    missing = [name for name in ("gate_up_proj", "down_proj") if name not in parts]
    if missing:
        raise NMSparseError(f"{prefix}: has no {missing[0]}; the checkpoint is not complete")
    gate_up, down = parts["gate_up_proj"].shape, parts["down_proj"].shape
    if len(gate_up) == len(down) == 3 and gate_up[0] == down[0]:
        rows = gate_up[1:] == (2 * down[2], down[1])
        columns = gate_up[1:] == (down[2], 2 * down[1])
    else:
        rows = columns = False
    if not (rows or columns):
        raise NMSparseError(
            f"{prefix}: gate_up_proj {gate_up} and down_proj {down} fit neither (E, 2I, H) and (E, H, I) "
            f"nor (E, H, 2I) and (E, I, H)"
        )
    count, width, hidden = (down[0], down[2], down[1]) if rows else (down[0], down[1], down[2])
    for name, sizes in (("gate_up_proj_bias", (count, 2 * width)), ("down_proj_bias", (count, hidden))):
        if name in parts and parts[name].shape != sizes:
            raise NMSparseError(f"{parts[name].name}: expected shape {sizes}, got {parts[name].shape}")
    alternate = False if rows else _alternates(prefix, config)
    return StackedExperts(prefix, count, width, hidden, tuple(found), parts, transposed=columns, alternate=alternate)


def _alternates(prefix: str, config: Mapping[str, Any]) -> bool:
    model = config.get("model_type")
    if model not in _ALTERNATE:
        raise NMSparseError(
            f"{prefix}: stacked as (in, out), and for model_type {model!r} it is not known whether the columns of gate "
            f"and up come in halves or alternate; known: {', '.join(_ALTERNATE)}"
        )
    return _ALTERNATE[model]


def _declared_count(config: Mapping[str, Any]) -> int | None:
    """The number of experts by config.json, where it says one; multimodal models say it in ``text_config``."""
    for place in (config, config.get("text_config")):
        for name in ("num_local_experts", "num_experts", "n_routed_experts"):
            if isinstance(place, dict) and type(place.get(name)) is int:
                return place[name]
    return None
