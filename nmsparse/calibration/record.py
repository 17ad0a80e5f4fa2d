"""What the pruning methods need to know of one layer's experts, summed over the tokens of a calibration text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..errors import NMSparseError
from ..prune.experts import expert_sums, turn
from ..reference import ACTIVATIONS


class Batch(NamedTuple):
    """Tokens on their way into the experts of a layer: what they are and where the router sends them.

    ``x`` ``(T, H)`` is what the experts read, ``ids`` and ``weights`` ``(T, k)`` the routing; ``before`` ``(T, H)``,
    which only EASY-EP needs, is the residual stream before the norm that makes ``x``.
    """

    x: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    before: np.ndarray | None = None

    def of(self, expert: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens ``(n, H)`` of one expert and their routing weights ``(n, 1)``."""
        tokens, slots = np.nonzero(self.ids == expert)
        return self.x[tokens], self.weights[tokens, slots, None]


@dataclass
class LayerRecord:
    r"""Sums over the tokens of each of the E experts of a layer, float64; batches add up (:meth:`add`).

    H is the hidden size, I the width, g a routing weight, E(x) an expert's output before it, h what ``down`` reads.

    ===========================  =============  =====================================================================
    ``count``, ``gates``         ``(E,)``       tokens; Σ g
    ``norms``, ``norm_squares``  ``(E,)``       Σ ‖E(x)‖, Σ ‖E(x)‖²
    ``gated_norms``              ``(E,)``       Σ g ‖E(x)‖
    ``turns``                    ``(E,)``       Σ g ‖E(x)‖ max(1 − cos, 0), see :func:`nmsparse.prune.experts.turn`
    ``largest``                  ``(E,)``       max \|E(x)\|, over tokens and outputs
    ``together``                 ``(E, E)``     tokens that chose both experts
    ``abs_gate``, ``abs_h``      ``(E, I)``     Σ \|act(gate)\|, Σ \|h\|
    ``h_squares``                ``(E, I)``     Σ h²
    ``x_squares``                ``(E, H)``     Σ x²
    ``row_squares``              ``(E, 2I)``    Σ g² ‖∂E/∂a‖², a one output of gate or up: what an error there
                                                counts in the expert's output, neurons taken one by one
    ``stream``                   float          Σ ‖before‖² over the tokens of the layer
    ``h_gradients``              ``(E, I)``     Σ (∂loss/∂h)², where a backward pass was made
    ``y_gradients``              ``(E, H)``     Σ (∂loss/∂(g E(x)))², likewise
    ``x_hessian``                ``(E, H, H)``  Σ x xᵀ, if ``hessians``
    ``h_hessian``                ``(E, I, I)``  Σ g² h hᵀ, if ``hessians``: ``down``'s error enters the layer times g
    ===========================  =============  =====================================================================

    ``gate_up`` ``(E, 2I, H)`` and ``down`` ``(E, H, I)`` are the dense weights (as :class:`~nmsparse.SparseExperts`).

    >>> rng = np.random.default_rng(0)
    >>> gate_up, down = rng.standard_normal((2, 8, 6)), rng.standard_normal((2, 6, 4))
    >>> record = LayerRecord(gate_up, down)
    >>> record.add(Batch(np.ones((3, 6)), np.array([[0], [0], [1]]), np.full((3, 1), 0.5)))
    >>> record.count.tolist(), record.gates.tolist(), record.x_hessian.shape
    ([2.0, 1.0], [1.0, 0.5], (2, 6, 6))
    """

    gate_up: np.ndarray
    down: np.ndarray
    activation: str = "silu"
    hessians: bool = True
    stream: float = field(default=0.0, init=False)
    h_gradients: np.ndarray | None = field(default=None, init=False)
    y_gradients: np.ndarray | None = field(default=None, init=False)

    @property
    def width(self) -> int:
        """I, the number of neurons of each expert."""
        return self.down.shape[2]

    def __post_init__(self) -> None:
        experts, hidden, width = self.down.shape
        rows = self.gate_up.shape[1]
        if self.activation not in ACTIVATIONS:
            raise NMSparseError(f"activation: expected one of {', '.join(ACTIVATIONS)}; got {self.activation!r}")
        for name in ("count", "gates", "norms", "norm_squares", "gated_norms", "turns", "largest"):
            setattr(self, name, np.zeros(experts))
        self.together = np.zeros((experts, experts))
        self.abs_gate, self.abs_h, self.h_squares = np.zeros((3, experts, width))
        self.x_squares, self.row_squares = np.zeros((experts, hidden)), np.zeros((experts, rows))
        if self.hessians:
            self.x_hessian = np.zeros((experts, hidden, hidden))
            self.h_hessian = np.zeros((experts, width, width))

    def add(self, batch: Batch) -> None:
        """Run the experts on a batch and add what they meet."""
        experts = len(self.down)
        ids = np.asarray(batch.ids)
        used = np.zeros((len(ids), experts))
        np.put_along_axis(used, ids, 1.0, axis=1)
        self.together += used.T @ used
        norms, moved = np.zeros(ids.shape), np.zeros(batch.x.shape)
        for e in range(experts):
            x, g = batch.of(e)
            if not len(x):
                continue
            y = self._add_expert(e, x, g)
            norms[ids == e] = np.linalg.norm(y, axis=1)
            self.largest[e] = max(self.largest[e], np.abs(y).max())
            if batch.before is not None:
                moved[np.nonzero(ids == e)[0]] += g * y
        gates = batch.weights
        self.count += expert_sums(ids, np.ones(ids.shape), experts)
        self.gates += expert_sums(ids, gates, experts)
        self.norms += expert_sums(ids, norms, experts)
        self.norm_squares += expert_sums(ids, norms**2, experts)
        self.gated_norms += expert_sums(ids, gates * norms, experts)
        if batch.before is not None:
            self.stream += float(np.vdot(batch.before, batch.before))
            turned = turn(batch.before, batch.before + moved)
            self.turns += expert_sums(ids, gates * norms * turned[:, None], experts)

    def _add_expert(self, e: int, x: np.ndarray, g: np.ndarray) -> np.ndarray:
        """Add the tokens of one expert; returns E(x) ``(n, H)``."""
        width = self.width
        a = x @ self.gate_up[e].T
        act = ACTIVATIONS[self.activation]
        gate, up = act(a[:, :width]), (a[:, width:] if a.shape[1] > width else None)
        h = gate if up is None else gate * up
        slope = (act(a[:, :width] + _STEP) - act(a[:, :width] - _STEP)) / (2 * _STEP) * g
        columns = np.square(self.down[e], dtype=np.float64).sum(axis=0)
        self.row_squares[e, :width] += _squares(slope if up is None else slope * up) * columns
        if up is not None:
            self.row_squares[e, width:] += _squares(gate * g) * columns
        self.abs_gate[e] += np.abs(gate).sum(axis=0, dtype=np.float64)
        self.abs_h[e] += np.abs(h).sum(axis=0, dtype=np.float64)
        self.h_squares[e] += _squares(h)
        self.x_squares[e] += _squares(x)
        if self.hessians:
            weighted = h * g
            self.x_hessian[e] += x.T @ x
            self.h_hessian[e] += weighted.T @ weighted
        return h @ self.down[e].T

    def add_gradients(self, expert: int, h: np.ndarray, y: np.ndarray) -> None:
        """Add ∂loss/∂h ``(n, I)`` and ∂loss/∂(g E(x)) ``(n, H)`` of an expert's tokens."""
        if self.h_gradients is None:
            self.h_gradients, self.y_gradients = np.zeros_like(self.h_squares), np.zeros_like(self.x_squares)
        self.h_gradients[expert] += _squares(h)
        self.y_gradients[expert] += _squares(y)


