"""Grouped products for their kernel text on the CPU twin, and their truth."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gemm_cases import DTYPES, GUARD

import nmsparse
from nmsparse.cuda.config_grouped import GroupedConfig
from nmsparse.cuda.kernels.grouped import make_grouped
from nmsparse.cuda.layout import BLOCK, interleaved, pack_blocks
from nmsparse.cuda.tile import cpu
from nmsparse.cuda.tile.cpu import grouped
from nmsparse.reference import gated
from nmsparse.testing import assert_close


def packed_experts(values: np.ndarray, meta: np.ndarray, interleave: bool) -> np.ndarray:
    """Blocks of each expert's 2:4 buffers, with gate and up rows side by side if ``interleave``."""
    if not interleave:
        return np.stack([pack_blocks(*expert) for expert in zip(values, meta, strict=True)])
    order = interleaved(values.shape[1])
    values, meta = values.view(np.uint16)[:, order], meta[:, order]
    values[:, order < 0], meta[:, order < 0] = 0, 0x4444
    return np.stack([pack_blocks(*expert) for expert in zip(values, meta, strict=True)])


@dataclass(frozen=True)
class GroupedCase:
    """One launch: ``counts[e]`` tokens for expert e, ``outputs`` of each, ``k`` columns; X has ``tokens`` rows.

    Of a part, ``before`` positions belong to experts of other kinds.
    """

    cfg: GroupedConfig
    counts: tuple[int, ...]
    outputs: int
    k: int
    tokens: int = 20
    workers: int = 1
    v: int = 128
    before: int = 0
    guard: int = GUARD
    make_kernel: Any = field(default=make_grouped, repr=False)

    def weights(self) -> tuple[Any, dict[str, Any]]:
        """The experts' weights, and what the kernel gets of them."""
        cfg, dtype = self.cfg, DTYPES[self.cfg.dtype]
        rows, rng = self.outputs * (2 if cfg.gated else 1), np.random.default_rng(self.outputs + self.k)
        w = (rng.standard_normal((len(self.counts), rows, self.k)) / np.sqrt(self.k)).astype(dtype)
        if cfg.dense:
            halves = 2 if cfg.gated else 1  # gate and up are one axis of the tensor map
            eights = w.reshape(len(w), halves, -1, 8, self.k).swapaxes(1, 2)
            blocks = -(-rows // BLOCK), -(-self.k // BLOCK)
            return w, {"w": eights, "picks": None, "rows": rows, "blocks": blocks, "runs": (blocks[1] + 1, 1)}
        if cfg.pairs:
            A = nmsparse.SamoyedsArray.from_dense(w, v=self.v)
            picks, runs = A.indices, (self.v // cfg.tile_k, A.indices.shape[-1])
        else:
            A, picks, runs = nmsparse.NMArray.from_dense(w, 2, 4), None, (1 << 20, 1)
        packed = packed_experts(A.values, A.meta, cfg.gated)
        kernel = {"w": packed, "picks": picks, "rows": A.values.shape[1], "blocks": packed.shape[1:3], "runs": runs}
        return A.todense(), kernel

    def routing(self) -> tuple[np.ndarray, np.ndarray]:
        """The row of X for each position, and the plan."""
        counts = np.array(self.counts)
        rows = np.random.default_rng(counts.sum()).integers(0, self.tokens, counts.sum()).astype(np.int32)
        ends, tile_ends = np.cumsum(counts), np.cumsum(-(-counts // self.cfg.tile_t))
        if self.cfg.part:
            first = self.before, 3 * self.before  # tiles of other experts, each with few tokens
            plan = np.array([first, *zip(ends + first[0], tile_ends + first[1], strict=True)]).ravel()
            return np.concatenate([np.full(self.before, -1, np.int32), rows]), plan.astype(np.int32)
        return rows, np.concatenate([ends, tile_ends]).astype(np.int32)

    def run(self, seed: int = 0) -> np.ndarray:
        """Launch on the twin; compare with float64; nothing outside Y may be written. Returns Y."""
        cfg, positions = self.cfg, self.before + sum(self.counts)
        assert not cfg.problems(), cfg.problems()
        w, kernel = self.weights()
        rows, plan = self.routing()
        pitch = self.outputs + self.guard
        x_pitch, x_rows = (self.k + 16, self.tokens) if cfg.gather else (self.k, positions)
        x = np.full((x_rows, x_pitch), np.nan, w.dtype)  # nobody may multiply what lies between the rows
        x[:, : self.k] = np.random.default_rng(self.k).standard_normal((x_rows, self.k))
        y = np.full((positions + GUARD, pitch), 0xFFFF, np.uint16)
        arrays = kernel["w"], kernel["picks"], x, rows, y.view(w.dtype), plan
        sizes = len(self.counts), kernel["rows"], *kernel["blocks"], self.k, x_pitch, self.outputs, pitch
        arguments = (*arrays, *sizes, *kernel["runs"])
        cpu.launch(self.make_kernel, cfg, self.workers, arguments, make=grouped.make, seed=seed)

        x = x[:, : self.k].astype(np.float64)[rows if cfg.gather else slice(None)][self.before :]
        experts = np.repeat(np.arange(len(self.counts)), self.counts)
        h = np.einsum("sk,smk->sm", x, w.astype(np.float64)[experts], optimize=True)
        want = gated(h, self.outputs, cfg.activation)
        scale = np.abs(w.astype(np.float64)).max() * np.abs(x).max(initial=0)
        # An activation, and a product with the other half, carry the error of a sum on: times their slopes.
        slope = (2 * (1 + np.abs(h).max(initial=0))) ** (cfg.gated + (cfg.activation == "relu2"))
        got = y[self.before : positions, : self.outputs].view(w.dtype)
        assert_close(got, want, self.k, scale=2 * scale * slope)
        assert (y[: self.before] == 0xFFFF).all(), "wrote what belongs to other experts"
        assert (y[positions:] == 0xFFFF).all() and (y[:, self.outputs :] == 0xFFFF).all(), "wrote outside of Y"
        return got
