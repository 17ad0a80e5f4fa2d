"""What stands between the two projections of an expert: ``act(gate) * up``, or ``act(h)`` without a gate."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from .doorbell import next_task, share
from .operand import INLINED
from .simd import address, at, offset, put
from .threads import team

# The functions of ``nmsparse.reference.ACTIVATIONS``, by number, since a kernel takes no function.
NUMBERS = {name: i for i, name in enumerate(("silu", "gelu", "gelu_tanh", "relu", "relu2", "identity"))}
_ROWS = 16  # of a task
_COST = 10  # of one element, in multiply-adds
# ln 2 in two parts: the first has so few bits that n times it is exact (Cody and Waite).
_LN2_HIGH = np.float32(round(math.log(2) * 2**15) / 2**15)
_LN2_LOW = np.float32(math.log(2) - round(math.log(2) * 2**15) / 2**15)


def activate(h: np.ndarray, width: int, activation: str) -> np.ndarray:
    """``act(h[:, :width]) * h[:, width:]`` of ``h`` ``(S, 2 width)`` float32, or ``act(h)`` of ``(S, width)``.

    >>> activate(np.array([[-1.0, 2.0, 5.0, 3.0]], np.float32), 2, "relu")
    array([[0., 6.]], dtype=float32)
    """
    out = np.empty((len(h), width), np.float32)
    if not out.size:
        return out
    tasks, gated = -(-len(h) // _ROWS), h.shape[1] == 2 * width
    team.run(_activate, tasks, _COST * out.size, np.ascontiguousarray(h), gated, NUMBERS[activation], out)
    return out


@njit(cache=True, nogil=True)
def _activate(bell, wake, *job):
    return share(bell, wake, _activate_rows, job)


@njit(**INLINED)
def _activate_rows(queue, h, gated, kind, out):
    (rows, width), step = out.shape, h.shape[1]
    h, out = address(h), address(out)
    first = next_task(queue) * _ROWS
    while first < rows:
        for row in range(first, min(first + _ROWS, rows)):
            gate = offset(h, row * step)
            activate_run(offset(out, row * width), gate, width, kind)
            if gated:
                multiply_run(offset(out, row * width), offset(gate, width), width)
        first = next_task(queue) * _ROWS


@njit(**INLINED)
def activate_run(out, h, count, kind):
    """The activation of ``count`` elements in a row."""
    if kind == 0:  # a loop of its own, so that it is vectorised
        for i in range(count):
            put(out, i, at(h, i) / (np.float32(1) + _exp(-at(h, i))))
    else:
        for i in range(count):
            put(out, i, _one(at(h, i), kind))


@njit(**INLINED)
def multiply_run(out, up, count):
    """``count`` elements in a row, times others."""
    for i in range(count):
        put(out, i, at(out, i) * at(up, i))


@njit(fastmath={"contract"}, **INLINED)
def _exp(x):
    """e to the x as 2^n e^r with |r| <= ln 2 / 2, e^r by its Taylor series: the first term left out is below 6e-9.

    Unlike ``math.exp``, a call, this vectorises. inf from 88.4 on and 0 below -88, within 2 roundings between.
    """
    x = np.float32(89) if x > np.float32(89) else x
    x = np.float32(-88) if x < np.float32(-88) else x
    n = np.floor(x * np.float32(1 / math.log(2)) + np.float32(0.5))
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    series = np.float32(1 / 5040)
    series = series * r + np.float32(1 / 720)
    series = series * r + np.float32(1 / 120)
    series = series * r + np.float32(1 / 24)
    series = series * r + np.float32(1 / 6)
    series = series * r + np.float32(1 / 2)
    series = series * r + np.float32(1)
    return (series * r + np.float32(1)) * power


@njit(**INLINED)
def _one(x, kind):
    if kind == 1:
        return x * (np.float32(1) + math.erf(x * np.float32(math.sqrt(0.5)))) * np.float32(0.5)
    if kind == 2:
        inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
        return x * (np.float32(1) + math.tanh(inner)) * np.float32(0.5)
    if kind == 5:
        return x
    positive = np.float32(0) if x < 0 else x  # NaN stays
    return positive * positive if kind == 4 else positive
