"""One projection of all experts on a GPU: the weight as the grouped kernels want it, and their launch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..formats import SparseArray
from ..formats.nm import is_24
from . import driver, launch
from .array import DeviceArray
from .config_grouped import GroupedConfig, GroupedGemvConfig
from .layout import BLOCK
from .pack import DTYPES, as_24, pack_blocks

__all__ = ["Projection", "kind_of_weight"]

ENOUGH = {2: 0.8, 1: 0.4}  # tiles for each SM that a kernel with so many consumers wants


def kind_of_weight(weight: Any) -> str:
    """How a projection is computed: "dense", "2:4" (also what can be stored as such) or "samoyeds"."""
    if not isinstance(weight, SparseArray):
        return "dense"
    pattern = weight.pattern
    if weight.format == "samoyeds" and (pattern.n, pattern.m) == (1, 2) and pattern.v % BLOCK == 0:
        return "samoyeds"
    return "2:4"


class Projection:
    """One projection of all experts ``(E, M, K)`` in the layout of the grouped kernels.

    ``gated`` weights hold gate rows, then up rows; they are packed side by side. Dense ones are read as they are.
    ``part``: these are some of the experts of a layer, whose plan begins where the others before them end.
    """

    part = False

    def __init__(self, weight: SparseArray | DeviceArray, gated: bool, activation: str, part: bool = False):
        self.part = part
        self.kind, self.gated, self.activation = kind_of_weight(weight), gated, activation
        self.shape, self.dtype, self.pattern = tuple(weight.shape), weight.dtype, getattr(weight, "pattern", None)
        self.experts, rows, self.columns = self.shape
        self.outputs = rows // 2 if gated else rows
        self.letters = DTYPES[weight.dtype.name]
        self.picks, self.runs, self.run_columns = None, 1, 0
        if self.kind == "dense":
            self.device, self.weights = weight.device, weight
            self.rows, self.row_blocks = rows, -(-rows // BLOCK)
            self.k_blocks = -(-self.columns // BLOCK)
        else:
            if self.kind == "2:4" and not (weight.format == "nm" and is_24(weight.pattern)):
                weight = as_24(weight)
            self.device, self.rows = weight.values.device, weight.values.shape[-2]
            self.weights = pack_blocks(weight.values, weight.meta, interleave=gated)
            driver.synchronize(0, self.device)
            self.row_blocks, self.k_blocks = self.weights.shape[1:3]
            if self.kind == "samoyeds":
                self.picks, self.runs, self.run_columns = weight.indices, weight.indices.shape[-1], weight.pattern.v
        self.maps: dict[Any, bytes] = {}
        self.plans: dict[int, Any] = {}  # of a product on its own: tile, kernel, CTAs, by rows

    @property
    def nbytes(self) -> int:
        """Bytes that the kernels read: packed blocks and picks, or the dense weight."""
        return self.weights.nbytes + (0 if self.picks is None else self.picks.nbytes)

    def config(
        self, tile_t: int, gather: bool, few: bool = False, warpgroups: int = 2
    ) -> GroupedConfig | GroupedGemvConfig:
        """The kernel for tiles of ``tile_t`` tokens; the one without a pipeline for ``few``."""
        pairs = self.kind == "samoyeds"
        kind = {"dtype": self.letters, "pairs": pairs, "gather": gather, "gated": self.gated}
        kind |= {"activation": self.activation, "part": self.part}
        if few:
            return GroupedGemvConfig(**kind)
        narrow = self.run_columns % 128 if pairs else self.kind == "dense" or tile_t > 128
        found = GroupedConfig(
            warpgroups=warpgroups,
            tile_t=tile_t,
            tile_k=64 if narrow else 128,
            dense=self.kind == "dense",
            weights_hint="evict_first" if tile_t <= 32 and self.kind != "dense" else None,
            group=16 if tile_t <= 128 else 8,
            **kind,
        )
        return found.deepest()

    def choose(
        self, tile_t: int, gather: bool, token_tiles: float, few: bool, sms: int
    ) -> GroupedConfig | GroupedGemvConfig:
        """The kernel for about ``token_tiles`` tiles of tokens: enough CTAs to fill the GPU, if any kernel has them."""
        for warpgroups in (2, 1):
            if tile_t > 64 or token_tiles * -(-self.row_blocks // warpgroups) >= ENOUGH[warpgroups] * sms:
                return self.config(tile_t, gather, warpgroups=warpgroups)
        return self.config(tile_t, gather, few and self.kind != "dense", 1)

    def plan(
        self, tile_t: int, gather: bool, pairs: int, active: float, few: bool = False, share: float = 1.0
    ) -> tuple[Any, int]:
        """Kernel and CTAs for ``pairs`` rows, of which about a ``share`` for ``active`` experts is likely."""
        sms, most = launch.model_of(self.device).sms, min(self.experts, pairs)
        config = self.choose(tile_t, gather, active * max(1.0, share * pairs / active / tile_t), few, sms)
        if isinstance(config, GroupedGemvConfig):
            return replace(config, overlaps=launch.overlaps(self.device)), most * self.row_blocks * 4
        return config, min(sms, (pairs // tile_t + most) * -(-self.row_blocks // config.warpgroups))

    def weight_map(self, config: GroupedConfig) -> bytes:
        """Of dense weights: columns, eight rows, gate or up, eights of rows, expert."""
        ready = self.maps.get(config.tile_rows)
        if ready is None:
            halves, pitch = 2 if self.gated else 1, 2 * self.columns
            eights = self.rows // 8 // halves
            shape = self.experts, eights, halves, 8, self.columns
            pitches = self.rows * pitch, 8 * pitch, eights * 8 * pitch, pitch
            box = 1, config.tile_rows // 8 // halves, halves, 8, BLOCK
            ready = driver.tensor_map(self.weights.pointer, shape, pitches, box, self.letters)
            self.maps[config.tile_rows] = ready
        return ready

    def run_of(self, config: GroupedConfig | GroupedGemvConfig) -> int:
        """Steps of a run, or blocks of one."""
        columns = self.run_columns or self.k_blocks * BLOCK
        return max(1, columns // (BLOCK if isinstance(config, GroupedGemvConfig) else config.tile_k))

    def token_map(self, x: int, pitch: int, tokens: int, config: GroupedConfig) -> bytes:
        """Of tokens in order."""
        key = x, pitch, tokens, config.tile_t
        ready = self.maps.get(key)
        if ready is None:
            shape, box = (tokens, self.columns), (config.tile_t, BLOCK)
            ready = self.maps[key] = driver.tensor_map(x, shape, (2 * pitch,), box, self.letters)
        return ready

    def __call__(
        self, config: Any, grid: int, stream: int, x: int, x_pitch: int, tokens: int, rows: int, plan: int, y: int
    ) -> None:
        """Launch: ``x`` and ``rows`` or, without a gather, ``tokens`` rows of ``x`` in order; ``y`` is contiguous."""
        weights, tokens_at = self.weights.pointer, x
        if isinstance(config, GroupedConfig):
            weights = self.weight_map(config) if config.dense else weights
            tokens_at = x if config.gather else self.token_map(x, x_pitch, tokens, config)
        launch.kernel_of(config, self.device)(
            grid, stream, weights, 0 if self.picks is None else self.picks.pointer, tokens_at, rows, y, plan,
            self.experts, self.rows, self.row_blocks, self.k_blocks, self.columns, x_pitch, self.outputs, self.outputs,
            self.run_of(config), self.runs,
        )  # fmt: skip
