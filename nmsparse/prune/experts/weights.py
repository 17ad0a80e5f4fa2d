"""The weights of experts as one value, and the operation that most methods end in: keep or reorder neurons."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...errors import NMSparseError
from ...formats.checks import as_weight


class ExpertWeights(NamedTuple):
    """The two dense weights of one expert, or of E experts stacked: what ``SparseExperts(*weights)`` takes.

    ``gate_up`` is (…, 2I, H), gate rows then up rows, or (…, I, H) for experts without a gate; ``down`` is (…, H, I).
    Both have the same leading axes: none, or one of E experts. *Neuron* k is row k of the gate, row k of up and
    column k of ``down`` (an "atomic expert"): the output of an expert is the sum of its neurons' outputs.

    >>> w = ExpertWeights(np.zeros((8, 12, 16)), np.zeros((8, 16, 6)))
    >>> w.width, w.gated
    (6, True)
    """

    gate_up: np.ndarray
    down: np.ndarray

    @property
    def width(self) -> int:
        """I, the number of neurons of each expert."""
        return self.down.shape[-1]

    @property
    def gated(self) -> bool:
        """Whether ``gate_up`` holds gate and up rows."""
        return self.gate_up.shape[-2] == 2 * self.width


def as_experts(weights: tuple[np.ndarray, np.ndarray]) -> ExpertWeights:
    """``(gate_up, down)`` as :class:`ExpertWeights`, after a check.

    Raises NMSparseError for shapes that do not fit each other, and for sparse arrays: moving neurons after pruning
    breaks the groups of 2:4 along ``down``'s columns and the row groups of V:N:M and Samoyeds.

    >>> as_experts((np.zeros((4, 3)), np.zeros((3, 2)))).gated
    True
    """
    gate_up, down = weights
    for name, weight in (("gate_up", gate_up), ("down", down)):
        if hasattr(weight, "todense"):
            raise NMSparseError(
                f"{name}: expected a dense weight, got {weight!r}; choose, cut and reorder neurons first and prune to "
                "a pattern last, since moving neurons breaks the pattern"
            )
    gate_up, down = as_weight(gate_up, "gate_up"), as_weight(down, "down")
    *lead, hidden, width = down.shape
    if gate_up.shape not in ((*lead, width, hidden), (*lead, 2 * width, hidden)):
        raise NMSparseError(
            f"expected gate_up (…, 2I, H), or (…, I, H) without a gate, and down (…, H, I); got {gate_up.shape} and "
            f"{down.shape}"
        )
    return ExpertWeights(gate_up, down)


def take_neurons(weights: tuple[np.ndarray, np.ndarray], neurons: np.ndarray) -> ExpertWeights:
    """The experts with ``neurons`` only, in that order: pruning, reordering and cutting of neurons are all this.

    ``neurons`` are numbers in 0..I-1, int: (n,) for every expert, or (E, n) one list for each of E stacked experts.
    Returns copies, gate_up (…, 2n, H) and down (…, H, n). A permutation leaves the outputs as they are, but for the
    order of a sum; leaving out neuron k takes away its term ``act(gate_k x) · up_k x · down[:, k]`` and nothing else.
    Much of what goes can be made up for: :func:`nmsparse.prune.refit` of ``down`` with a mask of the kept columns.

    >>> w = (np.array([[1.0], [2.0], [3.0], [4.0]]), np.array([[5.0, 6.0]]))  # I = 2, H = 1
    >>> gate_up, down = take_neurons(w, np.array([1]))
    >>> gate_up.ravel().tolist(), down.tolist()
    ([2.0, 4.0], [[6.0]])
    """
    experts = as_experts(weights)
    lead, width, neurons = experts.down.shape[:-2], experts.width, np.asarray(neurons)
    if neurons.dtype.kind not in "iu" or neurons.ndim < 1 or neurons.shape[:-1] not in ((), lead):
        raise NMSparseError(
            f"neurons: expected integers of shape (n,){f' or {lead} + (n,)' if lead else ''}, got "
            f"{neurons.dtype}{list(neurons.shape)}"
        )
    if neurons.size and not 0 <= neurons.min() <= neurons.max() < width:
        raise NMSparseError(f"neurons: expected numbers in 0..{width - 1}, got {neurons.min()}..{neurons.max()}")
    neurons = np.broadcast_to(neurons.astype(np.intp), (*lead, neurons.shape[-1]))
    rows = np.concatenate([neurons, width + neurons], axis=-1) if experts.gated else neurons
    return ExpertWeights(
        np.take_along_axis(experts.gate_up, rows[..., :, None], axis=-2),
        np.take_along_axis(experts.down, neurons[..., None, :], axis=-1),
    )
