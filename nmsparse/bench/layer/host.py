"""Host times of eager calls of the bridge to torch."""

from __future__ import annotations

from typing import Any

from ...errors import require
from .. import bar
from ..gpu import host_time

__all__ = ["host_times"]

BARS = {"linear": 15, "experts": 40}  # µs


def host_times() -> list[dict[str, Any]]:
    """Of products of four tokens with prepared weights, in µs, with their bars."""
    torch = require("torch", "torch")
    from ...torch import SparseExperts, SparseWeight, linear

    def weight(*shape: int) -> Any:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16) * shape[-1] ** -0.5

    with torch.no_grad():
        wide, single = weight(4, 4096), SparseWeight.from_dense(weight(4096, 4096), "2:4")
        layer = SparseExperts.from_dense(weight(8, 768, 256), weight(8, 256, 384), "2:4")
        x, (weights, ids) = weight(4, 256), torch.rand(4, 8, device="cuda").topk(2)
        calls = {"linear": lambda: linear(wide, single), "experts": lambda: layer(x, ids, weights)}
        found = {name: host_time(call) for name, call in calls.items()}
    return [bar(f"host time of nmsparse.torch.{n}, µs", found[n], BARS[n], at_least=False) for n in BARS]
