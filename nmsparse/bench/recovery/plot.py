"""A picture of the runs of `bench recovery`: bits per byte on the way, and at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import require

__all__ = ["draw"]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the curves to ``path``, one colour for each kind of run. They are of the first windows of the held-out
    text, the dots at the end of all of it."""
    require("matplotlib", "bench").use("Agg")
    plots = require("matplotlib.pyplot", "bench")
    figure, axis = plots.subplots(figsize=(7, 4.5))
    colours: dict[str, str] = {}
    for row in (row for row in rows if row["what"] == "run"):
        first = row["run"] not in colours
        colour = colours.setdefault(row["run"], f"C{len(colours)}")
        if row["curve"]:
            axis.plot(*zip(*row["curve"], strict=True), color=colour, linewidth=1)
        axis.plot(row["seconds"], row["bits"], "o", color=colour, label=row["run"] if first else None)
    axis.set(xlabel="seconds of training", ylabel="bits per byte", title="tiny-moe, held-out text")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plots.close(figure)
