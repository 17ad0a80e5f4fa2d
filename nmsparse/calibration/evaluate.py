"""How well a byte-level model predicts a text, and the model that pruned layers make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ..demo.mixtral import Mixtral, bits_per_byte
from ..moe import MoELayer, SparseExperts
from .pipeline import PrunedLayer, dense_stack

BATCH = 8  # windows run together, as the demo does


def evaluate(model: Mixtral, windows: np.ndarray, advance: Callable[[int], object] = lambda _: None) -> float:
    """Mean bits per byte of ``windows`` ``(N, T)``, the first byte of each not scored.

    ``advance`` is called with the number of windows after each batch.
    """
    total = 0.0
    for start in range(0, len(windows), BATCH):
        batch = windows[start : start + BATCH]
        total += bits_per_byte(model(batch), batch) * len(batch)
        advance(len(batch))
    return total / len(windows)


def with_layers(model: Mixtral, layers: Sequence[PrunedLayer]) -> Mixtral:
    """``model`` with the experts of pruned layers, as dense weights: experts of a layer may differ in pattern."""
    blocks = []
    for block, layer in zip(model.blocks, layers, strict=True):
        experts = SparseExperts(*map(dense_stack, (layer.gate_up, layer.down)))
        blocks.append(replace(block, moe=MoELayer(block.moe.router_weight, experts, block.moe.router)))
    return Mixtral(model.config, model.embedding, blocks, model.norm, model.head)
