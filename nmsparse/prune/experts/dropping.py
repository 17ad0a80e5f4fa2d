"""Dropping computation at run time: which slots of a routing are skipped, halved or run in full.

A *slot* is a pair (token, choice) of a top-k routing. Its mode is the number of leading halves of the expert that run:
0 (skip), 1 (the major half, neurons 0..I/2−1 after :func:`reconstruct`), 2 (all neurons).

DualSparse-MoE (see :mod:`nmsparse.prune.experts.partition`). Everything here takes NumPy arrays, or tensors of torch on
any device, and returns the same kind.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...errors import NMSparseError
from .partition import sub_routing

SKIP, MAJOR, FULL = 0, 1, 2
Array = np.ndarray | Any  # or a tensor


def shares(weights: Array) -> Array:
    """Routing ``weights`` (T, k), 0 or more, as shares of their sum for each token; 0 where all are 0. dtype stays.

    >>> shares(np.array([[3.0, 1.0], [0.0, 0.0]])).tolist()
    [[0.75, 0.25], [0.0, 0.0]]
    """
    total = weights.sum(axis=1, keepdims=True)
    return weights / (total + (total == 0))


def drop_1t(weights: Array, threshold: float) -> Array:
    """1T-Drop: skip the slots whose share of the token's routing ``weights`` (T, k) is below ``threshold``.

    Returns modes (T, k) int64, SKIP or FULL. The slots that stay keep their original weight: nothing is renormalised.

    >>> drop_1t(np.array([[0.9, 0.1], [0.5, 0.5]]), 0.2).tolist()
    [[2, 0], [2, 2]]
    """
    return drop_2t(weights, threshold, threshold)


def drop_2t(weights: Array, major: float, minor: float) -> Array:
    """2T-Drop: skip slots with a share below ``major``, run the major half below ``minor``, all neurons from there on.

    ``weights`` (T, k) as in :func:`drop_1t`, of which this is the case ``major == minor``; ``major <= minor``.
    Returns modes (T, k) int64. The paper takes thresholds 0.01 below and above that of 1T-Drop, e.g. 0.07 and 0.09
    for a mean share of 1/8; thresholds scale with 1/k.

    >>> drop_2t(np.array([[0.9, 0.1], [0.7, 0.3]]), 0.2, 0.4).tolist()
    [[2, 0], [2, 1]]
    """
    if not major <= minor:
        raise NMSparseError(f"expected major <= minor, got {major} and {minor}: the major half is dropped last")
    share = shares(weights)
    return (share >= major) * MAJOR + (share >= minor) * (FULL - MAJOR)


def dropped(modes: Array) -> float:
    """The part of the experts' arithmetic that ``modes`` drop, 0 to 1; 0 for no slots.

    >>> dropped(np.array([[2, 0], [2, 1]]))
    0.375
    """
    return 1 - float(modes.sum()) / (FULL * math.prod(modes.shape)) if math.prod(modes.shape) else 0.0


def route_2t(ids: Array, weights: Array, major: float, minor: float) -> tuple[Array, Array]:
    """2T-Drop as a routing (T, 2k) to the halves of the experts, for ``SparseExperts(*interleave(halves))``.

    ``ids`` and ``weights`` (T, k) are the routing to the whole experts, thresholds as in :func:`drop_2t`. Expert e is
    now 2e, its major half, and 2e + 1; the halves that a slot skips have the id -1, which is left out. So half 2e
    reads the rows of tokens that run in full or in their major half, half 2e + 1 those that run in full, and nothing
    else is gathered or multiplied. The same with tensors on a GPU, where nothing waits for the device.

    >>> ids, weights = route_2t(np.array([[3, 1]]), np.array([[0.75, 0.25]]), 0.2, 0.5)
    >>> ids.tolist(), weights.tolist()
    ([[6, 7, 2, -1]], [[0.75, 0.75, 0.25, 0.25]])
    """
    return sub_routing(ids, weights, 2, drop_2t(weights, major, minor))
