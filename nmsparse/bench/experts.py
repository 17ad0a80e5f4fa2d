"""What pruning by whole experts and whole neurons costs, and what dropping at run time does: tiny-moe, bits per byte.

Nothing is refitted here, so that scores are compared and nothing else; ``docs/accuracy.md`` explains the figures.
Gradients for HEAPr need torch and transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from ..calibration import LayerRecord, MixtralWalk, survey
from ..calibration.evaluate import evaluate
from ..demo import MODEL
from ..demo.mixtral import Mixtral
from ..errors import require
from ..formats import DROPPED
from ..moe import MoELayer, SparseExperts
from ..prune.experts import (
    ExpertWeights,
    best_experts,
    best_neurons,
    cluster,
    drop_1t,
    expert_bytes,
    expert_distances,
    heapr,
    interleave,
    mean_norm,
    partition,
    reap,
    reconstruct,
    remove_experts,
    representatives,
    route_2t,
    sub_routing,
    tile_widths,
)
from .accuracy import SAMPLE, TEXT, Study

KEEP = (7, 6, 4)  # of 8 experts in each layer
CLUSTERS = (21, 18)  # of 24 experts in the model
SHARES = (3 / 4, 1 / 2)  # of the neurons
TILE = 64  # neurons that go together, the k-tile of the kernels
MIXED = ("dense", "2:4", "samoyeds:1:2:128", "drop")
ORDERS = ("none", "abs_gate", "abs_h", "heapr")  # neurons by importance before they are halved
DROPS = (
    ((0.2,), "none"), ((0.3,), "none"), ((0.4,), "none"), ((0.0, 0.0), "none"),
    *(((0.25, 0.35), order) for order in ORDERS),
    ((0.1, 0.3), "heapr"), ((0.05, 0.4), "heapr"), ((0.2, 0.5), "heapr"),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One model. ``skipped`` is the part of the experts' arithmetic that is left out, ``seconds`` the experts' time."""

    table: str
    what: str
    nbytes: int
    bits: float
    loss: float
    skipped: float = 0.0
    seconds: float = 0.0


