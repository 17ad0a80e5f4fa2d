"""Configs of the grouped kernel: experts' weights of one kind, tokens by routing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .config import GemmConfig, GemvConfig
from .layout import BLOCK

__all__ = ["GroupedConfig", "GroupedGemvConfig"]


@dataclass(frozen=True)
class GroupedConfig(GemmConfig):
    """Shape of the grouped kernel. Weights are packed 2:4 blocks, Samoyeds (``pairs``) or dense as they are.

    ``gated`` weights have gate and up rows side by side in every 16 packed rows, eight and eight, so that a thread
    holds both of a neuron.
    """

    dense: bool = False
    gather: bool = False  # tokens by a list of rows; else they lie in the order of the experts
    gated: bool = False
    activation: str = "identity"
    part: bool = False  # some of the experts of a layer: the plan begins where the others before them end
    overlaps: ClassVar[bool] = True  # with the launches around it, as sm_90a can

    @property
    def name(self) -> str:
        """Kernel and tile."""
        kind = "dense" if self.dense else "samoyeds" if self.pairs else "2:4"
        act = self.activation + " gate" * self.gated
        return f"grouped {kind} {self.tile_m}x{self.tile_t}x{self.tile_k}{' gather' * self.gather} {act}"

    @property
    def few(self) -> int:
        """Tokens of the shorter instruction, for tiles that have no more: often the last of an expert."""
        return self.tile_t // 2 if self.tile_t >= 64 else self.tile_t

    @property
    def tile_rows(self) -> int:
        """Packed rows of a tile."""
        return BLOCK * self.warpgroups

    @property
    def outputs(self) -> int:
        """Outputs of a warpgroup for a token."""
        return self.height // 2 if self.gated else self.height

    @property
    def fillers(self) -> int:
        """Arrivals that fill a slot, besides its bytes: every thread of the producer tells when its copies are done."""
        return 129 if self.gather else 1

    @property
    def weight_bytes(self) -> int:
        """Weights of one slot for 64 packed rows."""
        return BLOCK * self.tile_k * 2 if self.dense else super().weight_bytes

    @property
    def staged_tokens(self) -> int:
        """Tokens that the epilogue stages before it writes them; of other weights than Samoyeds all, or a chunk where
        a slot is worth more.
        """
        return super().staged_tokens if self.pairs else self.tile_t if self.tile_t <= 128 else self.chunk

    @property
    def staged_token_bytes(self) -> int:
        """A token's outputs of a warpgroup in the epilogue, and 16 bytes that spread tokens over the banks."""
        return self.outputs * 2 + 16

    @property
    def buffers(self) -> int:
        """Buffers of a warpgroup for outputs."""
        return 1

    @property
    def clusters(self) -> tuple[int, ...]:
        """None: tiles are of experts, each for one CTA."""
        return ()

    @property
    def producer_registers(self) -> int:
        """What the producer keeps: with a gather, the rows that a thread copies."""
        if self.warpgroups == 1:
            return 88
        return 72 if self.sums <= 128 or self.gather else 40

    @property
    def signature(self) -> str:
        """Letters of the arguments: weights, picks, X, rows, Y, plan; ten sizes."""
        return f"{'m' if self.dense else 'p'}p{'p' if self.gather else 'm'}ppp" + "i" * 10

    def problems(self) -> list[str]:
        """Why the config cannot run; empty if it can."""
        found = super().problems()
        if self.blocks != 1:
            found.append(f"blocks={self.blocks}: one")
        if self.dense and self.pairs:
            found.append("dense, pairs: one kind of weight")
        if self.gated and self.tile_t not in (8, 16) and self.tile_t % 32:
            found.append(f"tile_t={self.tile_t}: gated epilogues store 8, 16 or multiples of 32 tokens")
        return found


@dataclass(frozen=True)
class GroupedGemvConfig(GemvConfig):
    """Shape of the grouped kernel for few tokens: 16 packed rows by 8 tokens for ``warps`` that share k."""

    gather: bool = False
    gated: bool = False
    activation: str = "identity"
    part: bool = False
    overlaps: bool = False  # with the launches around it: nmsparse.cuda.launch.overlaps

    # Neighbouring CTAs have neighbouring rows of one expert.
    group: int = 1 << 20

    @property
    def signature(self) -> str:
        """Letters of the arguments, as of :class:`GroupedConfig`."""
        return "pppppp" + "i" * 10

    @property
    def name(self) -> str:
        """Kernel and tile."""
        kind = "samoyeds" if self.pairs else "2:4"
        return f"grouped gemv {kind} 16x{self.tile_t}, {self.warps} warps x {self.batch}"

    @property
    def outputs(self) -> int:
        """Outputs of a CTA for a token."""
        return super().outputs // (2 if self.gated else 1)

    def problems(self) -> list[str]:
        """Why the config cannot run; empty if it can."""
        return super().problems() + [f"tile_t={self.tile_t}: 8 tokens"] * (self.tile_t != 8)
