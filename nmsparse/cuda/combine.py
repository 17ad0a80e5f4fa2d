"""``y[t] = Σ_j weights[t, j] · d[slots[t, j]] + base[t]`` on a GPU: the sum over the experts of a token, in one pass.

``slots`` are those of :mod:`nmsparse.cuda.route`. No atomics: the order of a sum is that of j, the same in every run.
The kernel is in :mod:`nmsparse.cuda.kernels.combine`; it is bound by the bandwidth of memory.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..errors import NMSparseError
from . import launch
from .config_route import CombineConfig

__all__ = ["Combine"]


class Combine:
    """A config on a device: ``Combine(config, device)(stream, …)``, one launch that neither allocates nor waits.

    Reads ``d (S, columns)``, ``slots`` int32 and ``weights`` float32 ``(tokens, k)``, and with ``config.base`` also
    ``base (tokens, columns)``; writes ``y (tokens, columns)``. All are addresses; pitches are elements between rows.
    A slot below 0 is left out, whatever its weight. ``d`` has one row at least.
    """

    def __init__(self, config: CombineConfig, device: int):
        if problems := config.problems():
            raise NMSparseError(f"{config}: {'; '.join(problems)}")
        self.config, self.device = config, device
        self._kernels: dict[bool, Any] = {}

    def __call__(
        self,
        stream: int,
        d: int,
        d_pitch: int,
        slots: int,
        weights: int,
        y: int,
        y_pitch: int,
        tokens: int,
        columns: int,
        base: int = 0,
        base_pitch: int = 0,
    ) -> None:
        pieces = (columns + 7) // 8
        work = tokens * pieces
        if not work:
            return
        if work >= 1 << 31 or tokens * self.config.top_k >= 1 << 30:
            raise NMSparseError(
                f"combine: {tokens} tokens of {columns} columns are too many for one launch; split them"
            )
        # In elements of 2 bytes, which 16-byte loads need in eights; bytes of an address, in sixteens.
        aligned = not ((d_pitch | base_pitch | y_pitch | columns) & 7 or (d | base | y) & 15)
        kernel = self._kernels.get(aligned)
        if kernel is None:
            config = replace(self.config, aligned=aligned, overlaps=launch.overlaps(self.device))
            kernel = self._kernels[aligned] = launch.kernel_of(config, self.device)
        grid = -(-work // self.config.threads)
        pitches = d_pitch, base_pitch, y_pitch
        kernel(grid, stream, d, slots, weights, base, y, tokens, columns, pieces, *pitches)
