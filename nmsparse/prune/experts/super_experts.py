"""Super experts: the few that write massive activations, and that nothing may prune."""

from __future__ import annotations

import numpy as np

from .checks import statistic


def super_experts(
    largest_output: np.ndarray, *, percentile: float = 99.5, ratio: float = 0.1, depth: float = 0.75
) -> np.ndarray:
    """Which experts must stay as they are: a bool mask (L, E).

    ``largest_output`` (L, E) is the largest absolute element of the down projection's output (before the routing
    weight) that each expert of each MoE layer ever wrote over the calibration tokens, 0 for an expert without tokens.
    An expert is a super expert if its value is above the ``percentile`` of all values, above ``ratio`` of the largest,
    and in the first ``round(depth · L)`` MoE layers: what the last layers write large is the answer, not a massive
    activation that attention needs as a sink.

    Su et al., "Unveiling Super Experts in Mixture-of-Experts Large Language Models", arXiv:2507.23279, who found 3
    of 6144 in Qwen3-30B-A3B and lost half of GSM8K without them. Their code restricts the layers as ``depth`` does, and
    their ratio test is ``largest // 10``, which differs from this one only where the largest output is small.

    >>> a = np.ones((4, 64))
    >>> a[1, 7], a[3, 5] = 900, 2000
    >>> np.argwhere(super_experts(a)).tolist()
    [[1, 7]]
    """
    a = statistic("largest_output", largest_output, ndim=2)
    if not a.size:
        return np.zeros(a.shape, bool)
    early = np.arange(len(a)) < round(depth * len(a))
    return (a > np.percentile(a, percentile)) & (a > ratio * a.max()) & early[:, None]
