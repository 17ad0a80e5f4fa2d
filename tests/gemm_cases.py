"""Products for the ``wgmma.sp`` kernel texts on their CPU twin, and their truth."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

import nmsparse
from nmsparse.cuda.config import GemmConfig
from nmsparse.cuda.kernels.gemm import make_gemm
from nmsparse.cuda.kernels.samoyeds import make_samoyeds
from nmsparse.cuda.layout import pack_blocks
from nmsparse.cuda.tile import cpu
from nmsparse.cuda.tile.cpu import samoyeds
from nmsparse.testing import assert_close

DTYPES = {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
GUARD = 3  # rows and columns around Y that must stay as they are


@dataclass(frozen=True)
class Case:
    """One launch: ``Y = X @ W.T + bias`` by ``workers`` CTAs, ``split`` tiles in ``parts`` parts.

    Without split tiles, clusters of ``parts`` CTAs share a tile each.
    """

    cfg: GemmConfig
    rows: int
    tokens: int
    k: int
    workers: int = 1
    split: int = 0
    parts: int = 1
    kind: str = "random"
    guard: int = GUARD
    make_kernel: Any = field(default=make_gemm, repr=False)
    make_tile: Any = field(default=cpu.make, repr=False)

    def dense(self) -> tuple[np.ndarray, np.ndarray]:
        """W before it is pruned, and X."""
        rng = np.random.default_rng(self.rows + self.tokens + self.k)
        if self.kind == "one-hot":  # one weight and one token each: where does it arrive?
            w, x = np.zeros((self.rows, self.k)), np.zeros((self.tokens, self.k))
            w[np.arange(self.rows), np.arange(self.rows) * 7 % self.k] = 1
            x[np.arange(self.tokens), np.arange(self.tokens) * 5 % self.k] = 1
        elif self.kind == "arange":  # small integers: every sum is exact
            w = np.arange(self.rows * self.k).reshape(self.rows, self.k) % 5 - 2
            x = np.arange(self.tokens * self.k).reshape(self.tokens, self.k) % 7 - 3
        else:
            w, x = rng.standard_normal((self.rows, self.k)), rng.standard_normal((self.tokens, self.k))
        dtype = DTYPES[self.cfg.dtype]
        return w.astype(dtype), x.astype(dtype)

    def weight(self, w: np.ndarray) -> nmsparse.SparseArray:
        """W, pruned."""
        return nmsparse.NMArray.from_dense(w, 2, 4)

    def arguments(self, w: Any, y: np.ndarray, *rest: Any) -> tuple[Any, ...]:
        """Those of the kernel, of which ``rest`` are X and what follows Y."""
        x, *others = rest
        packed = pack_blocks(w.values, w.meta)
        sizes = self.rows, self.tokens, self.rows + self.guard, packed.shape[1], self.split, self.parts
        return packed, x, y, *others, *sizes

    def run(self, seed: int = 0) -> None:
        """Launch on the twin; compare with float64; nothing outside Y may be written, no flag stay set."""
        assert not self.cfg.problems(), self.cfg.problems()
        dense, x = self.dense()
        w, bias = self.weight(dense), None
        if self.cfg.bias:
            bias = np.random.default_rng(self.rows).standard_normal(self.rows).astype(x.dtype)
        slots, floats = self.cfg.partial_slots
        cluster, workers = self.parts if self.cfg.clusters and not self.split else 1, self.workers
        if cluster > 1:
            workers = cluster * -(-self.rows // self.cfg.tile_m) * -(-self.tokens // self.cfg.tile_t)
        slots *= workers
        y = np.full((self.tokens + GUARD, self.rows + self.guard), 0xFFFF, np.uint16)
        partial, flags = np.full(slots * floats, np.nan, np.float32), np.zeros(slots, np.uint32)
        arguments = self.arguments(w, y.view(x.dtype), x, bias, partial, flags)
        how = {"make": self.make_tile, "seed": seed, "cluster": cluster}
        cpu.launch(self.make_kernel, self.cfg, workers, arguments, **how)

        want = x.astype(np.float64) @ w.todense().astype(np.float64).T
        if bias is not None:
            want += bias.astype(np.float64)
        got = y[: self.tokens, : self.rows].view(x.dtype)
        scale = np.abs(w.todense().astype(np.float64)).max() * np.abs(x.astype(np.float64)).max()
        assert_close(got, want, self.k, scale=scale)
        assert (y[self.tokens :] == 0xFFFF).all() and (y[:, self.rows :] == 0xFFFF).all(), "wrote outside of Y"
        assert not flags.any(), "a flag stays set: the next launch would not wait"


@dataclass(frozen=True)
class SamoyedsCase(Case):
    """The same with W in Samoyeds format 1:2, runs of ``v`` columns."""

    v: int = 128
    make_kernel: Any = field(default=make_samoyeds, repr=False)
    make_tile: Any = field(default=samoyeds.make, repr=False)

    def weight(self, w: np.ndarray) -> nmsparse.SparseArray:
        return nmsparse.SamoyedsArray.from_dense(w, v=self.v)

    def arguments(self, w: Any, y: np.ndarray, *rest: Any) -> tuple[Any, ...]:
        packed, *others = super().arguments(w, y, *rest)
        return packed, w.indices, *others, self.v // self.cfg.tile_k, w.indices.shape[1]
