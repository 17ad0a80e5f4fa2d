"""The forward pass of a layer of experts, after the router: gather, gate and up, activation, down, combine."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from ..formats import RaggedTokens
from .activations import activate
from .doorbell import next_task, share
from .fused import fused_experts, suits_fused
from .matmul import grouped_matmul
from .operand import INLINED
from .threads import team

_TOKENS = 16  # of a task


def moe_forward(
    x: np.ndarray, ragged: RaggedTokens, topk_weights: np.ndarray, gate_up: Any, down: Any, activation: str
) -> np.ndarray:
    """``y[t] = Σ_j topk_weights[t, j] · down[e] act(gate_up[e] x[t])``, e the j-th expert of token t: ``(T, H)``.

    ``x`` ``(T, H)`` and ``topk_weights`` ``(T, k)`` are float32; ``ragged`` is the routing, ``gate_up`` and ``down``
    are sparse arrays or ndarrays. Tokens are gathered inside the first product; many go through both at once (see
    ``fused``). The terms of a token are added in the order of j, so the result is the same bits every time; slots that
    ``ragged`` leaves out have none.

    >>> eye = np.eye(4, dtype=np.float32)[None]
    >>> one = RaggedTokens.from_topk(np.zeros((1, 1), np.int32), 1)
    >>> moe_forward(np.ones((1, 4), np.float32), one, np.float32([[0.5]]), eye, eye, "identity")
    array([[0.5, 0.5, 0.5, 0.5]], dtype=float32)
    """
    if suits_fused(gate_up, down, ragged):
        y = fused_experts(gate_up, down, activation, x, ragged)
    else:
        h = grouped_matmul(gate_up, x, ragged.offsets, ragged.token_ids)
        y = grouped_matmul(down, activate(h, down.shape[2], activation), ragged.offsets)
    place = np.full(topk_weights.size, -1)  # of each slot of the routing among the rows sorted by expert
    place[ragged.slots] = np.arange(ragged.slots.size)
    out = np.empty((ragged.num_tokens, down.shape[1]), np.float32)
    team.run(_combine, -(-len(out) // _TOKENS), y.size, y, place.reshape(topk_weights.shape), topk_weights, out)
    return out


@njit(cache=True, nogil=True)
def _combine(bell, wake, *job):
    return share(bell, wake, _combine_rows, job)


@njit(**INLINED)
def _combine_rows(queue, y, place, weights, out):
    tokens, width = out.shape
    first = next_task(queue) * _TOKENS
    while first < tokens:
        for token in range(first, min(first + _TOKENS, tokens)):
            row = out[token]
            row[:] = 0
            for j in range(place.shape[1]):
                if place[token, j] < 0:
                    continue
                weight, term = weights[token, j], y[place[token, j]]
                for column in range(width):
                    row[column] += weight * term[column]
        first = next_task(queue) * _TOKENS