@dataclass
class Dropping:
    """An MoE layer of which tokens skip experts of little weight (one threshold), or their halves (two thresholds)."""

    layer: MoELayer
    experts: SparseExperts
    thresholds: tuple[float, ...]
    slots: int = field(default=0, init=False)
    skipped: int = field(default=0, init=False)

    def route(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The routing to the experts, or to the halves."""
        ids, weights = self.layer.route(x)
        if len(self.thresholds) == 1:
            ids, weights = sub_routing(ids, weights, 1, drop_1t(weights, *self.thresholds))
        else:
            ids, weights = route_2t(ids, weights, *self.thresholds)
        self.slots += ids.size
        self.skipped += int((ids == DROPPED).sum())
        return ids, weights


class ExpertStudy(Study):
    """The model with the statistics of all its layers."""

    def __init__(self) -> None:
        super().__init__()
        windows = self.calibration[::TEXT]
        self.records = list(survey(MixtralWalk(self.checkpoint, windows)))
        for record, observed in zip(self.records, gradients(windows), strict=True):
            record.h_gradients = observed.h_gradients

    def sums(self, name: str) -> np.ndarray:
        """A statistic of all layers, (L, E, …)."""
        return np.stack([getattr(record, name) for record in self.records])

    def weights(self, layer: int) -> ExpertWeights:
        return ExpertWeights(self.records[layer].gate_up, self.records[layer].down)

    def measured(self, table: str, what: str, nbytes: int, layers: list[MoELayer | Dropping]) -> Row:
        """The row of the model with these MoE layers."""
        model, seconds = with_layers(self.checkpoint, layers), []
        bits = evaluate(model, self.heldout[::SAMPLE], lambda _: seconds.append(model.seconds_in_experts))
        slots = sum(getattr(layer, "slots", 0) for layer in layers)
        skipped = sum(getattr(layer, "skipped", 0) for layer in layers) / max(slots, 1)
        row = Row(table, what, nbytes, bits, bits - self.dense_bits(SAMPLE), skipped, sum(seconds))
        print(
            f"{table:8} {what:48} {nbytes:>10,} {bits:8.4f} {row.loss:+8.4f} {skipped:6.1%} {row.seconds:6.2f} s",
            flush=True,
        )
        return row


def gradients(windows: np.ndarray) -> list[LayerRecord]:
    """Records with gradients, by torch."""
    torch, transformers = require("torch", "torch"), require("transformers", "test")
    from ..calibration.huggingface import observe

    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    return observe(model, torch.from_numpy(windows.astype(np.int64)).split(4))


def with_layers(model: Mixtral, layers: list[MoELayer | Dropping]) -> Mixtral:
    """``model`` with other MoE layers."""
    blocks = [replace(block, moe=layer) for block, layer in zip(model.blocks, layers, strict=True)]
    return Mixtral(model.config, model.embedding, blocks, model.norm, model.head)


def removals(study: ExpertStudy) -> Iterator[Row]:
    """Whole experts, router rows included: by scores with as many in each layer, and by clusters."""
    count = study.sums("count")
    scores = {
        "frequency": count,
        "REAP": reap(study.sums("gated_norms"), count),
        "EASY-EP": study.sums("turns"),
        "MAN": mean_norm(study.sums("norms"), count),
        "MSAN": mean_norm(study.sums("norm_squares"), count),
    }
    for keep in KEEP:
        for name, score in scores.items():
            yield _removed(study, f"{keep} of 8 experts, {name}", best_experts(score, keep))
    routers = [block.moe.router_weight for block in study.checkpoint.blocks]
    distances = {
        "router": np.stack([expert_distances(rows) for rows in routers]),
        "router and choices": np.stack(
            [expert_distances(rows, c) for rows, c in zip(routers, study.sums("together"), strict=True)]
        ),
    }
    for total in CLUSTERS:
        for name, distance in distances.items():
            labels = cluster(distance, total, minimum=2)
            kept = np.zeros(labels.shape, bool)
            for layer, found in enumerate(labels):
                kept[layer, representatives(found, study.weights(layer))] = True
            yield _removed(study, f"{total} of 24 experts, STUN by {name}", kept)


def _removed(study: ExpertStudy, what: str, kept: np.ndarray) -> Row:
    layers, nbytes = [], 0
    for layer, (block, mask) in enumerate(zip(study.checkpoint.blocks, kept, strict=True)):
        rows, rest, _ = remove_experts(mask, block.moe.router_weight, study.weights(layer))
        layers.append(MoELayer(rows, SparseExperts(*rest), block.moe.router))
        nbytes += int(mask.sum()) * _bytes(study, rest.width)
    return study.measured("removal", what, nbytes, layers)


def _bytes(study: ExpertStudy, width: int) -> int:
    experts = study.checkpoint.experts[0]
    return expert_bytes("dense", experts.hidden_size, width, experts.dtype)


def narrowings(study: ExpertStudy) -> Iterator[Row]:
    """Neurons: as many of each expert, or the best tiles of the whole model."""
    count, squares = study.sums("count"), study.sums("h_squares")
    mean_rise = heapr(squares, study.sums("h_gradients"), count)
    down = np.square(study.sums("down")).sum(axis=2)
    scores = {
        "HEAPr x tokens": mean_rise * count[..., None],
        "HEAPr": mean_rise,
        "h² x down²": squares * down,
        "sum of |h|": study.sums("abs_h"),
        "magnitude": np.square(study.sums("gate_up")).sum(axis=3).reshape(*count.shape, 2, -1).sum(axis=2) + down,
    }
    units, width = count.size, squares.shape[-1]
    for share in SHARES:
        for name, score in scores.items():
            flat = score.reshape(units, width)
            same = np.full(units, round(share * width / TILE) * TILE)
            for how, widths in (("each expert", same), ("whole model", tile_widths(flat, same.sum(), tile=TILE))):
                yield _narrowed(study, f"{share:.0%} of the neurons, {name}, {how}", flat, widths)


def _narrowed(study: ExpertStudy, what: str, scores: np.ndarray, widths: np.ndarray) -> Row:
    """The model without the weakest neurons: zeros in down, which is what taking them out computes."""
    kept = np.zeros(scores.shape, bool)
    for unit, width in enumerate(widths):
        kept[unit, best_neurons(scores[unit], width)] = True
    layers = []
    for block, record, mask in zip(
        study.checkpoint.blocks, study.records, np.split(kept, len(study.records)), strict=True
    ):
        experts = SparseExperts(record.gate_up, record.down * mask[:, None])
        layers.append(MoELayer(block.moe.router_weight, experts, block.moe.router))
    return study.measured("narrow", what, sum(_bytes(study, int(width)) for width in widths), layers)


def drops(study: ExpertStudy) -> Iterator[Row]:
    """1T- and 2T-Drop, the halves of experts on the library's kernels."""
    importance = {
        "abs_gate": study.sums("abs_gate"),
        "abs_h": study.sums("abs_h"),
        "heapr": heapr(study.sums("h_squares"), study.sums("h_gradients"), study.sums("count")),
    }
    nbytes = study.sums("count").size * _bytes(study, study.records[0].width)
    yield study.measured("drop", "whole experts", nbytes, [block.moe for block in study.model.blocks])
    for thresholds, order in DROPS:
        layers: list[Dropping] = []
        for layer, block in enumerate(study.checkpoint.blocks):
            weights = study.weights(layer)
            if order != "none":
                weights, _ = reconstruct(weights, importance[order][layer])
            if len(thresholds) == 2:
                weights = interleave(partition(weights, [weights.width // 2]))
            layers.append(Dropping(block.moe, SparseExperts(*weights), thresholds))
        name = f"{len(thresholds)}T {' '.join(f'{t:g}' for t in thresholds)}, order {order}"
        yield study.measured("drop", name, nbytes, layers)


PARTS: tuple[Callable[[ExpertStudy], Iterator[Row]], ...] = (removals, narrowings, drops)


def run() -> list[dict]:
    """All rows, and one allocation that may drop experts, under the bytes of Samoyeds."""
    study = ExpertStudy()
    rows = [asdict(row) for part in PARTS for row in part(study)]
    return [*rows, asdict(study.row("mixed", "allocation", "admm", name=" / ".join(MIXED), choices=MIXED))]
