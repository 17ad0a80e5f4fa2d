"""A walk through the Mixture-of-Experts layers of a model, first to last, each replaced before the next is met."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from ..demo.mixtral import Mixtral
from ..moe import SparseExperts
from .record import Batch, LayerRecord


class Walk(Protocol):
    """What :func:`~nmsparse.calibration.pipeline.prune_layers` needs of a model: layers are visited in order."""

    def __len__(self) -> int:
        """Number of layers with experts."""

    def experts(self, layer: int) -> SparseExperts:
        """The dense experts of a layer, in the dtype of the checkpoint."""

    def batches(self, layer: int) -> Iterator[Batch]:
        """The calibration tokens as they enter the experts, layers before as :meth:`replace` left them. Repeatable."""

    def replace(self, layer: int, gate_up: np.ndarray, down: np.ndarray) -> None:
        """Put dense weights, pruned ones, in the place of a layer's experts."""


class MixtralWalk:
    """The walk through the NumPy Mixtral: the residual stream of the whole text is kept, so no layer runs twice.

    ``windows`` ``(N, T)`` of bytes are the calibration text; ``step`` of them run at a time. Memory: N·T·H float32.
    """

    def __init__(self, model: Mixtral, windows: np.ndarray, step: int = 16):
        self.model, self.step = model, step
        self.stream = model.embedding[windows]
        self._enter(0)

    def __len__(self) -> int:
        return len(self.model.blocks)

    def experts(self, layer: int) -> SparseExperts:
        return self.model.experts[layer]

    def batches(self, layer: int) -> Iterator[Batch]:
        block = self.model.blocks[layer]
        for x in self._parts():
            rows = self.model.experts_input(block, x).reshape(-1, x.shape[-1])
            yield Batch(rows, *block.moe.route(rows), before=x.reshape(rows.shape))

    def replace(self, layer: int, gate_up: np.ndarray, down: np.ndarray) -> None:
        experts = SparseExperts(gate_up.astype(np.float32), down.astype(np.float32))
        for x, batch in zip(self._parts(), self.batches(layer), strict=True):
            x += experts(batch.x, batch.ids, batch.weights).reshape(x.shape)
        if layer + 1 < len(self):
            self._enter(layer + 1)

    def _enter(self, layer: int) -> None:
        for x in self._parts():
            x += self.model.attention(self.model.blocks[layer], x)

    def _parts(self) -> Iterator[np.ndarray]:
        """The stream in parts, as views."""
        for start in range(0, len(self.stream), self.step):
            yield self.stream[start : start + self.step]


def survey(walk: Walk) -> Iterator[LayerRecord]:
    """The statistics of one layer of the dense model after the other, without Hessians: what scores of experts need."""
    for layer in range(len(walk)):
        dense = walk.experts(layer)
        weights = [np.asarray(w, np.float32) for w in (dense.gate_up, dense.down)]
        record = LayerRecord(*weights, activation=dense.activation, hessians=False)
        for batch in walk.batches(layer):
            record.add(batch)
        yield record
        walk.replace(layer, *weights)
