"""One case: every implementation of the layer is checked, then all are timed in turns."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ...errors import require
from ...formats.pattern import parse
from ...moe import SparseExperts
from ...ops import array
from ..gpu import Failures, Timed, attempt, captured, seconds_of, waits_for_gpu
from . import peers
from .cases import Case, Model, route, take_turns
from .weights import exact, random_weight, relative_error

__all__ = ["CHECKS", "Contender", "contenders", "measure"]

WRONG = 0.02  # relative error; layers in bfloat16 have 0.003 to 0.006
CHECKED = 16  # tokens of a case that are compared with float64
MOST_COPIED = 8e9  # bytes of weights, those of each pair, that batched_mm may copy; it is the slowest long before
CHECKS = ("repeatable", "never waits", "follows the routing")  # of ours, beside the error
TUNING = 1.5  # seconds a case, for the tiles of the Triton kernel


class Contender(NamedTuple):
    """One implementation: ``call(x, ids, weights)``, the dense ``weights`` that its results are compared with, the
    bytes of its own copy of them and the part of them that it stores."""

    family: str
    call: Callable[[Any, Any, Any], Any]
    weights: tuple[Any, Any]
    nbytes: int
    density: float = 1.0
    implementation: str = ""  # of transformers


def contenders(model: Model, patterns: tuple[str, ...], device: str = "cuda") -> tuple[dict[str, Contender], Failures]:
    """All implementations of one layer, bfloat16, and why others could not be made. The dense weights are random;
    those of a pattern are random weights that obey it, so that pruning them loses nothing."""
    torch = require("torch", "torch")
    generator = torch.Generator(device).manual_seed(0)
    gate_up = model.experts, 2 * model.intermediate, model.hidden
    down = model.experts, model.hidden, model.intermediate

    def weights(pattern: str) -> tuple[Any, Any]:
        made = (random_weight(shape, pattern, device, torch.bfloat16, generator) for shape in (gate_up, down))
        return tuple(made)  # type: ignore[return-value]

    def ours(pattern: str) -> Contender:
        if pattern == "dense":
            return theirs("ours", SparseExperts(*dense))
        own = weights(pattern)
        held = [array(w, pattern) for w in own]
        layer = SparseExperts(*held).compact()
        return Contender("ours", layer, own, layer.nbytes, parse(pattern).density)

    def theirs(family: str, call: Any, implementation: str = "") -> Contender:
        return Contender(family, call, dense, sum(w.nbytes for w in dense), implementation=implementation)

    def triton() -> Contender:
        require("triton", "torch")
        from .triton_moe import TritonExperts

        return theirs("triton", TritonExperts(*dense))

    dense = weights("dense")
    makers: dict[str, Callable[[], Contender]] = {p: functools.partial(ours, p) for p in ("dense", *patterns)}
    makers |= {
        "grouped_mm": lambda: theirs("torch", peers.grouped_mm(*dense, add=False)),
        "grouped_mm, index_add": lambda: theirs("torch", peers.grouped_mm(*dense, add=True)),
    }
    for name in peers.IMPLEMENTATIONS:
        makers[f"transformers {name}"] = lambda name=name: theirs(
            "torch", peers.transformers_experts(name, *dense), name
        )
    makers["triton"] = triton
    made: dict[str, Contender] = {}
    failed: Failures = {}
    for name, make in makers.items():
        attempt(failed, name, lambda name=name, make=make: made.update({name: make()}))
    return made, failed


def measure(case: Case, contenders: dict[str, Contender], device: str = "cuda") -> dict[str, Any]:
    """One row of the report: errors, checks and seconds of each contender, and why one has none."""
    torch = require("torch", "torch")
    routed, shares = route(case)
    counts = np.bincount(routed.ravel(), minlength=case.model.experts)
    turns = [torch.from_numpy(ids).to(device) for ids in take_turns(routed, case.model.experts, case.calls)]
    weights = torch.from_numpy(shares).to(device)
    x = torch.randn(case.tokens, case.model.hidden, device=device, dtype=torch.bfloat16)
    sample = torch.linspace(0, case.tokens - 1, min(CHECKED, case.tokens), device=device).long()
    row: dict[str, Any] = {
        "what": "case",
        "model": case.model.name,
        "tokens": case.tokens,
        "routing": case.routing,
        "active": int(np.count_nonzero(counts)),
        "busiest": float(counts.max() / counts.mean()),
        "waits": [name for name, contender in contenders.items() if contender.implementation == "eager"],
        **{name: {} for name in ("error", "checks", "seconds", "failed", "left_out")},
    }
    wanted: dict[int, Any] = {}
    timed: dict[str, Timed] = {}

    def prepare(name: str, contender: Contender) -> None:
        inputs = [(ids, weights) for ids in turns]
        if contender.implementation:
            inputs = [(ids.long(), weights.to(x.dtype)) for ids in turns]
        if contender.family == "triton":
            row["triton"] = _tune(contender.call, x, turns, weights)
        first = contender.call(x, *inputs[0])
        key = id(contender.weights[0])
        if key not in wanted:
            wanted[key] = exact(x[sample], turns[0][sample], weights[sample], *contender.weights)
        row["error"][name] = error = relative_error(first[sample], wanted[key])
        if error > WRONG:
            raise ValueError(f"relative error {error:.2g} against float64; what is wrong is not timed")
        runs = [functools.partial(contender.call, x, *given) for given in inputs]
        ours = contender.family == "ours"
        waits = name in row["waits"] or (ours and waits_for_gpu(runs[0]))
        if ours:
            row["checks"][name] = {"repeatable": first.equal(runs[0]()), "never waits": not waits}
        if waits:
            timed[name] = Timed(lambda: [run() for run in runs], len(runs))
            return
        timed[name], results = captured(runs)  # fails where a call waits in a way that torch does not see
        timed[name].run()
        error = relative_error(results[0][sample], wanted[key])
        if error > WRONG:
            raise ValueError(f"a replayed graph has a relative error of {error:.2g}: it does not do what the call does")
        if ours:
            other = torch.from_numpy(route(case, seed=1)[0])
            row["checks"][name]["follows the routing"] = _follows(runs[0], turns[0], other, timed[name], results[0])

    for name, contender in contenders.items():
        copied = case.pairs * contender.nbytes / case.model.experts
        if contender.implementation == "batched_mm" and copied > MOST_COPIED:
            row["left_out"][name] = f"would copy {copied * 1e-9:.0f} GB of weights in a call"
        else:
            attempt(row["failed"], name, functools.partial(prepare, name, contender))
    row["seconds"] = seconds_of(timed)
    return row


def _tune(experts: Any, x: Any, turns: list[Any], weights: Any) -> str:
    from .triton_moe import tune

    def seconds(runs: Any) -> float:
        return seconds_of({"": captured(runs)[0]}, span=0.002, rounds=2, rest=0)[""]

    return str(tune(experts, x, turns, weights, seconds, TUNING))


def _follows(run: Callable[[], Any], ids: Any, other: Any, graph: Timed, result: Any) -> bool:
    """Whether a graph computes ``result`` from what is in ``ids`` when it is replayed, bit for bit like a call."""
    kept = ids.clone()
    ids.copy_(other)
    graph.run()
    same = result.equal(run())
    ids.copy_(kept)
    return same
