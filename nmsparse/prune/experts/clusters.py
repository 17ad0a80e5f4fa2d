"""STUN: experts that behave alike form clusters, and each cluster keeps one of them."""

from __future__ import annotations

import numpy as np

from ...errors import NMSparseError, require
from .checks import statistic
from .weights import as_experts


def expert_distances(
    router_weight: np.ndarray,
    coactivation: np.ndarray | None = None,
    *,
    router_scale: float = 1.0,
    coactivation_scale: float = 1.0,
) -> np.ndarray:
    """Distance (E, E) float64 of the experts of a layer: small if the router treats two alike. Symmetric, diagonal 0.

    ``router_scale · ‖R_i − R_j‖₂ / mean − coactivation_scale · coactivation_ij / mean``, R_i row i of ``router_weight``
    (E, H), and ``coactivation`` (E, E) the number of tokens that chose both (None: no data needed, the router alone);
    means are over pairs i < j.

    Lee et al., "STUN: Structured-Then-Unstructured Pruning for Scalable MoE Pruning", arXiv:2409.06211.

    >>> expert_distances(np.array([[0.0], [1.0], [3.0]])).tolist()
    [[0.0, 0.5, 1.5], [0.5, 0.0, 1.0], [1.5, 1.0, 0.0]]
    """
    rows = np.asarray(router_weight, np.float64)
    if rows.ndim != 2 or not np.isfinite(rows).all():
        raise NMSparseError(f"router_weight: expected finite numbers (E, H), got shape {rows.shape}")
    num, pairs = len(rows), np.triu_indices(len(rows), 1)
    gaps = np.array([np.linalg.norm(rows[i] - rows[i + 1 :], axis=1) for i in range(num)], object)
    distance = router_scale * _over_mean(np.concatenate([*gaps, np.zeros(0)]).astype(np.float64))
    if coactivation is not None:
        together = statistic("coactivation", coactivation, shape=(num, num))
        distance = distance - coactivation_scale * _over_mean(together[pairs])
    square = np.zeros((num, num))
    square[pairs] = distance
    return square + square.T


def cluster(distances: np.ndarray, total: int, *, minimum: int = 1) -> np.ndarray:
    """Clusters of experts: labels (L, E) int64 from ``distances`` (L, E, E), with ``total`` clusters in all layers.

    Agglomerative clustering with complete linkage, cut in all layers at one distance: no two experts of a cluster are
    farther apart than that, and it is as small as ``total`` allows. So layers whose experts differ keep more of
    them. Every layer keeps ``minimum`` clusters or more (give top_k). Labels count from 0 in order of first experts.

    Raises NMSparseError where ``total`` is not in L·minimum..L·E. Needs scipy.

    >>> apart = expert_distances(np.array([[0.0], [5.0], [0.1], [9.0]]))
    >>> cluster(apart[None], 3).tolist()
    [[0, 1, 0, 2]]
    """
    hierarchy = require("scipy.cluster.hierarchy", "bench")
    distances = np.asarray(distances, np.float64)
    if distances.ndim != 3 or distances.shape[1] != distances.shape[2] or not np.isfinite(distances).all():
        raise NMSparseError(f"distances: expected finite numbers (L, E, E), got shape {distances.shape}")
    layers, experts, _ = distances.shape
    if not 1 <= minimum <= experts or not layers * minimum <= total <= layers * experts:
        raise NMSparseError(
            f"total: expected {layers * minimum}..{layers * experts} clusters for {layers} layers of {experts} experts "
            f"and at least {minimum} in each, got {total}"
        )
    if experts == 1:
        return np.zeros((layers, 1), np.int64)
    pairs = np.triu_indices(experts, 1)
    trees = [hierarchy.linkage(layer[pairs], "complete") for layer in distances]
    # Merges of a tree have ascending heights: the cheapest merges of the model are the first few of each tree.
    heights = np.concatenate([tree[: experts - minimum, 2] for tree in trees])
    chosen = np.argsort(heights, kind="stable")[: layers * experts - total]
    merges = np.bincount(chosen // max(experts - minimum, 1), minlength=layers)
    return np.stack([_labels(tree[:n], experts) for tree, n in zip(trees, merges, strict=True)])


def representatives(labels: np.ndarray, weights: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The expert (C,) int64 that each cluster of a layer keeps: the one nearest to the mean of the cluster's weights.

    ``labels`` (E,) are 0..C-1, ``weights`` those of the E experts, compared as one vector each in the Euclidean norm;
    ties go to the lower expert. The paper puts the mean itself where a layer has very few clusters; neurons of
    different experts are in no common order, so that is not offered.

    >>> w = (np.zeros((3, 2, 1)), np.array([[[1.0]], [[2.0]], [[9.0]]]))
    >>> representatives(np.array([0, 0, 1]), w).tolist()
    [0, 2]
    """
    experts, labels = as_experts(weights), np.asarray(labels)
    if labels.shape != experts.down.shape[:1]:
        raise NMSparseError(f"labels: expected one per expert, shape {experts.down.shape[:1]}, got {labels.shape}")
    kept = []
    for label in range(labels.max(initial=-1) + 1):
        members = np.flatnonzero(labels == label)
        gap = np.zeros(len(members))
        for weight in experts:
            group = weight[members].astype(np.float64).reshape(len(members), -1)
            gap += ((group - group.mean(axis=0)) ** 2).sum(axis=1)
        kept.append(members[gap.argmin()])
    return np.array(kept, np.int64)


def _over_mean(values: np.ndarray) -> np.ndarray:
    mean = values.mean() if values.size else 0.0
    return values / mean if mean > 0 else values


def _labels(merges: np.ndarray, experts: int) -> np.ndarray:
    """Cluster of each expert after the first ``merges`` of a tree in scipy's form, numbered by first member."""
    members = {e: [e] for e in range(experts)}
    for step, (a, b) in enumerate(merges[:, :2].astype(int).tolist()):
        members[experts + step] = members.pop(a) + members.pop(b)
    labels = np.empty(experts, np.int64)
    for label, group in enumerate(sorted(members.values(), key=min)):
        labels[group] = label
    return labels
