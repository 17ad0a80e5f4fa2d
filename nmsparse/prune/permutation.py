"""Input-channel permutation: which columns of a weight meet in a group, when their order is free.

A pattern keeps some columns of each group of neighbours, so it drops least where every group has strong and weak ones
in every row. One order has to serve all rows that are given, since it is folded into what makes the inputs: the order
of neurons into gate and up (:func:`nmsparse.prune.experts.take_neurons`), that of the hidden dimension into the whole
model (:mod:`nmsparse.calibration.channels`).

Pool and Yu, "Channel Permutations for N:M Sparsity", NeurIPS'21; by linear assignment: Zhang et al., "Plug-and-Play: An
Efficient Post-training Pruning Method for Large Language Models", ICLR'24.
"""

from __future__ import annotations

import numpy as np

from ..errors import require
from ..formats import VNM, Pattern, Samoyeds, parse

_SWEEPS, _ENOUGH = 4, 1e-4  # stop when a sweep adds less than this part to what is kept


def column_order(scores: np.ndarray, pattern: str | Pattern) -> np.ndarray:
    """An order (K,) int64 of the columns in which ``pattern`` keeps much of ``scores`` (R, K), which are 0 or more.

    Columns are dealt to groups by their sum. Then one column of every group is taken out at a time and all are given
    back so that the kept scores are the largest: a linear assignment of K/m columns to as many groups. What is kept
    never falls. V:N:M is ordered for its 4 of m columns of a block of v rows, Samoyeds for 2:4. Columns that fill no
    group come last. Takes R·(K/m)²·m comparisons a sweep: give a sample of the rows of a large model. Needs scipy.

    >>> scores = np.array([[9.0, 8.0, 7.0, 1.0, 2.0, 3.0, 0.0, 0.0]])
    >>> from nmsparse.prune import apply
    >>> [apply(scores[:, order], "2:4").sum().item() for order in (slice(None), column_order(scores, "2:4"))]
    [22.0, 27.0]
    """
    pattern, scores = parse(pattern), np.asarray(scores, np.float32)
    n, m = (2, 4) if isinstance(pattern, Samoyeds) else (pattern.n, pattern.m)
    if isinstance(pattern, VNM):
        n, scores = 4, np.add.reduceat(scores, np.arange(0, len(scores), pattern.v), axis=0)
    ranked = np.argsort(-scores.sum(axis=0, dtype=np.float64), kind="stable")
    count = scores.shape[1] // m
    groups = ranked[: count * m].reshape(m, count).T.copy()
    if n < m and count > 1:
        _assign(scores, groups, n)
    return np.concatenate([groups.ravel(), ranked[count * m :]])


def _assign(scores: np.ndarray, groups: np.ndarray, n: int) -> None:
    """Exchange columns between ``groups`` (G, m), each of which keeps the n best of every row."""
    assignment = require("scipy.optimize", "bench").linear_sum_assignment
    kept = 0.0
    for _ in range(_SWEEPS):
        for place in range(groups.shape[1]):
            moving = groups[:, place].copy()
            others = np.sort(scores[:, np.delete(groups, place, axis=1)], axis=2)
            # A column that joins is kept instead of the n-th best of the others where it is larger.
            least = others[:, :, -n]
            worth = np.stack([np.maximum(least, scores[:, [c]]).sum(axis=0, dtype=np.float64) for c in moving], axis=1)
            rows, columns = assignment(worth, maximize=True)
            groups[rows, place] = moving[columns]
        total = worth[rows, columns].sum() + others[:, :, others.shape[2] - n + 1 :].sum(dtype=np.float64)
        if total <= kept * (1 + _ENOUGH):
            break
        kept = total
