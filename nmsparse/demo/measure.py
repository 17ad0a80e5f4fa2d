"""What the demo measures of a model: bytes, quality, speed, and the error of the sparse kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from .. import array
from ..formats import SparseArray
from ..formats.pattern import Pattern
from .mixtral import Mixtral, Routing, bits_per_byte

# Windows run together: long matrices for BLAS, and activations that stay near the cache.
BATCH = 8


@dataclass(frozen=True)
class Result:
    """One row of the table. Times are seconds per token, medians over the batches.

    ``error`` is the largest difference of a logit from the masked dense model's, over the largest logit of the batch;
    None for the dense model. It leaves out ``ties`` windows, see :func:`tied`.
    """

    pattern: str
    density: float
    expert_bytes: dict[str, int]
    bits: float
    expert_time: float
    model_time: float
    error: float | None = None
    ties: int = 0

    @property
    def total_bytes(self) -> int:
        """Bytes of all parts of the experts: values, metadata and indices."""
        return sum(self.expert_bytes.values())


class Run:
    """A model on its way through the windows: what it has cost so far, and how well it predicted."""

    def __init__(self, model: Mixtral):
        self.model = model
        self.bits: list[float] = []
        self.expert_times: list[float] = []
        self.model_times: list[float] = []

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Run one batch of windows and return its logits."""
        start = perf_counter()
        logits = self.model(tokens)
        self.model_times.append((perf_counter() - start) / tokens.size)
        self.expert_times.append(self.model.seconds_in_experts / tokens.size)
        self.bits.extend(bits_per_byte(logits[i : i + 1], tokens[i : i + 1]) for i in range(len(tokens)))
        return logits


@dataclass
class Candidate:
    """A sparse model and its reference: the same pruned weights as dense arrays."""

    pattern: Pattern
    sparse: Run
    masked: Mixtral
    error: float = 0.0
    ties: int = 0

    def step(self, tokens: np.ndarray) -> None:
        """Run one batch of windows and compare the logits."""
        logits, expected = self.sparse.step(tokens), self.masked(tokens)
        difference = np.abs(logits - expected).max(axis=(1, 2)) / np.abs(expected).max()
        left_out = tied(self.sparse.model.routing, self.masked.routing, len(tokens))
        self.error = max(self.error, float(difference[~left_out].max(initial=0)))
        self.ties += int(left_out.sum())


def measure(
    model: Mixtral, windows: np.ndarray, patterns: Sequence[Pattern], advance: Callable[[str], None] = lambda _: None
) -> list[Result]:
    """Run ``windows`` (N, T) of bytes through ``model``, dense and with its experts in each of ``patterns``.

    All models take turns on every batch, so that a change in the load of the machine meets them alike. ``advance`` is
    called before each of :func:`steps` steps with what comes next.
    """
    dense = Run(model.with_experts(_float32))
    candidates = []
    for pattern in patterns:
        sparse = model.with_experts(lambda w, pattern=pattern: array(w, pattern))
        candidates.append(Candidate(pattern, Run(sparse), sparse.with_experts(lambda w: _float32(w.todense()))))

    for run in (dense, *(candidate.sparse for candidate in candidates)):
        advance("compiling")
        run.model(windows[:BATCH])
    for start in range(0, len(windows), BATCH):
        batch = windows[start : start + BATCH]
        advance("dense")
        dense.step(batch)
        for candidate in candidates:
            advance(str(candidate.pattern))
            candidate.step(batch)
    return [
        _result("dense", dense, model),
        *(_result(str(c.pattern), c.sparse, c.sparse.model, c.error, c.ties) for c in candidates),
    ]


def tied(routing: Routing, expected: Routing, windows: int) -> np.ndarray:
    """The ``windows`` in which two models chose different experts for a token only because these tied, as bool (N,).

    Two experts whose router logits differ by less than the rounding errors of the layers before fall either way, and
    from there on the models differ for good. In the first layer that differs, a tie shows in the weights: they agree.

    >>> weights = np.array([[0.6, 0.4]])
    >>> tied([(np.array([[0, 1]]), weights)], [(np.array([[0, 2]]), weights)], 1)
    array([ True])
    """
    found, undecided = np.zeros(windows, dtype=bool), np.ones(windows, dtype=bool)
    for (ids, weights), (expected_ids, expected_weights) in zip(routing, expected, strict=True):
        differ = (np.sort(ids) != np.sort(expected_ids)).any(axis=1).reshape(windows, -1)
        agree = (np.abs(weights - expected_weights) < 1e-5).all(axis=1).reshape(windows, -1)
        found |= undecided & differ.any(axis=1) & (agree | ~differ).all(axis=1)
        undecided &= ~differ.any(axis=1)
    return found


def steps(windows: int, patterns: int) -> int:
    """How often :func:`measure` calls ``advance``."""
    return (1 + patterns) * (1 + -(-windows // BATCH))


def _float32(weight: np.ndarray) -> np.ndarray:
    """Dense experts are widened once, not at every product, to the advantage of the dense side."""
    return weight.astype(np.float32)


def _result(name: str, run: Run, stored: Mixtral, error: float | None = None, ties: int = 0) -> Result:
    """``stored`` is the model whose experts are counted: for the dense row, the checkpoint's own."""
    expert_bytes: dict[str, int] = {}
    kept = size = 0
    for weight in (w for experts in stored.experts for w in (experts.gate_up, experts.down)):
        buffers = weight.buffers() if isinstance(weight, SparseArray) else {"values": weight}
        for part, buffer in buffers.items():
            expert_bytes[part] = expert_bytes.get(part, 0) + buffer.nbytes
        kept, size = kept + buffers["values"].size, size + weight.size
    return Result(
        pattern=name,
        density=kept / size,
        expert_bytes=expert_bytes,
        bits=float(np.mean(run.bits)),
        expert_time=float(np.median(run.expert_times)),
        model_time=float(np.median(run.model_times)),
        error=error,
        ties=ties,
    )
