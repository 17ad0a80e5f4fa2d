"""2:4 products on a GPU against cuBLAS and cuSPARSELt: kernel times, errors, host times."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ..errors import require
from . import bar, peers
from .gpu import copies_of, kernel_seconds, semi_structured

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


def cases() -> Iterator[Case]:
    """All of SHAPES x TOKENS x DTYPES, then the odd shapes."""
    for dtype in DTYPES:
        yield from (Case(rows, tokens, columns, dtype) for rows, columns in SHAPES for tokens in TOKENS)
        yield from (Case(rows, tokens, columns, dtype) for rows, tokens, columns in ODD)


def run() -> list[dict]:
    """Checks, then times each case; prints a line for each, then the bars."""
    torch = require("torch", "torch")
    torch.manual_seed(0)
    measured = []
    for case in cases():
        row = measure(torch, case)
        measured.append(row)
        times = "  ".join(f"{name} {row[name] * 1e6:8.1f}" for name in ("ours", "cublas"))
        print(f"{case.rows:6d} {case.tokens:5d} {case.columns:6d} {case.dtype:9} µs: {times}   "
              f"{row['tflops']:6.0f} TFLOP/s eq  x{row['over_cublas']:.2f}  {row['config']}")  # fmt: skip
    compare_with_cusparselt(measured)
    return measured + bars(measured) + host_times(torch)


def measure(torch: Any, case: Case) -> dict[str, Any]:
    """One row: errors against fp64, kernel seconds of each contender, the config that ran."""
    from ..cuda import matmul as gpu
    from ..ops import array

    dtype = getattr(torch, case.dtype)
    copies = copies_of(case.rows, case.tokens, case.columns)
    dense = [semi_structured(case.rows, case.columns, dtype) for _ in range(copies)]
    x = [torch.randn(case.tokens, case.columns, device="cuda", dtype=dtype) for _ in range(copies)]
    y = [torch.full((case.tokens, case.rows), math.nan, device="cuda", dtype=dtype) for _ in range(copies)]
    sparse = [array(w, "2:4") for w in dense]
    candidates: dict[str, list[Callable[[], Any]]] = {
        "ours": [lambda i=i: gpu.matmul(x[i], sparse[i], out=y[i]) for i in range(copies)],
        "cublas": [peers.cublas(x[i], dense[i], torch.empty_like(y[i])) for i in range(copies)],
    }
    exact = x[0][:256].double() @ dense[0].double().t()

    def error(result: Any) -> float:
        return float((result[:256].double() - exact).norm() / exact.norm())

    candidates["ours"][0]()
    first = y[0].clone()
    y[0].fill_(math.nan)
    candidates["ours"][0]()
    row: dict[str, Any] = {
        "what": "case",
        **case._asdict(),
        "error": error(y[0]),
        "cublas_error": error(candidates["cublas"][0]()),
        "repeatable": bool(torch.equal(first, y[0])),
        **kernel_seconds(candidates),
    }
    weight = gpu.operand(sparse[0])
    (chosen,) = weight.launches.values()
    plan = chosen.plan
    row["config"] = plan.describe()
    row["modelled"] = plan.seconds
    row["tflops"] = case.operations / row["ours"] * 1e-12
    row["over_cublas"] = row["cublas"] / row["ours"]
    row["bytes_per_second"] = weight.blocks.nbytes / row["ours"]
    return row


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
    listed = [row for row in rows if (row["rows"], row["columns"]) in SHAPES and row["tokens"] in TOKENS]
    large, small = [r for r in listed if r["tokens"] >= 1024], [r for r in listed if r["tokens"] <= 64]
    found = [
        bar("T >= 1024, geometric mean of cuBLAS / ours", _mean(large, "over_cublas"), 1.55),
        bar("T <= 64, geometric mean of cuBLAS / ours", _mean(small, "over_cublas"), 1.6),
        bar("all, least cuBLAS / ours", min(row["over_cublas"] for row in listed), 0.97),
    ]
    if compared := [row for row in large if "over_cusparselt" in row]:
        found.append(bar("T >= 1024, geometric mean of cuSPARSELt / ours", _mean(compared, "over_cusparselt"), 1.10))
    cube = [row["tflops"] for row in listed if (row["rows"], row["tokens"], row["columns"]) == (8192, 8192, 8192)]
    found.append(bar("8192 cubed, TFLOP/s eq", min(cube), 1100))
    for shape in ((14336, 4096), (28672, 8192)):
        rates = [row["bytes_per_second"] for row in small if (row["rows"], row["columns"]) == shape]
        found.append(bar(f"{shape}, T <= 64, least % of {BANDWIDTH / 1e12} TB/s", 100 * min(rates) / BANDWIDTH, 80))
    worst = max(row["error"] / row["cublas_error"] for row in rows)
    found.append(bar("largest error over cuBLAS's error, against fp64", worst, 1.1, at_least=False))
    found.append(bar("bitwise repeatable, part of the cases", sum(r["repeatable"] for r in rows) / len(rows), 1))
    return found


def _mean(rows: list[dict[str, Any]], name: str) -> float:
    return math.exp(sum(math.log(row[name]) for row in rows) / len(rows))


def host_times(torch: Any) -> list[dict[str, Any]]:
    """Host time of a product with prepared operands, and prune-and-pack against the copy bandwidth."""
    from ..ops import array, matmul

    w = semi_structured(4096, 4096, torch.float16)
    weight, x = array(w, "2:4"), torch.randn(16, 4096, device="cuda", dtype=torch.float16)
    y, across = torch.empty(16, 4096, device="cuda", dtype=torch.float16), weight.T
    matmul(x, across, out=y)
    torch.cuda.synchronize()
    spans = []
    for _ in range(200):
        start = time.perf_counter()
        for _ in range(5):
            matmul(x, across, out=y)
        spans.append((time.perf_counter() - start) / 5)
        torch.cuda.synchronize()
    found = [bar("host time of ops.matmul, µs", sorted(spans)[len(spans) // 2] * 1e6, 10, at_least=False)]
    large = [torch.randn(14336, 8192, device="cuda", dtype=torch.float16) for _ in range(2)]
    target = torch.empty_like(large[0])
    seconds = kernel_seconds(
        {"pack": [lambda w=w: array(w, "2:4") for w in large], "copy": [lambda w=w: target.copy_(w) for w in large]}
    )
    moved = large[0].nbytes * (1 + 0.5 + 1 / 16)  # read once; half the values and 2 bits a position written
    share = moved / seconds["pack"] / (2 * large[0].nbytes / seconds["copy"])
    found.append(bar("GPU prune-and-pack, % of copy bandwidth", 100 * share, 40))
    return found
