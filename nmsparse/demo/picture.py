"""The picture of the demo: what each pattern keeps of an expert, the bytes of the experts, and their speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import require
from ..formats.pattern import NM, VNM, Pattern, Samoyeds, parse
from .measure import Result

CROP = (64, 128)  # one block of rows of vnm:64:2:8, one run of columns of samoyeds:1:2:128

# Okabe and Ito's palette, which colour-blind readers tell apart.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#E69F00", "#009E73", "#C8C8C8"
_PARTS = {"values": _BLUE, "meta": _ORANGE, "indices": _GREEN}
_LABELS = {"values": "values", "meta": "metadata (positions)", "indices": "indices (rows or columns)"}
_INK = "#222222"
_MAGNITUDE = ["#BBD7EC", "#56A0D3", "#0B4F8A", "#06213D"]  # light to dark, and no step as light as a dropped weight


def draw(path: str | Path, results: Sequence[Result], weight: np.ndarray, kept: Mapping[str, np.ndarray]) -> Path:
    """Write a PNG: ``weight`` (M, K) of an expert, what each pattern ``kept`` (M, K) of it, bars for ``results``."""
    matplotlib = require("matplotlib", "bench")
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # drawn without pyplot: no window, no global state
    from matplotlib.figure import Figure

    rows, columns = CROP
    magnitude = np.abs(weight[:rows, :columns].astype(np.float32))
    masks = {"dense": np.ones_like(magnitude, dtype=bool), **{p: mask[:rows, :columns] for p, mask in kept.items()}}
    style = {"font.size": 9, "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": "#888888"}
    with matplotlib.rc_context(style):
        grid_rows = -(-len(masks) // 2)
        figure = Figure(figsize=(11, 1.1 + 2.55 * grid_rows + 2.7), layout="constrained")
        FigureCanvasAgg(figure)
        top, bottom = figure.subfigures(2, 1, height_ratios=[2.55 * grid_rows + 0.6, 2.9], hspace=0.05)
        _draw_masks(top, magnitude, masks)
        bytes_axes, speed_axes = bottom.subplots(1, 2)
        _draw_bytes(bytes_axes, results)
        _draw_speed(speed_axes, results)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, format="png")
    return path


def describe(pattern: str | Pattern) -> str:
    """A pattern in words.

    >>> describe("samoyeds:1:2:128")
    '1 of 2 rows per 128 columns, then 2:4'
    """
    match parse(pattern):
        case NM(n, m):
            return f"{n} of every {m} columns"
        case VNM(v, _, m):
            return f"4 of {m} columns per {v} rows, then 2:4"
        case Samoyeds(n, m, v):
            return f"{n} of {m} rows per {v} columns, then 2:4"


def _draw_masks(figure: Any, magnitude: np.ndarray, masks: Mapping[str, np.ndarray]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    rows, columns = magnitude.shape
    figure.suptitle(f"What each pattern keeps of one expert ({rows} rows × {columns} columns of it)", fontsize=13)
    panels = figure.subplots(-(-len(masks) // 2), 2, sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat[len(masks) :]:
        axes.set_visible(False)
    colours = LinearSegmentedColormap.from_list("magnitude", _MAGNITUDE)
    for axes, (name, mask) in zip(panels.flat, masks.items(), strict=False):
        shown = np.ma.array(magnitude, mask=~mask)
        image = axes.imshow(shown, cmap=colours, vmin=0, vmax=np.quantile(magnitude, 0.99), interpolation="nearest")
        words = "as trained" if name == "dense" else describe(name)
        axes.set_title(f"{name} – {words} ({100 * mask.mean():.0f} %)", loc="left", fontsize=9.5)
        axes.set_xticks(range(0, columns + 1, 32))
        axes.set_yticks(range(0, rows + 1, 32))
    for axes in panels[:, 0]:
        axes.set_ylabel("row (output)")
    for axes in panels[-1]:
        axes.set_xlabel("column (input)")
    bar = figure.colorbar(image, ax=panels, extend="max", shrink=0.6, pad=0.02)
    bar.set_label("magnitude of a weight (white: dropped)")


def _draw_bytes(axes: Any, results: Sequence[Result]) -> None:
    left = np.zeros(len(results))
    for part, colour in _PARTS.items():
        size = np.array([r.expert_bytes.get(part, 0) / 1e6 for r in results])
        axes.barh(range(len(results)), size, left=left, color=colour, label=_LABELS[part])
        left += size
    dense = results[0].total_bytes
    notes = [f"{r.total_bytes / 1e6:.2f} MB ({100 * r.total_bytes / dense:.0f} %)" for r in results]
    _finish(axes, "Bytes of all experts", "megabytes (10⁶ bytes)", left, notes, results)


def _draw_speed(axes: Any, results: Sequence[Result]) -> None:
    experts = np.array([1e6 * r.expert_time for r in results])
    others = np.array([1e6 * r.model_time for r in results]) - experts
    axes.barh(range(len(results)), experts, color=_BLUE, label="experts")
    axes.barh(range(len(results)), others, left=experts, color=_GREY, label="rest of the model")
    notes = ["", *(f"experts {results[0].expert_time / r.expert_time:.2f}×" for r in results[1:])]
    _finish(axes, "Time per token on this CPU", "microseconds", experts + others, notes, results)


def _finish(axes: Any, title: str, unit: str, ends: np.ndarray, notes: list[str], results: Sequence[Result]) -> None:
    for y, (end, note) in enumerate(zip(ends, notes, strict=True)):
        axes.annotate(note, (end, y), xytext=(4, 0), textcoords="offset points", va="center")
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(unit)
    axes.set_yticks(range(len(results)), [r.pattern for r in results])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * ends.max())
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=3, handlelength=1)
