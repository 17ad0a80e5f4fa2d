"""The picture of the accuracy page: what a model loses against the bytes of its experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import require

_MARKERS = {"vnm": "s", "samoyeds": "o", "allocation": "*"}  # anything else: a diamond
_SHOWN = {"magnitude": "tab:red", "wanda": "tab:orange", "sparsegpt": "tab:blue", "admm": "tab:green"}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss (log scale) against bytes, a colour for each method and a marker for each family of patterns."""
    require("matplotlib", "bench")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    points = [
        row for row in rows if row.get("table") in ("methods", "neurons", "heights", "bars") and row["method"] in _SHOWN
    ]
    for row in points:
        marker = _MARKERS.get(row["pattern"].split(":")[0], "D")
        axes.scatter(row["nbytes"] / 1e6, row["loss"], 45, _SHOWN[row["method"]], marker=marker, alpha=0.8)
    for method, colour in _SHOWN.items():
        axes.scatter([], [], 45, colour, marker="o", label=method)
    for name, marker in (("n:m", "D"), ("V:N:M", "s"), ("Samoyeds", "o"), ("a pattern for each expert", "*")):
        axes.scatter([], [], 45, "none", marker=marker, edgecolors="black", label=name)
    axes.set(yscale="log", xlabel="bytes of the experts, MB", ylabel="loss, bits per byte")
    axes.grid(alpha=0.3, which="both")
    axes.legend(ncols=2, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
