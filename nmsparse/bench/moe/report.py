"""From measured rows to ratios, shares of the floor, and the bars."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .. import bar
from ..gemm import BANDWIDTH
from .cases import Case
from .measure import CHECKS, Contender

__all__ = ["bars", "complete", "line", "memory"]

# TFLOP/s that a bf16 product reaches: cuBLAS at 8192 cubed, and `wgmma.sp` with operands in place, which counts the
# zeros of 2:4. A pattern that also skips whole rows or columns counts those too, so its rate is in proportion.
DENSE_RATE, SPARSE_RATE = 690e12, 1425e12
PEERS = ("torch", "triton")
SAMOYEDS = "samoyeds:1:2:128"
TOKENS: dict[str, Callable[[int], bool]] = {
    "all T": lambda tokens: True,
    "T >= 512": lambda tokens: tokens >= 512,
    "T <= 64": lambda tokens: tokens <= 64,
}
PROMISED = (  # geometric means of the best peer's time over ours
    (SAMOYEDS, "torch", "T >= 512", 3.0),
    (SAMOYEDS, "torch", "T <= 64", 3.0),
    ("2:4", "torch", "all T", 1.9),
    ("dense", "torch", "all T", 1.2),
    (SAMOYEDS, "triton", "all T", 2.0),
    ("2:4", "triton", "all T", 1.3),
)
YARDSTICK = "grouped_mm"  # the peer whose error is compared with
Rows = list[dict[str, Any]]


def complete(row: dict[str, Any], case: Case, contenders: dict[str, Contender]) -> None:
    """Add to a row the floor of each of ours in seconds, the best peer of each family, and ours over it."""
    ours = [name for name, contender in contenders.items() if contender.family == "ours"]
    row["floor"] = {name: floor(case, row["active"], contenders[name]) for name in ours}
    row["best"], row["over"] = {}, {}
    for family in PEERS:
        rivals = {name: taken for name, taken in row["seconds"].items() if contenders[name].family == family}
        if rivals:
            row["best"][family] = min(rivals, key=rivals.__getitem__)
            row["over"][family] = {
                name: min(rivals.values()) / row["seconds"][name] for name in ours if name in row["seconds"]
            }


def floor(case: Case, active: int, contender: Contender) -> float:
    """Seconds that the layer takes at least: its operations, or the weights of its active experts, read once."""
    rate = SPARSE_RATE * 0.5 / contender.density if contender.density < 1 else DENSE_RATE
    return max(case.operations / rate, contender.nbytes * active / case.model.experts / BANDWIDTH)


def line(row: dict[str, Any]) -> str:
    """A row in words: µs of ours with their share of the floor, then the best peers with ours over them."""
    taken = row["seconds"]
    parts = [f"{row['model']:<16} T={row['tokens']:<5} {row['routing']:<7} µs:"]
    for name, least in row["floor"].items():
        if name in taken:
            parts.append(f"{name} {taken[name] * 1e6:.1f} ({100 * least / taken[name]:.0f} % of floor)")
    for family, best in row["best"].items():
        ratios = "/".join(f"{ratio:.2f}" for ratio in row["over"][family].values())
        waits = " (host included)" if best in row["waits"] else ""
        parts.append(f"| {best}{waits} {taken[best] * 1e6:.1f}: x{ratios}")
    return " ".join(parts)


def memory(model: str, contenders: dict[str, Contender]) -> dict[str, Any]:
    """Bytes of the weights of each contender, and of the dense 16-bit weights over them."""
    sizes = {name: contender.nbytes for name, contender in contenders.items()}
    dense = {name: sum(w.nbytes for w in contender.weights) for name, contender in contenders.items()}
    smaller = {name: dense[name] / size for name, size in sizes.items()}
    ours = [name for name, contender in contenders.items() if contender.family == "ours"]
    print(
        f"{model}: weights " + ", ".join(f"{name} {sizes[name] / 1e6:.0f} MB (x{smaller[name]:.2f})" for name in ours)
    )
    return {"what": "memory", "model": model, "bytes": sizes, "smaller": smaller}


def bars(rows: Rows, ours: list[str]) -> Rows:
    """The promises, from the measured rows; what was not measured is said, and is no row."""
    cases = [row for row in rows if row["what"] == "case"]
    found: Rows = []

    def promise(what: str, values: list[float], of: Callable[[list[float]], float], bound: float, **side: bool) -> None:
        if values:
            found.append(bar(what, of(values), bound, **side))
        else:
            print(f"{what}: not measured")

    for name in ours:
        for family in PEERS:
            for words in ("T >= 512", "T <= 64"):
                if ratios := _ratios(cases, family, name, words):
                    what = f"{name}, {words}, geometric mean of best {family} / ours"
                    print(f"{what}: {_mean(ratios):.2f}")
                    found.append({"what": what, "value": _mean(ratios)})
    for name, family, words, bound in PROMISED:
        if name in ours:
            what = f"{name}, {words}, geometric mean of best {family} / ours"
            promise(what, _ratios(cases, family, name, words), _mean, bound)
    for name in ours:
        ratios = [ratio for family in PEERS for ratio in _ratios(cases, family, name, "all T")]
        promise(f"{name}, least of any peer / ours", ratios, min, 1.0)
        errors = [row["error"] for row in cases if {name, YARDSTICK} <= set(row["error"])]
        grown = [error[name] / error[YARDSTICK] for error in errors]
        promise(f"{name}, largest error against fp64 over that of {YARDSTICK}", grown, max, 1.1, at_least=False)
    if SAMOYEDS in ours:
        smaller = [row["smaller"][SAMOYEDS] for row in rows if SAMOYEDS in row.get("smaller", {})]
        promise(f"{SAMOYEDS}, least of 16-bit weights / ours in bytes", smaller, min, 3.4)
    for check in CHECKS:
        passed = [float(checks[check]) for row in cases for checks in row["checks"].values() if check in checks]
        promise(f"ours, {check}, part of the cases", passed, lambda values: sum(values) / len(values), 1)
    failures = [len(row["failed"]) for row in rows if "failed" in row]
    promise("layers that failed", failures, sum, 0, at_least=False)
    return found


def _ratios(cases: Rows, family: str, name: str, words: str) -> list[float]:
    """Best peer's time over that of ours, for the numbers of tokens that ``words`` name."""
    chosen = TOKENS[words]
    found = (row["over"].get(family, {}).get(name) for row in cases if chosen(row["tokens"]))
    return [ratio for ratio in found if ratio is not None]


def _mean(ratios: list[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))
