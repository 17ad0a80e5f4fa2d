"""The picture of the accuracy page: loss against the bytes of the experts, and what training gives back."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from ..errors import require
from .accuracy import ALLOCATIONS, Row, one_shot

_MARKERS = {"vnm": "s", "samoyeds": "o", "allocation": "*"}  # anything else: a diamond
_SHOWN = {"magnitude": "tab:red", "wanda": "tab:orange", "sparsegpt": "tab:blue", "admm": "tab:green"}
_LINEAR = 0.01  # bits per byte: what training leaves may be less than nothing, so the scale is linear up to here


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss (log scale) against bytes, a colour for each method and a marker for each family of patterns.

    Beside it, where there are rows of training, the loss of each pattern that was trained: one shot and recovered.
    """
    require("matplotlib", "bench")
    from matplotlib.figure import Figure

    trained = [row for row in rows if row.get("table") == "recovered"]
    figure = Figure(figsize=(14 if trained else 8, 4.5), layout="constrained")
    axes = figure.subplots(1, 2 if trained else 1, squeeze=False)[0]
    _one_shot(axes[0], rows)
    if trained:
        _recovered(axes[1], rows, trained)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _one_shot(axes: Any, rows: list[dict[str, Any]]) -> None:
    tables = ("methods", "neurons", "heights", "bars", *ALLOCATIONS)
    for row in (row for row in rows if row.get("table") in tables and row["method"] in _SHOWN):
        marker = "*" if row["table"] in ALLOCATIONS else _MARKERS.get(row["pattern"].split(":")[0], "D")
        axes.scatter(row["nbytes"] / 1e6, row["loss"], 45, _SHOWN[row["method"]], marker=marker, alpha=0.8)
    for method, colour in _SHOWN.items():
        axes.scatter([], [], 45, colour, marker="o", label=method)
    for name, marker in (("n:m", "D"), ("V:N:M", "s"), ("Samoyeds", "o"), ("a pattern for each expert", "*")):
        axes.scatter([], [], 45, "none", marker=marker, edgecolors="black", label=name)
    axes.set(yscale="log", xlabel="bytes of the experts, MB", ylabel="loss, bits per byte")
    axes.grid(alpha=0.3, which="both")
    axes.legend(ncols=2, fontsize="small")


def _recovered(axes: Any, rows: list[dict[str, Any]], trained: list[dict[str, Any]]) -> None:
    """Patterns by falling bytes: a dot for each seed, a line through the medians, a cross for the best one shot."""
    found = [Row(**row) for row in rows if "table" in row]
    patterns = list(dict.fromkeys(row["pattern"] for row in sorted(trained, key=lambda row: -row["nbytes"])))
    times = dict.fromkeys(row["method"] for row in sorted(trained, key=lambda row: row["seconds"]))
    axes.set_yscale("symlog", linthresh=_LINEAR)
    for number, time in enumerate(times):
        losses = {p: [r["loss"] for r in trained if (r["pattern"], r["method"]) == (p, time)] for p in patterns}
        shown = {patterns.index(p): values for p, values in losses.items() if values}
        colour = f"C{4 + number}"
        axes.plot([*shown], [*map(statistics.median, shown.values())], color=colour, label=f"trained {time}")
        for x, values in shown.items():
            axes.scatter([x] * len(values), values, 30, colour, alpha=0.8)
    best = {x: row for x, p in enumerate(patterns) if (row := one_shot(found, p))}
    axes.scatter([*best], [row.loss for row in best.values()], 45, "tab:green", marker="X", label="one shot, best")
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.set_xticks(range(len(patterns)), patterns, rotation=30, ha="right")
    axes.set(ylabel="loss, bits per byte")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
