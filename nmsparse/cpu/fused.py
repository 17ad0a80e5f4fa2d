"""Many tokens: both projections of an expert at once for a tile of them, of which only the result leaves the cache.

The tokens lie transposed, as in ``wide``. A few rows of gate and up at a time become sums, and the activation of those
is already the panel that the second projection reads. What would be the largest arrays of a layer are never written,
transposed back and forth, or waited for: a thread that gets less than its share of a core takes fewer tiles.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from ..formats import RaggedTokens, SparseArray
from .activations import NUMBERS, activate_run, multiply_run
from .doorbell import next_task, share
from .matmul import expert_work
from .operand import INLINED, addresses, operand
from .panel import fill_panel
from .simd import address, offset
from .threads import count, team
from .wide import ROWS, SIDE, make_room, multiply, room_addresses, write_rows

TOKENS = 64  # of a tile, at most
_TILES = 6  # for each thread, so that none waits long for the last


def suits_fused(gate_up: Any, down: Any, ragged: RaggedTokens) -> bool:
    """Whether every thread has tiles enough, most of them full. Else rows have to be shared too: ``grouped_matmul``."""
    if not (isinstance(gate_up, SparseArray) and isinstance(down, SparseArray)) or 0 in down.shape:
        return False
    return len(ragged.token_ids) >= TOKENS * max(_TILES * count(), np.count_nonzero(ragged.counts))


def fused_experts(
    gate_up: SparseArray, down: SparseArray, activation: str, x: np.ndarray, ragged: RaggedTokens
) -> np.ndarray:
    """``down[e] act(gate_up[e] x[t])`` of every slot, sorted by expert: ``(S, H)`` float32.

    >>> from nmsparse.formats import random
    >>> up, down = random((1, 8, 16), "2:4", rng=0), random((1, 16, 8), "2:4", rng=1)
    >>> x, one = np.ones((3, 16), np.float32), RaggedTokens.from_topk(np.zeros((3, 1), np.int32), 1)
    >>> y = fused_experts(up, down, "relu", x, one)
    >>> np.allclose(y, np.maximum(x @ up.todense()[0].T, 0) @ down.todense()[0].T, atol=1e-5)
    True
    """
    slots, (experts, height, inner) = len(ragged.token_ids), down.shape
    tiles = [
        (expert, start, min(TOKENS, first + rows - start))
        for expert, first, rows in expert_work(gate_up, x, ragged.offsets, ragged.token_ids)
        for start in range(first, first + rows, TOKENS)
    ]
    x, ids = np.ascontiguousarray(x, np.float32), np.ascontiguousarray(ragged.token_ids, np.int64)
    y, cost = np.empty((slots, height), np.float32), slots * (gate_up.nnz + down.nnz) // experts
    layer = operand(gate_up), operand(down), inner, gate_up.shape[1] // inner, NUMBERS[activation]
    team.run(_fused, len(tiles), cost, *layer, x, ids, np.array(tiles, np.int64), y)
    return y


@njit(cache=True, nogil=True)
def _fused(bell, wake, *job):
    return share(bell, wake, _fused_tiles, job)


@njit(**INLINED)
def _fused_tiles(queue, gate_up, down, inner, projections, kind, x, token_ids, tiles, y):
    first, second = make_room(gate_up, x.shape[1], TOKENS), make_room(down, inner, TOKENS)
    fused(queue, gate_up, down, inner, projections, kind, x, token_ids, tiles, y, first, second, TOKENS)


@njit(**INLINED)
def fused(queue, gate_up, down, inner, projections, kind, x, token_ids, tiles, y, first, second, tokens):
    """Rows of ``y``. A task is a tile of up to ``tokens`` (a literal).

    ``gate_up`` is one or two ``projections`` of ``inner`` rows each. ``first`` and ``second`` are room for either
    product; the panel in the second is what the first becomes.
    """
    gate_up, down, first, second = addresses(gate_up), addresses(down), room_addresses(first), room_addresses(second)
    width, height, step = x.shape[1], y.shape[1], max(1, ROWS // gate_up.m) * gate_up.m
    x, y = address(x), address(y)
    task = next_task(queue)
    while task < len(tiles):
        expert, slot, count = tiles[task, 0], tiles[task, 1], tiles[task, 2]
        fill_panel(first.panel, x, width, token_ids, slot, count, first.starts, tokens, SIDE)
        for row in range(0, inner, step):
            rows, hidden = min(step, inner - row), offset(second.panel, row * tokens)
            for projection in range(projections):
                top = projection * inner + row
                sums = multiply(gate_up, expert, top, top + rows, first, tokens)
                if projection == 0:
                    activate_run(hidden, sums, rows * tokens, kind)
                else:
                    multiply_run(hidden, sums, rows * tokens)
        write_rows(down, expert, 0, height, second, offset(y, slot * height), height, count, tokens, SIDE)
        task = next_task(queue)
