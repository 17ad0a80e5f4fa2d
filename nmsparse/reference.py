"""The truth: every operation in a few lines of NumPy on decoded weights, in float64.

Nothing here is fast and nothing here is clever. The kernels are tested against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .errors import NMSparseError
from .formats.tokens import DROPPED

ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "identity": lambda x: x,
}


def dense(a: Any) -> np.ndarray:
    """``a`` as a float64 array, decoded if it is sparse.

    >>> dense([1, 2])
    array([1., 2.])
    """
    return np.asarray(a.todense() if hasattr(a, "todense") else a).astype(np.float64)


def matmul(a: Any, b: Any) -> np.ndarray:
    """``a @ b`` of dense or sparse operands.

    >>> matmul(np.eye(2), np.ones((2, 1))).tolist()
    [[1.0], [1.0]]
    """
    return dense(a) @ dense(b)


def grouped_matmul(x: Any, w: Any, offsets: np.ndarray) -> np.ndarray:
    """Rows ``offsets[e-1]:offsets[e]`` of ``x`` ``(S, K)`` times expert ``e`` of ``w`` ``(E, M, K)``: ``(S, M)``.

    >>> grouped_matmul(np.ones((3, 1)), np.array([[[2.0]], [[5.0]]]), np.array([1, 3])).ravel().tolist()
    [2.0, 5.0, 5.0]
    """
    x, w = dense(x), dense(w)
    rows = np.split(x, offsets[:-1])
    return np.concatenate([rows[e] @ w[e].T for e in range(len(w))]) if len(w) else np.zeros((0, w.shape[1]))


def gated(h: np.ndarray, width: int, activation: str) -> np.ndarray:
    """What the down projection reads of ``h``: ``act(gate) * up`` of the rows ``[gate; up]``, or ``act(h)``.

    >>> gated(np.array([[3.0, 2.0]]), 1, "identity").tolist()
    [[6.0]]
    """
    act = ACTIVATIONS[activation]
    if h.shape[-1] == width:
        return act(h)
    if h.shape[-1] != 2 * width:
        raise NMSparseError(f"gate_up has {h.shape[-1]} rows, down reads {width}: expected as many, or twice that")
    return act(h[..., :width]) * h[..., width:]


def moe(
    x: np.ndarray, topk_ids: np.ndarray, topk_weights: np.ndarray, gate_up: Any, down: Any, activation: str = "silu"
) -> np.ndarray:
    """Experts of an MoE layer: ``y[t] = Σ_j weights[t, j] · down[e] act(gate_up[e] x[t])`` with e = ids[t, j].

    ``x`` ``(T, H)``, ids and weights ``(T, k)``, ``gate_up`` ``(E, 2I, H)`` or ``(E, I, H)``, ``down`` ``(E, H, I)``.
    Ids of -1 are left out.

    >>> x, eye = np.array([[1.0, 2.0]]), np.eye(2)[None]
    >>> moe(x, np.array([[0]]), np.array([[0.5]]), eye, eye, "identity").tolist()
    [[0.5, 1.0]]
    """
    x, gate_up, down = dense(x), dense(gate_up), dense(down)
    y = np.zeros((len(x), down.shape[1]))
    for t, (ids, weights) in enumerate(zip(topk_ids, topk_weights, strict=True)):
        for e, weight in zip(ids, weights, strict=True):
            if e == DROPPED:
                continue
            y[t] += float(weight) * (down[e] @ gated(gate_up[e] @ x[t], down.shape[2], activation))
    return y
