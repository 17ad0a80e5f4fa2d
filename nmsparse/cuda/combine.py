"""``y[t] = Σ_j weights[t, j] · d[slots[t, j]] + base[t]`` on a GPU: the sum over the experts of a token, in one pass.

``slots`` are those of :mod:`nmsparse.cuda.route`. No atomics: the order of a sum is that of j, the same in every run.
The kernel is in :mod:`nmsparse.cuda.kernels.combine`; it is bound by the bandwidth of memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..errors import NMSparseError
from . import launch

__all__ = ["Combine", "CombineConfig"]


@dataclass(frozen=True)
class CombineConfig:
    """``aligned``: rows of ``d``, ``base`` and ``y`` begin at multiples of 16 bytes and have whole pieces of 8 columns.

    >>> CombineConfig(top_k=0, dtype="f32").problems()
    ['top_k=0: at least one expert for each token', 'dtype=f32: the rows are f16 or bf16']
    """

    top_k: int
    dtype: str = "f16"
    base: bool = False
    aligned: bool = True
    threads: int = 128

    @property
    def signature(self) -> str:
        """Letters of the arguments: d, slots, weights, base, y; tokens, columns, pieces of eight columns of a row,
        pitches of d, base and y."""
        return "pppppiiiiii"

    @property
    def batch(self) -> int:
        """Rows that a thread has under way: 16 bytes of each, in four registers."""
        return min(self.top_k, 8)

    @property
    def shared_bytes(self) -> int:
        return 0

    def problems(self) -> list[str]:
        """Why the config cannot run; empty if it can."""
        found = []
        if self.top_k < 1:
            found.append(f"top_k={self.top_k}: at least one expert for each token")
        if self.dtype not in ("f16", "bf16"):
            found.append(f"dtype={self.dtype}: the rows are f16 or bf16")
        return found


def _combine(config: CombineConfig) -> Any:
    from .kernels.combine import make_combine
    from .tile.gpu import combine

    return make_combine(combine.make(config), config)


launch.TEXTS[CombineConfig] = _combine


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
            config = replace(self.config, aligned=aligned)
            kernel = self._kernels[aligned] = launch.kernel_of(config, self.device)
        grid = -(-work // self.config.threads)
        pitches = d_pitch, base_pitch, y_pitch
        kernel(grid, stream, d, slots, weights, base, y, tokens, columns, pieces, *pitches)
