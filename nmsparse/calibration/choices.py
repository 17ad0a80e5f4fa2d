"""From calibration statistics to choices: which neurons an expert keeps, which pattern it gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..formats import Pattern
from ..prune import wanda
from ..prune.experts import allocate, best_neurons, heapr
from ..prune.methods import NEEDS_NO_DATA
from ..prune.permutation import column_order
from .pipeline import ExpertReport
from .record import LayerRecord


def neuron_worth(record: LayerRecord, expert: int) -> np.ndarray:
    """What each neuron of an expert is worth, ``(I,)``.

    HEAPr where a backward pass was made; else the mean square of what the neuron adds to the output of the expert,
    Σ h² · ‖down column‖², which is HEAPr with every output counting the same.
    """
    if record.h_gradients is not None:
        return heapr(record.h_squares[expert], record.h_gradients[expert], record.count[expert])
    return record.h_squares[expert] * np.square(record.down[expert]).sum(axis=0)


def strongest(share: float) -> Callable[[LayerRecord, int], np.ndarray]:
    """For ``prune_layers(neurons=...)``: keep this share of the neurons of every expert, rounded to a multiple of 64.

    64 is the k-tile of the kernels; a width below 64 stays.
    """

    def neurons(record: LayerRecord, expert: int) -> np.ndarray:
        width = max(64, round(share * record.width / 64) * 64)
        return best_neurons(neuron_worth(record, expert), min(width, record.width))

    return neurons


def weight_scores(record: LayerRecord, expert: int, method: str) -> tuple[np.ndarray, np.ndarray]:
    """What each weight of gate and up ``(2I, H)`` and of down ``(H, I)`` is worth to ``method``, to order columns by.

    Its size where the method needs no data; else the square of what the output of the expert loses without it.
    """
    gate_up, down = record.gate_up[expert], record.down[expert]
    if method in NEEDS_NO_DATA:
        return np.abs(gate_up), np.abs(down)
    rows = record.row_squares[expert] / max(record.count[expert], 1)
    return (
        wanda(gate_up, np.sqrt(record.x_squares[expert])) ** 2 * rows[:, None],
        wanda(down, np.sqrt(record.h_squares[expert])) ** 2,
    )


def ordered(pattern: str | Pattern, method: str, share: float = 1.0) -> Callable[[LayerRecord, int], np.ndarray]:
    """For ``prune_layers(neurons=...)``: the neurons in the order in which ``pattern`` keeps most of ``down``.

    Of all, or of the :func:`strongest`. The output before pruning is unchanged but for the neurons that go.
    """

    def neurons(record: LayerRecord, expert: int) -> np.ndarray:
        kept = np.arange(record.width) if share == 1 else strongest(share)(record, expert)
        return kept[column_order(weight_scores(record, expert, method)[1][:, kept], pattern)]

    return neurons


def allocate_patterns(
    reports: Sequence[Sequence[Sequence[ExpertReport]]],
    patterns: Sequence[str],
    budget: float,
    *,
    guard: np.ndarray | None = None,
) -> list[list[str]]:
    """A pattern for each expert of each layer: the least total ``stream_loss`` within ``budget`` bytes.

    ``reports[pattern][layer][expert]`` is what :func:`~nmsparse.calibration.pipeline.try_patterns` returns. Experts of
    ``guard``, bool (layers, experts), stay dense; ``"dense"`` is one of the patterns then.
    """
    losses, costs = (
        np.array([[[getattr(r, name) for r in layer] for layer in tried] for tried in reports])
        for name in ("stream_loss", "nbytes")
    )
    if guard is not None and guard.any():
        losses[[p for p, pattern in enumerate(patterns) if pattern != "dense"]] += np.where(guard, np.inf, 0)
    chosen = allocate(*(a.reshape(len(patterns), -1).T for a in (losses, costs)), budget)
    return [[patterns[c] for c in layer] for layer in chosen.reshape(losses.shape[1:])]
