"""A picture of the layers: our speed over the best peers, model by model, against the tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import require

__all__ = ["draw"]

TITLES = {"torch": "best torch layer / ours", "triton": "tuned Triton layer / ours"}
STYLES = {"uniform": "-", "skewed": "--"}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the ratios of the measured rows to ``path``: a row of panels for each kind of peer, a panel for each model,
    a line for each pattern of ours and each routing; 1 is the peer's speed."""
    require("matplotlib", "bench").use("Agg")
    plots = require("matplotlib.pyplot", "bench")
    cases = [row for row in rows if row.get("what") == "case"]
    models = list(dict.fromkeys(row["model"] for row in cases))
    names = list(dict.fromkeys(name for row in cases for name in row["floor"]))
    colors = {name: f"C{i}" for i, name in enumerate(names)}
    figure, axes = plots.subplots(
        len(TITLES),
        max(1, len(models)),
        figsize=(3 * max(1, len(models)) + 1, 6),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for panels, (family, title) in zip(axes, TITLES.items(), strict=True):
        panels[0].set_ylabel(title)
        for axis, model in zip(panels, models, strict=False):
            for (routing, style), name in ((s, n) for s in STYLES.items() for n in names):
                line = sorted(
                    (row["tokens"], row["over"][family][name])
                    for row in cases
                    if (row["model"], row["routing"]) == (model, routing) and name in row["over"].get(family, {})
                )
                if line:
                    label = f"{name}, {routing}"
                    axis.plot(
                        *zip(*line, strict=True), style, color=colors[name], marker="o", markersize=3, label=label
                    )
            axis.axhline(1, color="gray", linewidth=0.8)
            axis.set(
                xscale="log", title=model if family == "torch" else "", xlabel="tokens" if family == "triton" else ""
            )
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=7)
    figure.savefig(path, dpi=120)
    plots.close(figure)
