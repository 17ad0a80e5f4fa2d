"""The plan of a grouped product as NumPy reads it."""

from __future__ import annotations

from typing import Any

import numpy as np

from .crew import KernelError

__all__ = ["ends_of"]


def ends_of(cfg: Any, plan_gmem: np.ndarray, experts: int) -> tuple[list[int], list[int]]:
    """Ends of the experts' positions and of their tiles, both after where the first expert begins.

    What is in memory is ``(2, experts)`` or, of a part, rows ``(experts + 1, 2)`` of a longer plan.
    """
    size = 2 * experts + 2 if cfg.part else 2 * experts
    if plan_gmem.size != size:
        raise KernelError(f"plan: there are {plan_gmem.size} numbers, the kernel reads {size}")
    if not cfg.part:
        ends, tile_ends = plan_gmem.reshape(2, experts).tolist()
        return [0, *ends], [0, *tile_ends]
    ends, tile_ends = plan_gmem.reshape(-1, 2).T.astype(np.int64)
    return ends.tolist(), (tile_ends - tile_ends[0]).tolist()
