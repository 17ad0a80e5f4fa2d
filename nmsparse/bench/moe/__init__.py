"""MoE layers on a GPU, everything after the router's logits: ours against torch, transformers and a Triton kernel.

A time is that of a call inside a CUDA graph of several calls, between events around replays. Experts take turns, so
that few tokens do not find their weights in the cache (:func:`~nmsparse.bench.moe.cases.take_turns`). What cannot be in
a graph, because it waits for the GPU, is timed as it runs. All contenders get the same ids and routing weights.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

from ...errors import UnsupportedDeviceError, require
from ...formats.pattern import parse
from .cases import MODELS, ROUTINGS, TOKENS, cases_of

__all__ = ["add_arguments", "run"]

PATTERNS = ("2:4", "samoyeds:1:2:128")
QUICK = {"tokens": (1, 64, 4096), "routings": ("uniform",)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``python -m nmsparse bench moe`` alone."""
    group = parser.add_argument_group("of the suite moe")
    group.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS], metavar="NAME", help="default: all")
    group.add_argument("--tokens", nargs="+", type=_count, metavar="T", help=f"default: {' '.join(map(str, TOKENS))}")
    group.add_argument(
        "--patterns",
        nargs="+",
        default=PATTERNS,
        metavar="PATTERN",
        help=f"layer too; default: {' '.join(PATTERNS)}",
    )
    group.add_argument("--routings", nargs="+", choices=ROUTINGS, metavar="ROUTING", help=f"of {' '.join(ROUTINGS)}")
    group.add_argument(
        "--quick",
        action="store_true",
        help="moe: T of 1, 64 and 4096 and uniform routing only; gemm: float16 only, without cuSPARSELt",
    )
    group.add_argument(
        "--budget-seconds", type=float, metavar="S",
        help="moe: no new case of a model after its share of S seconds (default: 400); gemm: none after S",
    )  # fmt: skip


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Makes, checks and times the layers, model by model; prints a line for each case, then the bars."""
    torch = require("torch", "torch")
    if not torch.cuda.is_available():
        raise UnsupportedDeviceError("bench moe: expected an NVIDIA GPU that torch can use, found none")
    from . import report
    from .measure import contenders, measure

    patterns = tuple(dict.fromkeys(str(parse(pattern)) for pattern in args.patterns))
    chosen = QUICK if args.quick else {"tokens": TOKENS, "routings": ROUTINGS}
    tokens = tuple(args.tokens or chosen["tokens"])
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    begin, budget = time.perf_counter(), args.budget_seconds or 400
    with torch.inference_mode():
        for number, name in enumerate(args.models, 1):
            stop = begin + budget * (number + 1) / (len(args.models) + 1)  # the first compiles: two shares
            made, failed = contenders(MODELS[name], patterns)
            rows.append({**report.memory(name, made), "failed": failed})
            _compile(made, tokens, MODELS[name].top_k)
            for case in cases_of(MODELS[name], tokens, args.routings or chosen["routings"]):
                identity = {"model": name, "tokens": case.tokens, "routing": case.routing}
                if time.perf_counter() > stop:
                    rows.append({"what": "left out", **identity})
                    print(f"{name} T={case.tokens} {case.routing}: left out, the model's share of time is spent")
                    continue
                try:
                    row = measure(case, made)
                except RuntimeError as error:  # of CUDA, which is of no use afterwards: report the rows so far
                    rows.append({"what": "broken off", **identity, "failed": {"case": str(error)}})
                    print(f"{name} T={case.tokens} {case.routing}: {error}")
                    return rows + report.bars(rows, ["dense", *patterns])
                report.complete(row, case, made)
                rows.append(row)
                print(report.line(row), flush=True)
            del made
            torch.cuda.empty_cache()
    print(f"measured in {time.perf_counter() - begin:.0f} s")
    return rows + report.bars(rows, ["dense", *patterns])


def _compile(made: dict[str, Any], tokens: Sequence[int], top_k: int) -> None:
    """All of our kernels side by side: one after the other they would take minutes."""
    from ...cuda import launch

    ours = [contender.call._gpu for contender in made.values() if contender.family == "ours"]
    if ours:
        configs = [config for layer in ours for number in tokens for config in layer.configs(number, top_k)]
        launch.compile_all(configs, launch.arch_of(ours[0].device))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text!r}")
    return int(text)
