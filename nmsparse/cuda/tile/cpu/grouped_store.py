"""The epilogue of :mod:`nmsparse.cuda.kernels.grouped` on NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ....reference import ACTIVATIONS
from .machine import Accumulator, Ring, Role
from .multiply import of_registers
from .samoyeds import of_pairs
from .store import store_outputs
from .words import check_settled

__all__ = ["store_words"]


def store_words(cfg: Any) -> dict[str, Callable[..., Any]]:
    """``store`` for ``cfg``."""
    act = ACTIVATIONS[cfg.activation]

    def outputs_of(acc: Accumulator) -> np.ndarray:
        """``(tokens, outputs)`` of a consumer."""
        sums = of_pairs(cfg, acc) if cfg.pairs else of_registers(acc.sums)[:, None]  # packed rows, outputs of each
        with np.errstate(over="ignore", invalid="ignore"):
            if cfg.gated:  # eight gate rows, their eight up rows
                gate, up = np.moveaxis(sums.reshape(4, 2, 8, *sums.shape[1:]), 1, 0)
                sums = act(gate) * up
            else:
                sums = act(sums)
        return sums.reshape(cfg.outputs, cfg.tile_t).astype(np.float32).T

    def store(
        role: Role,
        acc: Accumulator,
        ring: Ring,
        y_gmem: np.ndarray,
        row: int,
        first: int,
        end: int,
        outputs: int,
        pitch: int,
    ) -> None:
        check_settled(role, acc, "store")
        mine = (row * cfg.warpgroups + role.number) * cfg.outputs
        store_outputs(role, outputs_of(acc), y_gmem, mine, first, end, outputs, pitch)

    return {"store": store}
