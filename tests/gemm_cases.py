"""Products for the ``wgmma.sp`` kernel text on its CPU twin, and their truth."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

import nmsparse
from nmsparse.cuda.config import GemmConfig
from nmsparse.cuda.kernels.gemm import make_gemm
from nmsparse.cuda.layout import pack_blocks
from nmsparse.cuda.tile import cpu
from nmsparse.testing import assert_close

DTYPES = {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
GUARD = 3  # rows and columns around Y that must stay as they are


@dataclass(frozen=True)
class Case:
    """One launch: ``Y = X @ W.T + bias`` by ``workers`` CTAs or clusters, ``split`` tiles in ``parts`` parts."""

    cfg: GemmConfig
    rows: int
    tokens: int
    k: int
    workers: int = 1
    split: int = 0
    parts: int = 1
    kind: str = "random"
    make_kernel: Any = field(default=make_gemm, repr=False)

    def arrays(self) -> tuple[nmsparse.NMArray, np.ndarray, np.ndarray | None]:
        """W, X, bias."""
        dtype, rng = DTYPES[self.cfg.dtype], np.random.default_rng(self.rows + self.tokens + self.k)
        if self.kind == "one-hot":  # one weight and one token each: where does it arrive?
            w, x = np.zeros((self.rows, self.k)), np.zeros((self.tokens, self.k))
            w[np.arange(self.rows), np.arange(self.rows) * 7 % self.k] = 1
            x[np.arange(self.tokens), np.arange(self.tokens) * 5 % self.k] = 1
        elif self.kind == "arange":  # small integers: every sum is exact
            w = np.arange(self.rows * self.k).reshape(self.rows, self.k) % 5 - 2
            x = np.arange(self.tokens * self.k).reshape(self.tokens, self.k) % 7 - 3
        else:
            w, x = rng.standard_normal((self.rows, self.k)), rng.standard_normal((self.tokens, self.k))
        bias = rng.standard_normal(self.rows).astype(dtype) if self.cfg.bias else None
        return nmsparse.NMArray.from_dense(w.astype(dtype), 2, 4), x.astype(dtype), bias

    def run(self, seed: int = 0) -> None:
        """Launch on the twin; compare with float64; nothing outside Y may be written, no flag stay set."""
        assert not self.cfg.problems(), self.cfg.problems()
        w, x, bias = self.arrays()
        packed = pack_blocks(w.values, w.meta)
        pitch, ctas = self.rows + GUARD, self.workers * self.cfg.cluster
        y = np.full((self.tokens + GUARD, pitch), 0xFFFF, np.uint16)
        partial = np.full(ctas * self.cfg.warpgroups * self.cfg.sums * 128, np.nan, np.float32)
        flags = np.zeros(ctas * self.cfg.warpgroups, np.uint32)
        arguments = (packed, x, y.view(x.dtype), bias, partial, flags)
        sizes = (self.rows, self.tokens, pitch, packed.shape[1], self.split, self.parts)
        cpu.launch(self.make_kernel, self.cfg, self.workers, (*arguments, *sizes), seed=seed)

        want = x.astype(np.float64) @ w.todense().astype(np.float64).T
        if bias is not None:
            want += bias.astype(np.float64)
        got = y[: self.tokens, : self.rows].view(x.dtype)
        dense = np.abs(w.todense().astype(np.float64)).max() * np.abs(x.astype(np.float64)).max()
        assert_close(got, want, self.k, scale=dense)
        assert (y[self.tokens :] == 0xFFFF).all() and (y[:, self.rows :] == 0xFFFF).all(), "wrote outside of Y"
        assert not flags.any(), "a flag stays set: the next launch would not wait"
