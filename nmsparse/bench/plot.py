"""A picture of the GPU figures: our speed over cuBLAS and cuSPARSELt, matrix by matrix, against the tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import require

__all__ = ["draw"]


def draw(rows: list[dict[str, Any]], path: Path, dtype: str = "float16") -> None:
    """Write the figures of :mod:`nmsparse.bench.gemm` to ``path``; one line for each matrix, 1 is the peer's speed."""
    require("matplotlib", "bench").use("Agg")
    plots = require("matplotlib.pyplot", "bench")
    cases = [row for row in rows if row.get("what") == "case" and row["dtype"] == dtype]
    figure, axes = plots.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, peer, title in zip(axes, ("over_cublas", "over_cusparselt"), ("cuBLAS", "cuSPARSELt"), strict=True):
        for shape in sorted({(row["rows"], row["columns"]) for row in cases}):
            line = sorted(
                (row["tokens"], row[peer]) for row in cases if (row["rows"], row["columns"]) == shape and peer in row
            )
            if len(line) > 1:
                axis.plot(*zip(*line, strict=True), marker="o", markersize=3, label=f"{shape[0]} x {shape[1]}")
        axis.axhline(1, color="gray", linewidth=0.8)
        axis.set(xscale="log", xlabel="tokens", title=f"time of {title} / ours, {dtype}")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plots.close(figure)
