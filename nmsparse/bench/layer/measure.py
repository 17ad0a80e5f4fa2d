"""One case: every contender is checked against the plain loop over its experts, then all are timed in turns."""

from __future__ import annotations

import functools
from typing import Any

from ...errors import require
from ..gpu import Timed, attempt, captured, seconds_of, waits_for_gpu
from ..moe.weights import relative_error
from ..timing import medians
from .stacks import Case, Contender, Past

__all__ = ["measure", "median_error", "replay_error"]

WRONG = 0.03  # relative error of what a layer adds to its input; bfloat16 rounds that sum too
MOST_COPIED = 12e9  # bytes of weights, those of each pair, that batched_mm may copy; it is the slowest long before
CALLS = 4  # of a graph, each with other tokens, so with other experts
SCALE = 0.1  # of the input: what a layer adds outweighs it


def measure(case: Case, model: Any, made: dict[str, Contender], row: dict[str, Any]) -> None:
    """Fill in ``row``: errors, how it was timed, and seconds of a layer for each contender, and why one has none."""
    torch = require("torch", "torch")
    weight = model.layers[0].mlp.experts.down_proj
    cuda = weight.is_cuda

    def tokens() -> Any:
        return weight.new_empty(case.sequences, case.tokens, model.config.hidden_size).normal_(0, SCALE)

    inputs = [tokens() for _ in range(CALLS if case.past else 1)]
    last = case.past or case.tokens
    rotary = model.rotary_emb(inputs[0], torch.arange(last - case.tokens, last, device=weight.device)[None])
    depth = len(made["eager"].layers)
    pasts = [Past(model.config, case, weight) if case.past else None for _ in range(depth)]
    wanted: dict[int, Any] = {}
    timed: dict[str, Timed] = {}
    row.update({name: {} for name in ("error", "how", "seconds", "failed", "left_out")})

    def prepare(name: str, contender: Contender) -> None:
        if id(contender.reference) not in wanted:
            wanted[id(contender.reference)] = _added(contender.reference, inputs[0], rotary, pasts[:1])
        got = _added(contender, inputs[0], rotary, pasts[:1])
        row["error"][name] = error = relative_error(got, wanted[id(contender.reference)])
        if error > WRONG:
            raise ValueError(f"relative error {error:.2g} against the plain loop; what is wrong is not timed")
        if not case.past:  # a graph would gain nothing: the GPU is busy
            timed[name], row["how"][name] = Timed(lambda: contender(inputs[0], rotary, pasts[:1]), 1), "as it runs"
            return
        runs = [functools.partial(contender, x, rotary, pasts) for x in inputs]
        timed[name], row["how"][name] = Timed(lambda: [run() for run in runs], len(runs) * depth), "as it runs"
        if cuda and not waits_for_gpu(runs[0]):
            graph, results = captured(runs)
            error = replay_error(graph, results, runs, inputs, [tokens() for _ in inputs])
            if error > WRONG:
                row["how"][name] = f"as it runs, since a replayed graph is wrong by {error:.2g}"
            else:
                timed[name], row["how"][name] = graph._replace(calls=len(runs) * depth), "graph"

    for name, contender in made.items():
        pairs = case.sequences * case.tokens * model.config.num_experts_per_tok
        copied = pairs * contender.experts_nbytes / len(weight)
        if contender.implementation == "batched_mm" and copied > MOST_COPIED:
            row["left_out"][name] = f"would copy {copied * 1e-9:.0f} GB of weights in a call"
        else:
            attempt(row["failed"], name, functools.partial(prepare, name, contender))
    if cuda:
        row["seconds"] = seconds_of(timed)
    else:
        taken = medians({name: one.run for name, one in timed.items()}, seconds=0.01, rounds=1)
        row["seconds"] = {name: seconds / timed[name].calls for name, seconds in taken.items()}


def replay_error(graph: Timed, results: list[Any], runs: list[Any], inputs: list[Any], others: list[Any]) -> float:
    """How far a replay with ``others`` in place of ``inputs`` is from a call, by :func:`median_error`; ``inputs`` are
    put back, since what the next contender is compared with was made from them."""
    kept = [x.clone() for x in inputs]
    for x, other in zip(inputs, others, strict=True):
        x.copy_(other)
    graph.run()
    got = [result - x for result, x in zip(results, inputs, strict=True)]
    want = [run() - x for run, x in zip(runs, inputs, strict=True)]
    error = median_error(got, want)
    for x, old in zip(inputs, kept, strict=True):
        x.copy_(old)
    return error


def median_error(got: list[Any], want: list[Any]) -> float:
    """Norm of a token's difference over that of what is wanted, in the median of all tokens; inf where one is NaN.

    The median, since two calls of the same layer differ: the attention of torch adds up its parts in any order, and
    now and then another last bit turns a choice between two experts. A graph that reads or routes what it should not
    is wrong for most tokens; whether the experts are right is checked before, on the whole.
    """
    torch = require("torch", "torch")
    errors = [
        (g.double() - w.double()).norm(dim=-1).flatten() / w.double().norm(dim=-1).flatten()
        for g, w in zip(got, want, strict=True)
    ]
    error = float(torch.cat(errors).quantile(0.5, interpolation="nearest"))
    return error if error == error else float("inf")


def _added(contender: Contender, x: Any, rotary: Any, pasts: list[Any]) -> Any:
    """What one layer adds to its input, in float32."""
    return contender(x, rotary, pasts).float() - x.float()
