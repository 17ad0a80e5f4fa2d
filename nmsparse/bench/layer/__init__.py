"""Decoder layers of transformers, attention and all: experts made sparse by two lines against its dense ones.

Prefill is timed as it runs. Decoding is timed in a CUDA graph where the layer can be captured and a replay does what
the call does; what cannot is timed as it runs, the host included, and the table says so.
"""

from __future__ import annotations

import argparse
import functools
import gc
import time
from collections.abc import Sequence
from typing import Any

from ...errors import UnsupportedDeviceError, require
from ...formats.pattern import parse
from .. import bar
from ..gpu import attempt
from .host import host_times
from .measure import measure
from .stacks import CASES, LAYERS, Case, Shape, contenders

__all__ = ["bars", "line", "measure_layer", "run"]

SAMOYEDS = "samoyeds:1:2:128"
FASTER, SMALLER = 1.5, 3.4  # what is promised of Samoyeds experts: against the best dense ones, and in memory
Rows = list[dict[str, Any]]


def run(args: argparse.Namespace) -> Rows:
    """Makes, checks and times the layers; prints a line for each case, then the bars."""
    torch = require("torch", "torch")
    require("transformers", "torch")
    if not torch.cuda.is_available():
        raise UnsupportedDeviceError("bench layer: expected an NVIDIA GPU that torch can use, found none")
    patterns = tuple(dict.fromkeys(str(parse(pattern)) for pattern in args.patterns))
    begin, rows = time.perf_counter(), []
    for shape in LAYERS:
        rows += measure_layer(shape, patterns, CASES, "cuda", torch.bfloat16)
    failed: dict[str, str] = {}
    attempt(failed, "host times", lambda: rows.extend(host_times()))
    print(f"measured in {time.perf_counter() - begin:.0f} s")
    return [*rows, *([{"what": "host times", "failed": failed}] if failed else []), *bars(rows)]


def measure_layer(shape: Shape, patterns: tuple[str, ...], cases: Sequence[Case], device: str, dtype: Any) -> Rows:
    """The rows of one model's layer: memory of the experts, then one for each case."""
    torch = require("torch", "torch")
    torch.manual_seed(0)
    rows: Rows = []
    with torch.no_grad():
        model, made, held, failed = contenders(shape, patterns, device, dtype)
        smaller = {name: held["dense"] / nbytes for name, nbytes in held.items() if name != "dense"}
        rows.append({"what": "memory", "model": shape.name, "bytes": held, "smaller": smaller, "failed": failed})
        sizes = (f"{name} {held[name] / 1e6:.0f} MB (x{ratio:.2f} smaller)" for name, ratio in smaller.items())
        print(f"{shape.name}: experts of a layer, dense {held['dense'] / 1e6:.0f} MB, {', '.join(sizes)}", flush=True)
        if device != "cpu":
            attempt(failed, "compiling", functools.partial(_compile, model.config, made, patterns, cases))
        for case in cases:
            row: dict[str, Any] = {"what": "case", "model": shape.name, **case._asdict()}
            broken: dict[str, str] = {}
            attempt(broken, f"{shape.name}, {case.name}", functools.partial(measure, case, model, made, row))
            row["failed"] = {**row.get("failed", {}), **broken}
            complete(row, patterns)
            rows.append(row)
            print(line(row), flush=True)
        del model, made
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return rows


def _compile(config: Any, made: dict[str, Any], patterns: Sequence[str], cases: Sequence[Case]) -> None:
    """All of our kernels side by side: one after the other they would take minutes."""
    from ...cuda import launch
    from ...torch.arrays import experts_of

    layers = [made[name].layers[0].mlp.experts for name in patterns if name in made]
    ours = [experts_of(layer.gate_up_proj(), layer.down_proj(), "silu")._gpu for layer in layers]
    tokens, top_k = {case.sequences * case.tokens for case in cases}, config.num_experts_per_tok
    configs = [found for experts in ours for number in tokens for found in experts.configs(number, top_k)]
    if configs:
        launch.compile_all(configs, launch.arch_of(ours[0].device))


def complete(row: dict[str, Any], patterns: Sequence[str]) -> None:
    """Add the best dense implementation, and its time over that of each pattern."""
    taken = row.get("seconds", {})
    dense = {name: seconds for name, seconds in taken.items() if name not in patterns}
    row["best"] = min(dense, key=dense.__getitem__, default=None)
    row["over"] = {name: dense[row["best"]] / taken[name] for name in patterns if dense and name in taken}


def line(row: dict[str, Any]) -> str:
    """A row in words: µs of a layer for each contender, and the best dense one over ours."""
    parts = [f"{row['model']} {row['name']}, µs a layer:"]
    for name, seconds in row.get("seconds", {}).items():
        how = "" if row["how"][name] == "graph" or not row["past"] else f" ({row['how'][name]})"
        ratio = f" x{row['over'][name]:.2f}" if name in row["over"] else ""
        parts.append(f"{name} {seconds * 1e6:.1f}{ratio}{how};")
    parts += [f"{name}: {why};" for name, why in (row.get("left_out", {}) | row["failed"]).items()]
    return " ".join([*parts, f"best dense: {row['best']}"])


def bars(rows: Rows) -> Rows:
    """The promises, from the measured rows; what was not measured is said, and is no row."""
    found: Rows = []
    for row in rows:
        if row["what"] == "case":
            what, values, bound = f"best dense ({row['best']}) / Samoyeds", row["over"], FASTER
        elif row["what"] == "memory":
            what, values, bound = "memory of dense experts / Samoyeds", row["smaller"], SMALLER
        else:
            continue
        what = f"{row['model']}{' ' + row['name'] if row['what'] == 'case' else ''}: {what}"
        if SAMOYEDS in values:
            found.append(bar(what, values[SAMOYEDS], bound))
        else:
            print(f"{what}: not measured")
    return found
