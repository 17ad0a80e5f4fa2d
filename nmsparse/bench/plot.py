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
    panels = [(pattern, "over_cublas") for pattern in dict.fromkeys(row["pattern"] for row in cases)]
    if any("over_cusparselt" in row for row in cases):
        panels.insert(1, ("2:4", "over_cusparselt"))
    figure, axes = plots.subplots(1, len(panels), figsize=(4.5 * len(panels), 4), squeeze=False)
    for axis, (pattern, peer) in zip(axes[0], panels, strict=True):
        mine = [row for row in cases if row["pattern"] == pattern and peer in row]
        for shape in sorted({(row["rows"], row["columns"]) for row in mine}):
            line = sorted((row["tokens"], row[peer]) for row in mine if (row["rows"], row["columns"]) == shape)
            if len(line) > 1:
                axis.plot(*zip(*line, strict=True), marker="o", markersize=3, label=f"{shape[0]} x {shape[1]}")
        axis.axhline(1, color="gray", linewidth=0.8)
        name = "cuBLAS" if peer == "over_cublas" else "cuSPARSELt"
        axis.set(xscale="log", xlabel="tokens", title=f"{pattern}: {name} / ours, {dtype}")
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plots.close(figure)