_STEP = 2.0**-7  # of the central difference that gives the slope of the activation: exact to 1e-5 in float32


def _squares(a: np.ndarray) -> np.ndarray:
    return np.einsum("tk,tk->k", a, a, dtype=np.float64)


def hidden(x: np.ndarray, gate_up: np.ndarray, width: int, activation: str = "silu") -> np.ndarray:
    """What ``down`` reads, ``(T, I)``, in the dtype of ``x``: act(gate x) · up x, or act(gate x) without an up.

    >>> hidden(np.array([[1.0]]), np.array([[2.0], [3.0]]), 1, "identity").tolist()
    [[6.0]]
    """
    a = x @ gate_up.T
    gate = ACTIVATIONS[activation](a[:, :width])
    return gate if a.shape[1] == width else gate * a[:, width:]


def hidden_moments(
    batches: Iterable[Batch], dense: np.ndarray, pruned: np.ndarray, activation: str = "silu"
) -> tuple[np.ndarray, np.ndarray]:
    """What ``down`` reads after ``gate_up`` was pruned: Σ g² h' h'ᵀ ``(E, I', I')`` and Σ g² h h'ᵀ ``(E, I, I')``.

    h' comes from ``pruned`` ``(E, 2I', H)``, whose neurons may be fewer or in another order, and h from the ``dense``
    ``(E, 2I, H)``, for the same tokens.
    """
    old_width, new_width = dense.shape[1] // 2, pruned.shape[1] // 2
    hessian = np.zeros((len(pruned), new_width, new_width))
    cross = np.zeros((len(pruned), old_width, new_width))
    for batch in batches:
        for e in range(len(pruned)):
            x, g = batch.of(e)
            new = hidden(x, pruned[e], new_width, activation) * g
            hessian[e] += new.T @ new
            cross[e] += (hidden(x, dense[e], old_width, activation) * g).T @ new
    return hessian, cross
