"""Fair timing on a GPU: what the kernels take, as the profiler sees them, with cold operands and a rested chip."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import require

__all__ = ["COLD_BYTES", "copies_of", "device_facts", "kernel_seconds", "semi_structured"]

COLD_BYTES = 200 << 20  # operands are rotated through so many bytes, three times an H200's L2
REST = 0.02  # seconds between measurements: a chip at its power limit slows whoever comes next


def kernel_seconds(
    candidates: dict[str, Sequence[Callable[[], Any]]], *, calls: int = 10, rounds: int = 3
) -> dict[str, float]:
    """Median over ``rounds`` of the mean kernel time of a call, in seconds, for each candidate.

    A candidate is a list of callables that do the same on different memory; they take turns, so no operand is found in
    the cache. Host time does not count: torch's profiler adds up the kernels of a call. Candidates alternate.
    """
    torch = require("torch", "torch")
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for runs in candidates.values():
        for run in runs[:2]:
            run()
    torch.cuda.synchronize()
    for _ in range(rounds):
        for name, runs in candidates.items():
            time.sleep(REST)
            activities = [torch.profiler.ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=activities, acc_events=True) as profile:
                for run in itertools.islice(itertools.cycle(runs), calls):
                    run()
                torch.cuda.synchronize()
            total = sum(event.self_device_time_total for event in profile.key_averages())
            times[name].append(total * 1e-6 / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def copies_of(rows: int, tokens: int, columns: int) -> int:
    """How many sets of 16-bit operands of ``x @ w.T`` it takes to find none of them in the cache."""
    size = 2 * (rows * columns + tokens * (rows + columns))
    return max(1, min(16, math.ceil(COLD_BYTES / size)))


def semi_structured(rows: int, columns: int, dtype: Any) -> Any:
    """A torch tensor of random values at two random places of every four, zeros elsewhere."""
    torch = require("torch", "torch")
    w = torch.randn(rows, columns, device="cuda", dtype=dtype)
    kept = torch.rand(rows, columns // 4, 4, device="cuda").topk(2, -1).indices
    mask = torch.zeros(rows, columns // 4, 4, device="cuda", dtype=torch.bool).scatter_(2, kept, True)
    return w * mask.view(rows, columns)


def device_facts() -> dict[str, str]:
    """The GPU and the versions that a figure depends on; nothing without a GPU."""
    torch = require("torch", "torch")
    if not torch.cuda.is_available():
        return {}
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cublas and cusparselt": "as shipped with torch",
    }
