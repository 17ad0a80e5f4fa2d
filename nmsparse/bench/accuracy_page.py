"""The tables of the accuracy page, from rows: what stands between ``<!-- NAME -->`` and ``<!-- end NAME -->``."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import NMSparseError
from ..formats import parse
from .accuracy import ALLOCATIONS, FULL, HEIGHTS, PATTERNS, Row, one_shot

Table = list[list[str]]  # the header first
Make = Callable[[Sequence[Row]], Table]


def fill(path: Path, rows: Sequence[Row]) -> None:
    """Put every table for which there are ``rows`` in its place in the page; the others stay as they are.

    Raises NMSparseError for a page without the place.
    """
    page = path.read_text()
    for make in TABLES:
        header, *lines = make(rows)
        if lines:
            text = "".join(f"| {' | '.join(line)} |\n" for line in (header, *lines))
            page = _put(page, make.__name__, text.replace("\n", f"\n|{'---|' * len(header)}\n", 1), path)
    path.write_text(page)


def _put(page: str, name: str, text: str, path: Path) -> str:
    start, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
    before, found, rest = page.partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise NMSparseError(f"{path}: expected a place for a table between {start.strip()} and {end}")
    return before + start + text + end + after


def methods(rows: Sequence[Row]) -> Table:
    """Loss of every pattern by every method."""
    loss = _losses(rows, "methods")
    columns = list(dict.fromkeys(method for _, method in loss))
    header = ["pattern", *(f"`{method}`" for method in columns)]
    return [header, *([f"`{p}`", *(loss.get((p, m), "") for m in columns)] for p in PATTERNS if loss)]


def orders(rows: Sequence[Row]) -> Table:
    """Loss of every pattern with neurons and channels in order."""
    loss = _losses(rows, "orders")
    columns = list(dict.fromkeys(method for _, method in loss))
    table = [["pattern", "order", *(f"`{method}`" for method in columns)]]
    if not loss:
        return table
    loss |= _losses(rows, "methods")
    for pattern in PATTERNS:
        for order in ("as it is", "neurons", "neurons and channels"):
            name = pattern if order == "as it is" else f"{pattern}, {order}"
            if (name, columns[0]) in loss:
                table.append([f"`{pattern}`", order, *(loss[name, method] for method in columns)])
    return table


def neurons(rows: Sequence[Row]) -> Table:
    """Fewer neurons, and 2:4 of the rest."""
    mine = sorted((row for row in rows if row.table == "neurons"), key=lambda row: row.pattern)
    return [["experts", "bytes", "loss"], *([r.pattern, f"{r.nbytes:,}", f"{r.loss:+.3f}"] for r in mine)]


def heights(rows: Sequence[Row]) -> Table:
    """Loss of V:N:M and of Samoyeds by V."""
    loss = _losses(rows, "heights")
    table = [["", "method", *(f"V = {v}" for v in HEIGHTS)]]
    if not loss:
        return table
    for family, name in (("V:N:M", "vnm:{}:2:8"), ("Samoyeds", "samoyeds:1:2:{}")):
        for method in ("magnitude", "admm"):
            table.append([family, method, *(loss.get((name.format(v), method), "") for v in HEIGHTS)])
    return table


def bars(rows: Sequence[Row]) -> Table:
    """The rows that the project promises something of."""
    table = [["experts", "method", "bytes", "bits per byte", "loss", "seconds to prune"]]
    for r in (row for row in rows if row.table == "bars"):
        table.append([r.pattern, r.method, f"{r.nbytes:,}", f"{r.bits:.4f}", f"{r.loss:+.4f}", f"{r.seconds:.0f}"])
    return table


def budget(rows: Sequence[Row]) -> Table:
    """Uniform patterns and allocations under one number of bytes, over the seeds."""
    table = [["each expert is", "bytes", "loss of each third", "mean", "error", "experts of the first third"]]
    tables = ("uniform", *ALLOCATIONS)
    for (_, pattern, _), mine in _seeds(rows, tables).items():
        kinds = sum((Counter(layer) for layer in mine[0].kinds), Counter())
        nbytes, error = max(row.nbytes for row in mine), statistics.mean(row.stream_loss for row in mine)
        mean = f"{statistics.mean(row.loss for row in mine):+.3f}"
        counts = ", ".join(f"{count} × {kind}" for kind, count in kinds.most_common())
        table.append([pattern.replace(" / ", ", "), f"{nbytes:,}", _each(mine), mean, f"{error:.2f}", counts])
    return table


def seeds(rows: Sequence[Row]) -> Table:
    """The losses by other calibration texts."""
    table = [["pattern", "loss of each third", "spread"]]
    for (_, pattern, _), mine in sorted(_seeds(rows, ["seeds"]).items(), key=lambda item: PATTERNS.index(item[0][1])):
        losses = [row.loss for row in mine]
        table.append([f"`{pattern}`", _each(mine), f"{max(losses) - min(losses):.3f}"])
    return table


def recovered(rows: Sequence[Row]) -> Table:
    """What training into a pattern leaves of the loss; a star marks one shot on a part of the held-out text."""
    table = [["pattern", "density", "bytes", "one shot, best method", "trained", "loss of each seed", "median"]]
    for (_, pattern, method), mine in sorted(_seeds(rows, ["recovered"]).items(), key=lambda item: -item[1][0].nbytes):
        best, median = one_shot(rows, pattern), statistics.median(row.loss for row in mine)
        density = f"{parse(pattern).density:.0%}"
        part = "" if best and best.table in FULL else "*"
        nbytes, before = f"{mine[0].nbytes:,}", f"{best.loss:+.3f}{part} (`{best.method}`)" if best else ""
        table.append([f"`{pattern}`", density, nbytes, before, method, _each(mine), f"{median:+.3f}"])
    return table


TABLES: tuple[Make, ...] = (methods, orders, neurons, heights, bars, budget, seeds, recovered)


def _losses(rows: Sequence[Row], table: str) -> dict[tuple[str, str], str]:
    """Losses of a table as text, by pattern and method."""
    return {(row.pattern, row.method): f"{row.loss:+.3f}" for row in rows if row.table == table}


def _seeds(rows: Sequence[Row], tables: Sequence[str]) -> dict[tuple[str, str, str], list[Row]]:
    """Rows that differ in their seed alone, by table, pattern and method, tables in this order."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    mine = (row for row in rows if row.table in tables)
    for row in sorted(mine, key=lambda row: (tables.index(row.table), row.seed)):
        groups.setdefault((row.table, row.pattern, row.method), []).append(row)
    return groups


def _each(rows: Sequence[Row]) -> str:
    return ", ".join(f"{row.loss:+.3f}" for row in rows)
