"""How much an expert is worth as a whole: EASY-EP, REAP, and the plain means they are compared with.

Every score is a sum over the tokens that are routed to the expert, so sums of several batches add up. In all of them
g is the routing weight, E(x) the output of the expert before that weight, and larger is better. Task-agnostic text is
said to want scores without the gate, a known task wants gate and frequency ("How to score experts", arXiv:2606.15716).
"""

from __future__ import annotations

import numpy as np

from ...errors import NMSparseError
from .checks import per_token, statistic


def expert_sums(ids: np.ndarray, terms: np.ndarray, num_experts: int) -> np.ndarray:
    """Sum of ``terms`` (T, k) over the slots of each expert, float64 (E,); ``ids`` (T, k) are 0..E-1.

    The one reduction behind every statistic here, to be added up over batches: ``terms`` of ones give the count.

    >>> expert_sums(np.array([[0, 1], [1, 2]]), np.array([[1.0, 2.0], [3.0, 4.0]]), 4).tolist()
    [1.0, 5.0, 4.0, 0.0]
    """
    ids, terms = np.asarray(ids), np.asarray(terms, np.float64)
    if ids.dtype.kind not in "iu" or ids.shape != terms.shape:
        raise NMSparseError(
            f"expected ids and terms of one shape (T, k), ids int; got {ids.dtype}{list(ids.shape)} and "
            f"{list(terms.shape)}"
        )
    if ids.size and not 0 <= ids.min() <= ids.max() < num_experts:
        raise NMSparseError(f"ids: expected expert numbers in 0..{num_experts - 1}, got {ids.min()}..{ids.max()}")
    return np.bincount(ids.ravel(), terms.ravel(), minlength=num_experts)


def turn(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """How far the routed experts turn each token, max(1 − cos(before, after), 0), float64 (T,).

    ``before`` (T, H) is the residual stream that enters the MoE block (before its norm) and ``after`` (T, H) is
    ``before`` plus the output of the routed experts. A token of zeros, which has no direction, counts as 0.

    >>> turn(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[3.0, 0.0], [0.0, 2.0]])).tolist()
    [0.0, 1.0]
    """
    before, after = np.asarray(before, np.float64), np.asarray(after, np.float64)
    dot = np.einsum("th,th->t", before, after)
    lengths = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
    cosine = np.divide(dot, lengths, out=np.ones(len(dot)), where=lengths > 0)
    return np.maximum(1 - cosine, 0)


def easy_ep(
    ids: np.ndarray, weights: np.ndarray, norms: np.ndarray, before: np.ndarray, after: np.ndarray, num_experts: int
) -> np.ndarray:
    """EASY-EP, Σ over the expert's tokens of g · ‖E(x)‖₂ · max(1 − cos(before, after), 0): float64 (E,).

    ``ids``, ``weights`` (= g) and ``norms`` (= ‖E(x)‖₂) are (T, k); ``before`` and ``after`` (T, H) as in
    :func:`turn`. An expert is worth what it adds to the tokens that the layer changes. Scores of batches add up; those
    of different domains are to be scaled first, see :func:`mix_domains`.

    Dong et al., "Domain-Specific Pruning of Large Mixture-of-Experts Models with Few-shot Demonstrations",
    arXiv:2504.06792.

    >>> x = np.array([[1.0, 0.0], [1.0, 0.0]])
    >>> y = x + [[2.0, 0.0], [-1.0, 1.0]]  # the first token keeps its direction
    >>> easy_ep(np.array([[0], [1]]), np.ones((2, 1)), np.array([[2.0], [2.0**0.5]]), x, y, 2).round(3).tolist()
    [0.0, 1.414]
    """
    return expert_sums(ids, np.asarray(weights) * np.asarray(norms) * turn(before, after)[:, None], num_experts)


def reap(weighted_norms: np.ndarray, count: np.ndarray) -> np.ndarray:
    """REAP, the mean over the expert's tokens of g · ‖E(x)‖₂: float64, of the shape of the arguments.

    ``weighted_norms`` is Σ g‖E(x)‖₂ with g renormalised to sum 1 over the k experts of a token, and ``count`` the
    number of tokens, both (…, E). A mean, not a sum: an expert for rare tokens is not a worse expert. 0 without tokens.

    Lasby et al., "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression", ICLR'26, arXiv:2510.13999.

    >>> reap(np.array([6.0, 2.0, 0.0]), np.array([3, 4, 0])).tolist()
    [2.0, 0.5, 0.0]
    """
    total = statistic("weighted_norms", weighted_norms)
    return per_token(total, statistic("count", count, shape=total.shape))


def mean_norm(norms: np.ndarray, count: np.ndarray) -> np.ndarray:
    """MAN and MSAN, the mean over the expert's tokens of ‖E(x)‖₂ (give Σ‖E(x)‖₂) or ‖E(x)‖₂² (give Σ‖E(x)‖₂²).

    Gate-free scores, recommended for task-agnostic pruning by "How to score experts", arXiv:2606.15716.
    Arguments (…, E) as in :func:`reap`.

    >>> mean_norm(np.array([6.0, 0.0]), np.array([3, 0])).tolist()
    [2.0, 0.0]
    """
    total = statistic("norms", norms)
    return per_token(total, statistic("count", count, shape=total.shape))


def mix_domains(*scores: np.ndarray) -> np.ndarray:
    """One score (L, E) from those of several domains: each layer of each is scaled to sum 1, then they are added.

    EASY-EP's rule for a model that serves several domains, without which the domain with the most text decides.

    >>> mix_domains(np.array([[1.0, 3.0]]), np.array([[100.0, 0.0]])).tolist()
    [[1.25, 0.75]]
    """
    layers = [statistic("scores", domain, ndim=2) for domain in scores]
    return sum(per_token(domain, domain.sum(axis=1, keepdims=True)) for domain in layers)
