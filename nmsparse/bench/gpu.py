"""Fair timing on a GPU: what the kernels take, as the profiler sees them, with cold operands and a rested chip."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..errors import require
from ..formats import SamoyedsArray
from ..formats.pattern import Samoyeds

__all__ = [
    "COLD_BYTES",
    "Failures",
    "Timed",
    "attempt",
    "captured",
    "copies_of",
    "device_facts",
    "host_time",
    "kernel_seconds",
    "random_samoyeds",
    "seconds_of",
    "semi_structured",
    "waits_for_gpu",
]

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


Failures = dict[str, str]


def attempt(failed: Failures, name: str, act: Callable[[], Any]) -> None:
    """Runs one contender's part; what goes wrong there is reported, and the others go on."""
    torch = require("torch", "torch")
    try:
        act()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # whose fault a bad access is shows here, or not at all
    except Exception as error:
        failed[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        print(f"{name}: {failed[name]}")


class Timed(NamedTuple):
    """What :func:`seconds_of` times: ``run`` makes ``calls`` calls. ``reads`` is kept alive with it: the memory that a
    graph reads at every replay, and that nothing else may hold."""

    run: Callable[[], Any]
    calls: int
    reads: Any = None


def captured(runs: Sequence[Callable[[], Any]]) -> tuple[Timed, list[Any]]:
    """One CUDA graph of all the calls, in their order, and what each returned: memory that a replay fills anew.

    Each call is made once before. Raises torch's error for what a graph cannot hold, such as waiting for the GPU.
    """
    torch = require("torch", "torch")
    graph, side = torch.cuda.CUDAGraph(), _side_stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for run in runs:
            run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=side):
        results = [run() for run in runs]
    return Timed(graph.replay, len(runs), runs), results


def waits_for_gpu(run: Callable[[], Any]) -> bool:
    """Whether torch sees a call wait for the GPU."""
    torch = require("torch", "torch")
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


@functools.cache
def _side_stream() -> Any:
    """Where graphs are captured: one stream, since the allocator and the library keep memory for each."""
    return require("torch", "torch").cuda.Stream()


def seconds_of(
    candidates: dict[str, Timed], *, span: float = 0.01, rounds: int = 3, rest: float = REST
) -> dict[str, float]:
    """Median over ``rounds`` of the time of a call of each candidate, in seconds, between events on the GPU.

    A measurement repeats a candidate for about ``span`` seconds, once at least; candidates alternate. Of CUDA graphs
    this is what the GPU takes, the gaps between kernels included; of other calls it is what host and GPU take together.
    """
    torch = require("torch", "torch")
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def once(timed: Timed, repeats: int) -> float:
        events[0].record()
        for _ in range(repeats):
            timed.run()
        events[1].record()
        events[1].synchronize()
        return events[0].elapsed_time(events[1]) * 1e-3 / repeats

    repeats = {}
    for name, timed in candidates.items():
        timed.run()
        repeats[name] = min(100, math.ceil(span / max(once(timed, 1), 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, timed in candidates.items():
            time.sleep(rest)
            times[name].append(once(timed, repeats[name]) / timed.calls)
    return {name: statistics.median(values) for name, values in times.items()}


def host_time(call: Callable[[], Any], rounds: int = 200, calls: int = 5) -> float:
    """Median over ``rounds`` of the mean time on the host of a call, in µs; a round begins with an idle GPU, whose
    queue ``calls`` do not fill."""
    torch, times = require("torch", "torch"), []
    call()
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls)
    return sorted(times)[rounds // 2] * 1e6


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


def random_samoyeds(rows: int, columns: int, v: int, dtype: Any) -> tuple[Any, Any]:
    """A random Samoyeds array 1:2:v on the GPU and the dense tensor that it stands for; ``columns`` in sixteens."""
    torch = require("torch", "torch")
    from ..cuda.array import view

    kept, runs = rows // 2, -(-columns // v)
    values = torch.randn(kept, columns // 4, 2, device="cuda", dtype=dtype)
    positions = torch.rand(kept, columns // 4, 4, device="cuda").topk(2, -1).indices.sort(-1).values
    odd = torch.randint(0, 2, (kept, runs), device="cuda", dtype=torch.uint8)
    bits = torch.tensor([1, 4], device="cuda")  # two positions are four bits, four pairs a word
    words = ((positions * bits).sum(-1).view(kept, -1, 4) * 16 ** torch.arange(4, device="cuda")).sum(-1)
    meta = words.to(torch.int32).to(torch.int16).view(torch.uint16)
    buffers = {"values": view(values.view(kept, -1)), "meta": view(meta), "indices": view(odd)}
    array = SamoyedsArray(Samoyeds(1, 2, v), (rows, columns), buffers)
    half = torch.zeros(kept, columns // 4, 4, device="cuda", dtype=dtype).scatter_(2, positions, values)
    half, mask = half.view(kept, columns), odd.bool().repeat_interleave(v, 1)[:, :columns]
    return array, torch.stack([half * ~mask, half * mask], 1).view(rows, columns)


def device_facts() -> dict[str, str]:
    """The GPU and the versions that a figure depends on; nothing without a GPU."""
    torch = require("torch", "torch")
    if not torch.cuda.is_available():
        return {}
    peers = {name: sys.modules[name].__version__ for name in ("transformers", "triton") if name in sys.modules}
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cublas and cusparselt": "as shipped with torch",
        **peers,
    }
