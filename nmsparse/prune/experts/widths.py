"""How many neurons each expert keeps: one ranking over the whole model, in steps of a tile."""

from __future__ import annotations

import numpy as np

from ...errors import NMSparseError


def tile_widths(
    scores: np.ndarray, keep: int, *, tile: int = 1, minimum: int = 0, protected: np.ndarray | None = None
) -> np.ndarray:
    """Widths (U,) int64, multiples of ``tile``, that keep the largest total score with at most ``keep`` neurons.

    ``scores`` (U, I) rank the neurons of U units (the experts of all layers, flattened), larger is better, finite; I is
    a multiple of ``tile``. Every unit keeps its best neurons. ``minimum``, a multiple of ``tile``, is kept in each
    unit, so that no expert vanishes; the units of ``protected`` (U,) bool keep all. With ``tile=1`` this is HEAPr's
    global ranking.

    The neurons of a unit in descending order, cut into tiles, have tile sums that descend. So the best
    ``keep // tile`` tiles of the model are the first few of each unit, and no other widths keep more.

    Raises NMSparseError where the tile does not divide and where minimum and protected units exceed ``keep``.

    >>> scores = np.array([[9.0, 1.0, 8.0, 1.0], [5.0, 5.0, 4.0, 4.0]])
    >>> tile_widths(scores, 4).tolist(), tile_widths(scores, 6, tile=2).tolist()
    ([2, 2], [2, 4])
    """
    scores = _scores(scores)
    units, neurons = scores.shape
    if tile < 1 or neurons % tile or minimum % tile or not 0 <= minimum <= neurons:
        raise NMSparseError(
            f"tile: expected a divisor of the {neurons} neurons and of minimum (at most {neurons}); got tile={tile}, "
            f"minimum={minimum}"
        )
    tiles = -np.sort(-scores, axis=1).reshape(units, neurons // tile, tile).sum(axis=2)
    tiles[:, : minimum // tile] = np.inf
    if protected is not None:
        tiles[np.asarray(protected, bool)] = np.inf
    forced, affordable = int(np.isposinf(tiles).sum()), int(keep) // tile
    if forced > affordable:
        raise NMSparseError(
            f"keep: expected at least the {forced * tile} neurons that minimum and protected experts need, got {keep}"
        )
    best = np.argsort(-tiles, axis=None, kind="stable")[:affordable]
    return tile * np.bincount(best // max(neurons // tile, 1), minlength=units)


def best_neurons(scores: np.ndarray, width: int) -> np.ndarray:
    """The ``width`` best neurons by ``scores`` (…, I), ascending, ties to the lower one: (…, width) int64.

    For :func:`take_neurons`. Ascending order keeps what stays in the order of the checkpoint.

    >>> best_neurons(np.array([9.0, 1.0, 8.0, 1.0]), 3).tolist()
    [0, 1, 2]
    """
    return np.sort(np.argsort(-np.asarray(scores, np.float64), axis=-1, kind="stable")[..., :width], axis=-1)


def _scores(scores: np.ndarray) -> np.ndarray:
    scores = np.array(scores, np.float64)
    if scores.ndim != 2 or not np.isfinite(scores).all():
        raise NMSparseError(f"scores: expected finite numbers (experts, neurons), got shape {scores.shape}")
    return scores
