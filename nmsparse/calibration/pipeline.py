"""Calibrated pruning of a model's experts, layer after layer, each with the inputs that the pruned ones before make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import NMSparseError
from ..formats import Pattern, SparseArray, parse
from ..formats.mixed import DROP
from ..prune.experts import take_neurons
from ..prune.hessian import quadratic_loss, shrunk
from ..prune.methods import KEEP_VALUES, METHODS, NEEDS_NO_DATA, prune_weight, restored
from .record import LayerRecord, hidden_moments
from .walk import Walk

Weight = SparseArray | np.ndarray | None  # None: the expert is dropped
Neurons = Callable[[LayerRecord, int], np.ndarray]
FEW = 2  # tokens per input column: with fewer, an expert's own Hessian says too little


@dataclass(frozen=True)
class ExpertReport:
    """What pruning did to one expert.

    ``gate_up_loss`` and ``down_loss`` are squared output errors over squared outputs on the calibration tokens; that of
    ``down`` is the expert's as a whole, since its target is the output of the dense expert. ``stream_loss`` is the
    squared error of g E(x) over the square of the residual stream that the layer adds to (or over the tokens, where the
    stream is not known): it adds up over experts and layers. ``few`` says that the expert saw too few
    tokens for a Hessian of its own: ``gate_up`` was pruned with that of the layer blended in, ``down`` by ``wanda``
    (by ``magnitude`` if there were none).
    """

    layer: int
    expert: int
    pattern: str
    tokens: int
    few: bool
    density: float
    nbytes: int
    gate_up_loss: float
    down_loss: float
    stream_loss: float


Listener = Callable[[ExpertReport], None]


@dataclass(frozen=True)
class PrunedLayer:
    """The experts of one layer, sparse arrays (dense where nothing was pruned, None if dropped), a report on each."""

    gate_up: list[Weight]
    down: list[Weight]
    reports: list[ExpertReport]


def prune_layers(
    walk: Walk,
    patterns: str | Pattern | Sequence[Sequence[str]],
    method: str = "admm",
    *,
    neurons: Neurons | None = None,
    observed: Sequence[LayerRecord] | None = None,
    on_expert: Listener | None = None,
) -> list[PrunedLayer]:
    """Prune the experts of every layer of ``walk`` to ``patterns`` by ``method``.

    ``patterns`` is one pattern, or a name for each expert of each layer, among them ``"dense"`` and ``"drop"``: an
    expert that writes nothing and takes no memory, though the router still knows it. ``method`` is a key of
    :data:`nmsparse.prune.METHODS`. ``neurons(record, expert)`` numbers the neurons to keep, in a new order if it likes,
    as many for each expert of a layer; they are taken before anything is pruned, since moving them later would break
    the pattern. ``observed`` are records with gradients, as :func:`~nmsparse.calibration.huggingface.observe` makes
    them: an error of ``down``'s outputs then counts by its gradient, and neurons by HEAPr. ``on_expert`` is called with
    each report as it is made.

    For each layer: one pass over the tokens for the statistics, ``gate_up`` is pruned, a second pass finds what
    ``down`` now reads, and ``down`` is pruned to write what the dense expert wrote. Then the layers after see the
    pruned layer. Hessians of one layer are in memory at a time.
    """
    _check_method(method)
    done = []
    for layer in range(len(walk)):
        names = _names(walk, layer, patterns)
        if set(names) == {DROP}:
            raise NMSparseError(f"patterns: expected one expert of layer {layer} at least that is not dropped")
        work = _Layer(walk, layer, method, neurons, observed[layer] if observed else None)
        done.append(work.prune(names, on_expert))
        walk.replace(layer, *map(dense_stack, (done[-1].gate_up, done[-1].down)))
    return done


def try_patterns(
    walk: Walk, patterns: Sequence[str], method: str = "admm", *, on_expert: Listener | None = None
) -> list[list[list[ExpertReport]]]:
    """What each pattern would do to each expert of the otherwise dense model: ``reports[pattern][layer][expert]``.

    The losses to allocate patterns by. Every pattern meets the same statistics, which are gathered once.
    """
    _check_method(method)
    reports: list[list[list[ExpertReport]]] = [[] for _ in patterns]
    for layer in range(len(walk)):
        work = _Layer(walk, layer, method, None, None)
        for found, pattern in zip(reports, patterns, strict=True):
            found.append(work.prune(_names(walk, layer, pattern), on_expert).reports)
        walk.replace(layer, work.record.gate_up, work.record.down)
    return reports


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise NMSparseError(f"method: expected one of {', '.join(METHODS)}; got {method!r}")


def _names(walk: Walk, layer: int, patterns: str | Pattern | Sequence[Sequence[str]]) -> list[str]:
    experts = walk.experts(layer).num_experts
    if isinstance(patterns, (str, Pattern)):
        return [patterns if patterns in ("dense", DROP) else str(parse(patterns))] * experts
    if len(patterns) != len(walk) or len(patterns[layer]) != experts:
        raise NMSparseError(f"patterns: expected one for each of {experts} experts in {len(walk)} layers")
    return list(patterns[layer])


class _Layer:
    """The experts of one layer on their way from dense to sparse; ``record`` keeps the dense ones."""

    def __init__(self, walk: Walk, layer: int, method: str, neurons: Neurons | None, observed: LayerRecord | None):
        dense = walk.experts(layer)
        if not dense.gated:
            raise NMSparseError(f"layer {layer}: expected experts with a gate, gate_up (E, 2I, H); got {dense!r}")
        self.walk, self.layer, self.method, self.dtype = walk, layer, method, dense.dtype
        self.record = LayerRecord(np.float32(dense.gate_up), np.float32(dense.down), dense.activation)
        for batch in walk.batches(layer):
            self.record.add(batch)
        if observed is not None:
            self.record.h_gradients, self.record.y_gradients = observed.h_gradients, observed.y_gradients
        self.tokens = np.maximum(self.record.count, 1)
        self.few = self.record.count < FEW * self.record.width
        every = np.arange(self.record.width)
        self.kept = [every if neurons is None else neurons(self.record, e) for e in range(dense.num_experts)]
        self.start = [
            take_neurons((gate_up, down), kept)
            for gate_up, down, kept in zip(self.record.gate_up, self.record.down, self.kept, strict=True)
        ]

    def prune(self, patterns: list[str], on_expert: Listener | None) -> PrunedLayer:
        record = self.record
        upper, losses = zip(*(self._prune_gate_up(e, pattern) for e, pattern in enumerate(patterns)), strict=True)
        pruned = np.stack([masked(w, start.gate_up) for w, start in zip(upper, self.start, strict=True)])
        moments = hidden_moments(self.walk.batches(self.layer), record.gate_up, pruned, record.activation)
        lower, reports = [], []
        for e, (pattern, hessian, cross) in enumerate(zip(patterns, *moments, strict=True)):
            target = record.down[e] @ cross
            lower.append(self._prune_down(e, pattern, hessian, target))
            report = self._report(
                e, pattern, (upper[e], lower[e]), losses[e], self._error(e, lower[e], hessian, target)
            )
            reports.append(report)
            if on_expert:
                on_expert(report)
        return PrunedLayer(list(upper), lower, reports)

    def _prune_gate_up(self, e: int, pattern: str) -> tuple[Weight, float]:
        """The pruned weight and its relative loss."""
        w, tokens, shared = self.start[e].gate_up, self.record.count, self.record.x_hessian.sum(axis=0)
        own = self.record.x_hessian[e] / self.tokens[e]
        hessian = shrunk(own, tokens[e], shared / max(tokens.sum(), 1), w.shape[1])
        rows = np.concatenate([self.kept[e], self.record.width + self.kept[e]])
        weights = self.record.row_squares[e, rows] / self.tokens[e]
        pruned = self._prune(w, pattern, self.method, hessian=hessian, row_weights=weights if weights.any() else None)
        error, square = (quadratic_loss(w, v, hessian).sum() for v in (masked(pruned, w), np.zeros_like(w)))
        return pruned, float(error / square) if square else 0.0

    def _prune_down(self, e: int, pattern: str, hessian: np.ndarray, target: np.ndarray) -> Weight:
        method, n = self.method, self.tokens[e]
        if not self.record.count[e]:
            method = "magnitude"
        elif self.few[e] and method not in KEEP_VALUES:
            method = "wanda"  # what down reads cannot be borrowed from other experts, whose neurons are others
        gradients = None if self.record.y_gradients is None else self.record.y_gradients[e] / n
        weights = None if gradients is None or not gradients.any() else gradients
        statistics = {"hessian": hessian / n, "target": target / n, "row_weights": weights}
        return self._prune(self.start[e].down, pattern, method, **statistics)

    def _prune(self, w: np.ndarray, pattern: str, method: str, **statistics: np.ndarray | None) -> Weight:
        if pattern == DROP:
            return None
        if pattern == "dense":
            moved = len(self.kept[0]) < self.record.width and method not in KEEP_VALUES and "target" in statistics
            return (restored(w, statistics["hessian"], statistics["target"]) if moved else w).astype(self.dtype)
        return prune_weight(w.astype(self.dtype), pattern, method, **({} if method in NEEDS_NO_DATA else statistics))

    def _error(self, e: int, lower: Weight, hessian: np.ndarray, target: np.ndarray) -> tuple[float, float]:
        """Σ ‖g (E(x) − E'(x))‖² and Σ ‖g E(x)‖² over the expert's tokens."""
        w, v = self.record.down[e].astype(np.float64), masked(lower, self.start[e].down).astype(np.float64)
        square = float(np.vdot(w @ self.record.h_hessian[e], w))
        return max(square - 2 * float(np.vdot(target, v)) + float(np.vdot(v @ hessian, v)), 0.0), square

    def _report(
        self, e: int, pattern: str, weights: tuple[Weight, Weight], gate_up_loss: float, error: tuple[float, float]
    ) -> ExpertReport:
        size, held = self.record.gate_up[e].size + self.record.down[e].size, [w for w in weights if w is not None]
        return ExpertReport(
            layer=self.layer,
            expert=e,
            pattern=pattern,
            tokens=int(self.record.count[e]),
            few=bool(self.few[e]),
            density=sum(w.nnz if isinstance(w, SparseArray) else w.size for w in held) / size,
            nbytes=sum(w.nbytes for w in held),
            gate_up_loss=gate_up_loss,
            down_loss=error[0] / error[1] if error[1] else 0.0,
            stream_loss=error[0] / (self.record.stream or max(float(self.record.count.sum()), 1.0)),
        )


def masked(w: Weight, like: np.ndarray) -> np.ndarray:
    """A weight as dense float32; zeros in the shape of ``like`` for an expert that is dropped."""
    if w is None:
        return np.zeros(like.shape, np.float32)
    return (w.todense() if isinstance(w, SparseArray) else w).astype(np.float32)


def dense_stack(weights: Sequence[Weight]) -> np.ndarray:
    """The weights of all experts of a layer, of which one at least is not dropped, as dense float32 ``(E, M, K)``."""
    like = next(w for w in weights if w is not None)
    return np.stack([masked(w, like) for w in weights])
