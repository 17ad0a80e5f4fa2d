"""RaggedTokens: the activation side of a sparse MoE layer. Which tokens each expert reads, in order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import NMSparseError

DROPPED = -1  # the id of a slot that no expert runs


@dataclass(frozen=True)
class RaggedTokens:
    """The slots (token, choice) of a top-k routing, sorted by expert, tokens in order within each expert.

    Activations are sparse by routing: expert e reads rows ``token_ids[offsets[e-1]:offsets[e]]`` of the token-major
    ``x`` ``(T, K)`` and nothing else, gathered inside the kernel. With E experts and S of the T·k slots that have one
    (all, unless some are dropped):

    =============  ========  ================================================================================
    ``token_ids``  ``(S,)``  the token of each slot
    ``slots``      ``(S,)``  flat index ``t*k + j`` of each slot in the routing ``(T, k)``
    ``offsets``    ``(E,)``  cumulative ends, the ``offs`` convention of ``torch.nn.functional.grouped_mm``
    =============  ========  ================================================================================

    All three have the dtype of the routing ids, int32 or int64.

    >>> r = RaggedTokens.from_topk(np.array([[2, 0], [0, 1], [2, 0]], np.int32), num_experts=4)
    >>> r.token_ids.tolist(), r.slots.tolist(), r.offsets.tolist()
    ([0, 1, 2, 1, 0, 2], [1, 2, 5, 3, 0, 4], [3, 4, 6, 6])
    >>> r.counts.tolist()
    [3, 1, 2, 0]
    """

    token_ids: np.ndarray
    slots: np.ndarray
    offsets: np.ndarray
    num_tokens: int
    top_k: int

    @classmethod
    def from_topk(cls, ids: np.ndarray, num_experts: int) -> RaggedTokens:
        """Sort the routing ``ids`` ``(T, k)``, int32 or int64 expert numbers in 0..num_experts-1, by expert.

        A slot with the id ``DROPPED`` (-1) is left out, as dropped tokens and experts of other devices are.
        Raises :class:`~nmsparse.errors.NMSparseError` for other ids out of range and for a token that names an expert
        twice.

        >>> RaggedTokens.from_topk(np.array([[1, DROPPED], [DROPPED, 0]]), 2).slots.tolist()
        [3, 0]
        """
        ids = np.asarray(ids)
        if ids.ndim != 2 or ids.dtype not in (np.int32, np.int64):
            raise NMSparseError(f"routing ids: expected int32 or int64 (T, k), got {ids.dtype}{list(ids.shape)}")
        num_tokens, top_k = ids.shape
        if ids.size and not DROPPED <= ids.min() <= ids.max() < num_experts:
            bad = np.argwhere((ids < DROPPED) | (ids >= num_experts))[0]
            raise NMSparseError(
                f"routing ids: expected expert numbers in 0..{num_experts - 1}, or {DROPPED} to leave a slot out, "
                f"got {ids[tuple(bad)]} for token {bad[0]}"
            )
        in_order = np.sort(ids, axis=1)
        if twice := np.argwhere((in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] != DROPPED)).tolist():
            raise NMSparseError(f"routing ids: token {twice[0][0]} names an expert twice: {ids[twice[0][0]].tolist()}")
        counts = np.bincount(ids.ravel() - DROPPED, minlength=num_experts + 1)
        slots = np.argsort(ids, axis=None, kind="stable").astype(ids.dtype)[counts[0] :]
        offsets = np.cumsum(counts[1:]).astype(ids.dtype)
        return cls(slots // max(top_k, 1), slots, offsets, num_tokens, top_k)

    @property
    def counts(self) -> np.ndarray:
        """Tokens of each expert, ``(E,)``."""
        return np.diff(self.offsets, prepend=self.offsets.dtype.type(0))
