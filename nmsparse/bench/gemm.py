"""2:4 and Samoyeds products on a GPU against cuBLAS and cuSPARSELt: kernel times, errors, host times."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ..errors import require
from . import bar, peers
from .gpu import copies_of, host_time, kernel_seconds, random_samoyeds, semi_structured

SHAPES = (
    (14336, 4096),
    (4096, 14336),
    (4096, 4096),
    (8192, 8192),
    (28672, 8192),
    (1408, 2048),
    (2048, 1408),
    (5120, 13824),
)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 8192)
ODD = ((1000, 777, 1544), (2816, 1023, 2048), (200, 33, 72), (129, 4097, 520), (4096, 100, 4104))
COMPARED = (1024, 4096, 8192)  # with cuSPARSELt
DTYPES = ("float16", "bfloat16")
RUNS = (128, 256)  # V of Samoyeds
BARS = {
    "2:4": {"large": 1.55, "small": 1.6, "least": 0.97, "cube": 1100, "bandwidth": 80},
    "samoyeds:1:2:128": {"large": 2.0, "small": 2.6, "least": 1.0, "cube": 4 * 431, "bandwidth": 75},
    "samoyeds:1:2:256": {"large": 2.3, "small": 2.6, "least": 1.0, "cube": 4 * 431, "bandwidth": 75},
}  # the cube of Samoyeds: four times its released kernel
BANDWIDTH = 4.3e12  # bytes/s, read, of an H200; benchmarks/LOG.md


class Case(NamedTuple):
    """``x (tokens, columns) @ w (rows, columns).T``."""

    rows: int
    tokens: int
    columns: int
    dtype: str

    @property
    def operations(self) -> int:
        """FLOP, with the skipped zeros."""
        return 2 * self.rows * self.tokens * self.columns

    @property
    def patterns(self) -> tuple[str, ...]:
        """What is measured: Samoyeds where its runs divide the columns, as the matrices of SHAPES do."""
        runs = [v for v in RUNS if (self.rows, self.columns) in SHAPES and (v == RUNS[0] or self.dtype == DTYPES[0])]
        return ("2:4", *(f"samoyeds:1:2:{v}" for v in runs))


def cases(dtypes: Sequence[str] = DTYPES) -> Iterator[Case]:
    """All of SHAPES x TOKENS x DTYPES, then the odd shapes."""
    for dtype in dtypes:
        yield from (Case(rows, tokens, columns, dtype) for rows, columns in SHAPES for tokens in TOKENS)
        yield from (Case(rows, tokens, columns, dtype) for rows, tokens, columns in ODD)


def run(quick: bool = False, budget_seconds: float = math.inf) -> list[dict]:
    """Checks, then times each case; prints a line for each, then the bars. ``quick``: float16 only, no cuSPARSELt.

    After ``budget_seconds`` no new case begins, nor the comparison with cuSPARSELt; bars need all cases.
    """
    torch = require("torch", "torch")
    stop = time.perf_counter() + budget_seconds
    torch.manual_seed(0)
    hosts = host_times(torch)  # before the profiler is used: it stays, and slows every call of the driver
    measured = []
    for case in cases(DTYPES[:1] if quick else DTYPES):
        if time.perf_counter() > stop:
            print(f"{tuple(case)} and what follows: left out, the time is spent")
            return measured + hosts
        for row in measure(torch, case):
            measured.append(row)
            times = "  ".join(f"{name} {row[name] * 1e6:8.1f}" for name in ("ours", "cublas"))
            print(f"{case.rows:6d} {case.tokens:5d} {case.columns:6d} {case.dtype:9} {row['pattern']:16} µs: {times}   "
                  f"{row['tflops']:6.0f} TFLOP/s eq  x{row['over_cublas']:.2f}  {row['config']}")  # fmt: skip
    if not quick and time.perf_counter() > stop:
        print("cuSPARSELt: left out, the time is spent")
    elif not quick:
        compare_with_cusparselt([row for row in measured if row["pattern"] == "2:4"])
    return measured + bars(measured) + hosts


def pruned(case: Case, pattern: str) -> tuple[Any, Any]:
    """A random weight that obeys ``pattern``: packed, and dense for the check."""
    torch = require("torch", "torch")
    from ..ops import array

    dtype = getattr(torch, case.dtype)
    if pattern != "2:4":
        return random_samoyeds(case.rows, case.columns, int(pattern.rsplit(":", 1)[1]), dtype)
    dense = semi_structured(case.rows, case.columns, dtype)
    return array(dense, pattern), dense


def measure(torch: Any, case: Case) -> list[dict[str, Any]]:
    """A row for each pattern: errors against fp64, kernel seconds of each contender, the config that ran.

    cuBLAS multiplies a dense weight of normal numbers, as the layer has before it is pruned: it draws less power, and
    is up to 15 % faster, on one that is half or three quarters zeros.
    """
    from ..cuda import matmul as gpu

    dtype = getattr(torch, case.dtype)
    copies = copies_of(case.rows, case.tokens, case.columns)
    dense = [torch.randn(case.rows, case.columns, device="cuda", dtype=dtype) for _ in range(copies)]
    x = [torch.randn(case.tokens, case.columns, device="cuda", dtype=dtype) for _ in range(copies)]
    y = [torch.full((case.tokens, case.rows), math.nan, device="cuda", dtype=dtype) for _ in range(copies)]
    candidates: dict[str, list[Callable[[], Any]]] = {
        "cublas": [peers.cublas(x[i], dense[i], torch.empty_like(y[i])) for i in range(copies)]
    }

    def error(result: Any, weight: Any) -> float:
        exact = x[0][:256].double() @ weight.double().t()
        return float((result[:256].double() - exact).norm() / exact.norm())

    cublas_error, rows, weights = error(candidates["cublas"][0](), dense[0]), {}, {}
    for pattern in case.patterns:
        made = [pruned(case, pattern) for _ in range(copies)]
        sparse = weights[pattern] = [array for array, _ in made]
        calls = candidates[pattern] = [
            lambda i=i, sparse=sparse: gpu.matmul(x[i], sparse[i], out=y[i]) for i in range(copies)
        ]
        calls[0]()
        first = y[0].clone()
        y[0].fill_(math.nan)
        calls[0]()
        rows[pattern] = {
            "what": "case",
            **case._asdict(),
            "pattern": pattern,
            "error": error(y[0], made[0][1]),
            "cublas_error": cublas_error,
            "repeatable": bool(torch.equal(first, y[0])),
        }
    times = kernel_seconds(candidates)
    for pattern, row in rows.items():
        weight = gpu.operand(weights[pattern][0])
        (chosen,) = weight.launches.values()
        row |= {"ours": times[pattern], "cublas": times["cublas"], "over_cublas": times["cublas"] / times[pattern]}
        row |= {"config": chosen.plan.describe(), "modelled": chosen.plan.seconds}
        row["tflops"] = case.operations / row["ours"] * 1e-12
        row["bytes_per_second"] = weight.blocks.nbytes / row["ours"]
    return list(rows.values())


def compare_with_cusparselt(rows: list[dict[str, Any]]) -> None:
    """Add ``over_cusparselt`` to the rows of many tokens. Measured beside cuBLAS in another process, so the ratio goes
    through cuBLAS."""
    large = {Case(**{name: row[name] for name in Case._fields}): row for row in rows if row["tokens"] in COMPARED}
    for case, times in peers.cusparselt_times(list(large)).items():
        row = large[case]
        row["cusparselt"] = times["cusparselt"] / times["cublas"] * row["cublas"]
        row["over_cusparselt"] = row["cusparselt"] / row["ours"]
        print(f"{tuple(case)}: cuSPARSELt {times['cusparselt'] * 1e6:.1f} µs, cuBLAS {times['cublas'] * 1e6:.1f} µs, "
              f"ours is x{row['over_cusparselt']:.2f} cuSPARSELt")  # fmt: skip


def bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The promises, from the measured rows."""
    return [bar_ for pattern in BARS for bar_ in bars_of(pattern, [r for r in rows if r["pattern"] == pattern])]


