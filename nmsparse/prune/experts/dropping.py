"""Dropping computation at run time: which slots of a routing are skipped, halved or run in full.

A *slot* is a pair (token, choice) of a top-k routing. Its mode is the number of leading halves of the expert that run:
0 (skip), 1 (the major half, neurons 0..I/2−1 after :func:`reconstruct`), 2 (all neurons).

DualSparse-MoE (see :mod:`nmsparse.prune.experts.partition`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...errors import NMSparseError
from ...formats import RaggedTokens

SKIP, MAJOR, FULL = 0, 1, 2


def shares(weights: np.ndarray) -> np.ndarray:
    """Routing ``weights`` (T, k), 0 or more, as shares of their sum for each token; 0 where all are 0. dtype stays.

    >>> shares(np.array([[3.0, 1.0], [0.0, 0.0]])).tolist()
    [[0.75, 0.25], [0.0, 0.0]]
    """
    total = np.sum(weights, axis=1, keepdims=True)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)


def drop_1t(weights: np.ndarray, threshold: float) -> np.ndarray:
    """1T-Drop: skip the slots whose share of the token's routing ``weights`` (T, k) is below ``threshold``.

    Returns modes (T, k) uint8, SKIP or FULL. The slots that stay keep their original weight: nothing is renormalised.

    >>> drop_1t(np.array([[0.9, 0.1], [0.5, 0.5]]), 0.2).tolist()
    [[2, 0], [2, 2]]
    """
    return np.where(shares(weights) < threshold, SKIP, FULL).astype(np.uint8)


def drop_2t(weights: np.ndarray, major: float, minor: float) -> np.ndarray:
    """2T-Drop: skip slots with a share below ``major``, run the major half below ``minor``, all neurons from there on.

    ``weights`` (T, k) as in :func:`drop_1t`, of which this is the case ``major == minor``; ``major <= minor``.
    Returns modes (T, k) uint8. The paper takes thresholds 0.01 below and above that of 1T-Drop, e.g. 0.07 and 0.09
    for a mean share of 1/8; thresholds scale with 1/k.

    >>> drop_2t(np.array([[0.9, 0.1], [0.7, 0.3]]), 0.2, 0.4).tolist()
    [[2, 0], [2, 1]]
    """
    if not major <= minor:
        raise NMSparseError(f"expected major <= minor, got {major} and {minor}: the major half is dropped last")
    share = shares(weights)
    return (share >= major).astype(np.uint8) + (share >= minor)


def dropped(modes: np.ndarray) -> float:
    """The part of the experts' arithmetic that ``modes`` drop, 0 to 1; 0 for no slots.

    >>> dropped(np.array([[2, 0], [2, 1]]))
    0.375
    """
    return float(1 - np.mean(modes) / FULL) if np.size(modes) else 0.0


@dataclass(frozen=True)
class DualTokens:
    """The slots of a routing that run, sorted by expert, in each expert first the FULL ones and then the MAJOR ones.

    What a grouped kernel needs for 2T-Drop. With S slots that run, E experts and ``start = offsets[e-1]``, expert e
    computes rows ``start:offsets[e]`` of the gathered tokens with its major neurons, and of these
    rows ``start:full_ends[e]`` with its minor neurons too: a row of tokens ends early, none is scattered, and one
    number per expert is all that a plain grouped product does not have.

    =============  ========  ==================================================================================
    ``token_ids``  ``(S,)``  the token of each slot
    ``slots``      ``(S,)``  flat index ``t*k + j`` of each slot, e.g. into the routing weights
    ``full_ends``  ``(E,)``  end of each expert's FULL rows
    ``offsets``    ``(E,)``  end of each expert's rows, as in :class:`~nmsparse.formats.RaggedTokens`
    =============  ========  ==================================================================================

    All have the dtype of the ids. With every mode FULL, ``token_ids``, ``slots`` and ``offsets`` are those of
    ``RaggedTokens.from_topk``.

    >>> d = DualTokens.from_modes(np.array([[1, 0], [0, 1], [1, 0]], np.int32), np.array([[1, 2], [2, 0], [2, 1]]), 2)
    >>> d.token_ids.tolist(), d.full_ends.tolist(), d.offsets.tolist()
    ([0, 1, 2, 2, 0], [2, 4], [3, 5])
    """

    token_ids: np.ndarray
    slots: np.ndarray
    full_ends: np.ndarray
    offsets: np.ndarray
    num_tokens: int
    top_k: int

    @classmethod
    def from_modes(cls, ids: np.ndarray, modes: np.ndarray, num_experts: int) -> DualTokens:
        """Sort a routing ``ids`` (T, k), int32 or int64, by expert and mode (T, k) and leave out the skipped slots.

        Tokens stay in order within the FULL and within the MAJOR rows of an expert. Raises NMSparseError for other
        modes than 0, 1 and 2, and for what ``RaggedTokens.from_topk`` refuses.
        """
        ragged, modes = RaggedTokens.from_topk(ids, num_experts), np.asarray(modes)
        if modes.shape != np.shape(ids) or not np.isin(modes, (SKIP, MAJOR, FULL)).all():
            raise NMSparseError(
                f"modes: expected 0 (skip), 1 (major half) or 2 (full) of shape {np.shape(ids)}, got "
                f"{modes.dtype}{list(modes.shape)}"
            )
        mode, expert = modes.ravel()[ragged.slots], np.repeat(np.arange(num_experts), ragged.counts)
        order = np.lexsort((-mode.astype(np.int8), expert))  # stable: tokens stay in order
        order = order[mode[order] != SKIP]

        def ends(chosen: np.ndarray) -> np.ndarray:
            return np.bincount(expert[chosen], minlength=num_experts).astype(ragged.offsets.dtype)

        offsets = np.cumsum(ends(mode != SKIP), dtype=ragged.offsets.dtype)
        full_ends = offsets - ends(mode == MAJOR)
        return cls(ragged.token_ids[order], ragged.slots[order], full_ends, offsets, ragged.num_tokens, ragged.top_k)
