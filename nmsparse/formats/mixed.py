"""Experts of one layer that differ in pattern: a stack of weights for each kind, and which experts it holds."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import NMSparseError
from ._base import SparseArray, stack
from .checks import as_weight, is_on_gpu

DENSE, DROP = "dense", "drop"  # what allocations call an expert that stays as it is, and one that is left out


class Part(NamedTuple):
    """The experts of one kind: their numbers, int64 and ascending, and their weights ``(len(numbers), M, K)``."""

    numbers: np.ndarray
    weight: Any


class MixedExperts:
    """Weights ``(E, M, K)`` of E experts, each dense or of a pattern of its own, or dropped.

    ``parts`` are pairs of expert numbers and the weights of these experts, a sparse array or a dense one ``(n, M, K)``
    of the host or of a GPU. An expert that is in no part is dropped: a matrix of zeros that takes no memory. What an
    allocation under a budget makes (:func:`nmsparse.prune.experts.allocate`), and what
    :class:`~nmsparse.moe.SparseExperts` takes as a weight.

    Raises NMSparseError for parts that do not fit each other.

    >>> from nmsparse.formats import random
    >>> w = MixedExperts([([0, 3], random((2, 8, 16), "2:4", rng=0)), ([2], np.ones((1, 8, 16), np.float32))], 4)
    >>> w
    MixedExperts(float32[4, 8, 16], 2 x 2:4, 1 x drop, 1 x dense)
    >>> w.kinds, w.todense()[1].any()
    (['2:4', 'drop', 'dense', '2:4'], np.False_)
    """

    ndim = 3

    def __init__(self, parts: Sequence[tuple[Sequence[int], Any]], num_experts: int):
        self.parts = [_part(numbers, weight) for numbers, weight in parts]
        if not self.parts:
            raise NMSparseError("expected one expert at least that is not dropped, got no parts")
        alike = {(tuple(w.shape[1:]), w.dtype.name, device_of(w)) for _, w in self.parts}
        if len(alike) > 1:
            raise NMSparseError(f"expected parts of one shape, dtype and device, got {sorted(map(str, alike))}")
        held = np.concatenate([numbers for numbers, _ in self.parts])
        if np.unique(held).size < held.size or not 0 <= held.min() <= held.max() < num_experts:
            raise NMSparseError(f"expected each number of 0..{num_experts - 1} once at most, got {held.tolist()}")
        self.shape = num_experts, *self.parts[0].weight.shape[1:]

    @property
    def dtype(self) -> np.dtype:
        """dtype of all parts."""
        return self.parts[0].weight.dtype

    @property
    def device(self) -> str:
        """Where all parts are: ``"cpu"`` or ``"cuda:N"``."""
        return device_of(self.parts[0].weight)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts, metadata included."""
        return sum(weight.nbytes for _, weight in self.parts)

    @property
    def kinds(self) -> list[str]:
        """Of each expert: ``"dense"``, its pattern, or ``"drop"``."""
        kinds = [DROP] * self.shape[0]
        for numbers, weight in self.parts:
            for number in numbers:
                kinds[number] = kind_of(weight)
        return kinds

    def __getitem__(self, expert: int) -> Any:
        """The weight of one expert ``(M, K)``, None if it is dropped."""
        for numbers, weight in self.parts:
            if (at := np.flatnonzero(numbers == expert)).size:
                return weight[int(at[0])]
        return None

    def todense(self) -> np.ndarray:
        """All experts, dense, zeros for those that are dropped. On the host only."""
        dense = np.zeros(self.shape, self.dtype)
        for numbers, weight in self.to_device("cpu").parts:
            dense[numbers] = weight.todense() if isinstance(weight, SparseArray) else weight
        return dense

    def to_device(self, device: str) -> MixedExperts:
        """The same experts on ``device``: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``."""
        return MixedExperts([(numbers, _moved(weight, device)) for numbers, weight in self.parts], self.shape[0])

    def astype(self, dtype: Any) -> MixedExperts:
        """The same experts with values in another dtype. On the host only."""
        return MixedExperts([(numbers, weight.astype(dtype)) for numbers, weight in self.parts], self.shape[0])

    @property
    def summary(self) -> str:
        """How many experts there are of each kind."""
        kinds = self.kinds
        return ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))

    def with_weights(self, weights: Sequence[Any]) -> MixedExperts:
        """The same experts of the same parts with other weights, which are taken as they come."""
        other = copy.copy(self)
        other.parts = [Part(numbers, weight) for (numbers, _), weight in zip(self.parts, weights, strict=True)]
        return other

    def __repr__(self) -> str:
        return f"MixedExperts({self.dtype.name}[{', '.join(map(str, self.shape))}], {self.summary})"


def stack_experts(weights: Sequence[Any]) -> Any:
    """The weights ``(M, K)`` of E experts as one: a stack if they are of one kind, else :class:`MixedExperts`.

    Each is a sparse array or an ndarray, or None if the expert is dropped.

    >>> from nmsparse.formats import random
    >>> stack_experts([np.eye(4), None, random((4, 4), "2:4", dtype=np.float64, rng=0)])
    MixedExperts(float64[3, 4, 4], 1 x dense, 1 x drop, 1 x 2:4)
    >>> stack_experts([np.eye(4), np.eye(4)]).shape
    (2, 4, 4)
    """
    groups: dict[str, list[int]] = {}
    for number, weight in enumerate(weights):
        if weight is not None:
            groups.setdefault(kind_of(weight), []).append(number)
    parts = []
    for numbers in groups.values():
        some = [weights[number] for number in numbers]
        dense = not isinstance(some[0], SparseArray)
        parts.append((numbers, np.stack([as_weight(w, "stack_experts") for w in some]) if dense else stack(some)))
    if len(parts) == 1 and len(parts[0][0]) == len(weights):
        return parts[0][1]
    return MixedExperts(parts, len(weights))


def kind_of(weight: Any) -> str:
    """The pattern of a weight, or ``"dense"``."""
    pattern = getattr(weight, "pattern", None)
    return DENSE if pattern is None else str(pattern)


def device_of(weight: Any) -> str:
    """``"cpu"`` or ``"cuda:N"``; arrays of the GPU backend know the number of theirs."""
    device = getattr(weight, "device", "cpu")
    return f"cuda:{device}" if isinstance(device, int) else str(device)


def _part(numbers: Sequence[int], weight: Any) -> Part:
    numbers = np.asarray(numbers, np.int64)
    if not isinstance(weight, SparseArray):
        weight = SparseArray._cuda("array").view(weight) if is_on_gpu(weight) else as_weight(weight, "experts")
    if weight.ndim != 3 or numbers.shape != tuple(weight.shape[:1]) or not numbers.size:
        raise NMSparseError(
            f"expected a weight (n, M, K) and the numbers of its n experts, got {tuple(weight.shape)} and "
            f"{numbers.tolist()}"
        )
    if (np.diff(numbers) <= 0).any():
        raise NMSparseError(f"expected the numbers of a part in ascending order, got {numbers.tolist()}")
    return Part(numbers, weight)


def _moved(weight: Any, device: str) -> Any:
    if isinstance(weight, SparseArray):
        return weight.to_device(device)
    if device_of(weight) == device:
        return weight
    if not isinstance(weight, np.ndarray):
        weight = weight.numpy()
    if device == "cpu":
        return weight
    cuda = SparseArray._cuda("driver")
    number = int(device.partition(":")[2] or cuda.current_device())
    return SparseArray._cuda("array").from_host(weight, number)