def bars_of(pattern: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of one pattern."""
    bars = BARS[pattern]
    listed = [row for row in rows if (row["rows"], row["columns"]) in SHAPES and row["tokens"] in TOKENS]
    large, small = [r for r in listed if r["tokens"] >= 1024], [r for r in listed if r["tokens"] <= 64]
    found = [
        bar(f"{pattern}, T >= 1024, geometric mean of cuBLAS / ours", _mean(large, "over_cublas"), bars["large"]),
        bar(f"{pattern}, T <= 64, geometric mean of cuBLAS / ours", _mean(small, "over_cublas"), bars["small"]),
        bar(f"{pattern}, least cuBLAS / ours", min(row["over_cublas"] for row in listed), bars["least"]),
    ]
    if compared := [row for row in large if "over_cusparselt" in row]:
        mean = _mean(compared, "over_cusparselt")
        found.append(bar(f"{pattern}, T >= 1024, geometric mean of cuSPARSELt / ours", mean, 1.10))
    cube = [row["tflops"] for row in listed if (row["rows"], row["tokens"], row["columns"]) == (8192, 8192, 8192)]
    found.append(bar(f"{pattern}, 8192 cubed, TFLOP/s eq", min(cube), bars["cube"]))
    for shape in ((14336, 4096), (28672, 8192)):
        rates = [row["bytes_per_second"] for row in small if (row["rows"], row["columns"]) == shape]
        share = 100 * min(rates) / BANDWIDTH
        found.append(bar(f"{pattern}, {shape}, T <= 64, least % of {BANDWIDTH / 1e12} TB/s", share, bars["bandwidth"]))
    worst = max(row["error"] / row["cublas_error"] for row in rows)
    found.append(bar(f"{pattern}, largest error over cuBLAS's, against fp64", worst, 1.1, at_least=False))
    found.append(
        bar(f"{pattern}, bitwise repeatable, part of the cases", sum(r["repeatable"] for r in rows) / len(rows), 1)
    )
    return found


def _mean(rows: list[dict[str, Any]], name: str) -> float:
    return math.exp(sum(math.log(row[name]) for row in rows) / len(rows))


def host_times(torch: Any) -> list[dict[str, Any]]:
    """Host time of a product with prepared operands, and prune-and-pack against the copy bandwidth."""
    from ..ops import array, matmul

    w = semi_structured(4096, 4096, torch.float16)
    weight, x = array(w, "2:4"), torch.randn(16, 4096, device="cuda", dtype=torch.float16)
    y, across = torch.empty(16, 4096, device="cuda", dtype=torch.float16), weight.T
    found = [
        bar("host time of ops.matmul, µs", host_time(lambda: matmul(x, across, out=y)), 10, at_least=False),
    ]
    large = [torch.randn(14336, 8192, device="cuda", dtype=torch.float16) for _ in range(2)]
    target = torch.empty_like(large[0])
    seconds = kernel_seconds(
        {"pack": [lambda w=w: array(w, "2:4") for w in large], "copy": [lambda w=w: target.copy_(w) for w in large]}
    )
    moved = large[0].nbytes * (1 + 0.5 + 1 / 16)  # read once; half the values and 2 bits a position written
    share = moved / seconds["pack"] / (2 * large[0].nbytes / seconds["copy"])
    found.append(bar("GPU prune-and-pack, % of copy bandwidth", 100 * share, 40))
    return found
