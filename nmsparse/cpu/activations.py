"""What stands between the two projections of an expert: ``act(gate) * up``, or ``act(h)`` without a gate."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
from numba import njit

from .simd import address
from .threads import done, next_task, team

# The functions of ``nmsparse.reference.ACTIVATIONS``, by number, since a kernel takes no function.
NUMBERS = {name: i for i, name in enumerate(("silu", "gelu", "gelu_tanh", "relu", "relu2", "identity"))}
_ROWS = 16  # of a task
_COST = 40  # of one element, in multiply-adds


def activate(h: np.ndarray, width: int, activation: str) -> np.ndarray:
    """``act(h[:, :width]) * h[:, width:]`` of ``h`` ``(S, 2 width)`` float32, or ``act(h)`` of ``(S, width)``.

    >>> activate(np.array([[-1.0, 2.0, 5.0, 3.0]], np.float32), 2, "relu")
    array([[0., 6.]], dtype=float32)
    """
    out = np.empty((len(h), width), np.float32)
    if not out.size:
        return out
    job = partial(_activate, np.ascontiguousarray(h), h.shape[1] == 2 * width, NUMBERS[activation], out)
    team.run(lambda queue, caller: job(queue), tasks=-(-len(h) // _ROWS), cost=_COST * out.size)
    return out


@njit(cache=True, nogil=True, error_model="numpy")
def _activate(h, gated, kind, out, queue):
    rows, width = out.shape
    queue = address(queue)
    first = next_task(queue) * _ROWS
    while first < rows:
        for row in range(first, min(first + _ROWS, rows)):
            for column in range(width):
                value = _one(h[row, column], kind)
                out[row, column] = value * h[row, width + column] if gated else value
        done(queue)
        first = next_task(queue) * _ROWS


@njit(cache=True, nogil=True, error_model="numpy")
def _one(x, kind):
    if kind == 0:
        return x / (np.float32(1) + math.exp(-x))
    if kind == 1:
        return x * (np.float32(1) + math.erf(x * np.float32(math.sqrt(0.5)))) * np.float32(0.5)
    if kind == 2:
        inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
        return x * (np.float32(1) + math.tanh(inner)) * np.float32(0.5)
    if kind == 5:
        return x
    positive = np.float32(0) if x < 0 else x  # NaN stays
    return positive * positive if kind == 4 else positive
