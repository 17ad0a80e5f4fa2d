"""The products that users have today, on the same operands: cuBLAS and cuSPARSELt, through torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from ..errors import require
from .gpu import copies_of, kernel_seconds, semi_structured

__all__ = ["cublas", "cusparselt_times"]


def cublas(x: Any, w: Any, y: Any) -> Callable[[], Any]:
    """``y = x @ w.T`` with the zeros of ``w`` multiplied too; fp32 accumulation."""
    torch = require("torch", "torch")
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return lambda: torch.matmul(x, w.t(), out=y)


def cusparselt_times(cases: list[Any]) -> dict[Any, dict[str, float]]:
    """Kernel seconds of cuSPARSELt, with the algorithm its search finds, and of cuBLAS beside it, for each case
    ``(rows, tokens, columns, dtype)`` that it takes.

    In a process of its own: on an H200 its search meets an illegal instruction for some shapes, which ends the CUDA
    context; the case that did is left out and a new process goes on.
    """
    found: dict[Any, dict[str, float]] = {}
    left = list(cases)
    while left:
        command = [sys.executable, "-W", "ignore", "-m", __name__]
        run = subprocess.run(command, input=json.dumps(left), capture_output=True, text=True, check=False)
        lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
        found |= {case: line for case, line in zip(left, lines, strict=False) if "cusparselt" in line}
        if run.returncode == 0:
            break
        reason = (run.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"cuSPARSELt ended the process at {tuple(left[len(lines)])}: {reason}")
        left = left[len(lines) + 1 :]
    return found


def _measure(rows: int, tokens: int, columns: int, dtype: str) -> dict[str, float]:
    torch = require("torch", "torch")
    kind = getattr(torch, dtype)
    copies = copies_of(rows, tokens, columns)
    w = [semi_structured(rows, columns, kind) for _ in range(copies)]
    x = [torch.randn(tokens, columns, device="cuda", dtype=kind) for _ in range(copies)]
    packed = [torch._cslt_compress(a) for a in w]
    algorithm = torch._cslt_sparse_mm_search(packed[0], x[0].t())
    product = torch._cslt_sparse_mm
    exact = x[0].float() @ w[0].float().t()
    got = product(packed[0], x[0].t(), alg_id=algorithm).t().float()
    if not float((got - exact).norm() / exact.norm()) < 0.02:
        return {}
    return kernel_seconds(
        {
            "cusparselt": [lambda i=i: product(packed[i], x[i].t(), alg_id=algorithm) for i in range(copies)],
            "cublas": [
                cublas(x[i], torch.randn_like(w[i]), torch.empty(tokens, rows, device="cuda", dtype=kind))
                for i in range(copies)
            ],
        }
    )


if __name__ == "__main__":
    for case in json.load(sys.stdin):
        print(json.dumps(_measure(*case)), flush=True)
