"""From calibration statistics to choices: which neurons an expert keeps, which pattern it gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..prune.experts import allocate, best_neurons, heapr
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


def dealt(record: LayerRecord, expert: int) -> np.ndarray:
    """For ``prune_layers(neurons=...)``: all neurons, dealt out so that each group of four has strong and weak ones.

    Ranked by worth and cut into quarters, group q gets the q-th of each: what 2:4 drops along ``down``'s inputs is
    then more often weak, and rows that Samoyeds pairs differ. The output before pruning is unchanged.
    """
    ranked = np.argsort(-neuron_worth(record, expert), kind="stable")
    groups = record.width // 4
    return np.concatenate([ranked[: 4 * groups].reshape(4, groups).T.ravel(), ranked[4 * groups :]])


def allocate_patterns(
    reports: Sequence[Sequence[Sequence[ExpertReport]]], patterns: Sequence[str], budget: float
) -> list[list[str]]:
    """A pattern for each expert of each layer: the least total ``stream_loss`` within ``budget`` bytes.

    ``reports[pattern][layer][expert]`` is what :func:`~nmsparse.calibration.pipeline.try_patterns` returns.
    """
    losses, costs = (
        np.array([[[getattr(r, name) for r in layer] for layer in tried] for tried in reports])
        for name in ("stream_loss", "nbytes")
    )
    chosen = allocate(*(a.reshape(len(patterns), -1).T for a in (losses, costs)), budget)
    return [[patterns[c] for c in layer] for layer in chosen.reshape(losses.shape[1:])]
