"""Pruning a Mixture-of-Experts model by whole experts and by whole neurons, and choosing a pattern for each expert.

Functions on arrays, to be applied in this order, since each step breaks what a later one would have made:

1. :func:`super_experts`: what nothing may touch;
2. drop experts: scores :func:`easy_ep`, :func:`reap`, :func:`mean_norm`, or clusters :func:`cluster`, then
   :func:`remove_experts`;
3. drop neurons: :func:`heapr`, :func:`tile_widths`, :func:`take_neurons`;
4. order neurons by importance and cut: :func:`reconstruct`, :func:`partition`;
5. a pattern for each expert under a budget: :func:`allocate`;
6. prune to the patterns (:mod:`nmsparse.prune`) and pack;
7. at run time, drop slots: :func:`route_2t`.
"""

from __future__ import annotations

from .allocation import allocate, expert_bytes, output_loss
from .clusters import cluster, expert_distances, representatives
from .dropping import FULL, MAJOR, SKIP, drop_1t, drop_2t, dropped, route_2t, shares
from .heapr import heapr
from .partition import Complete, complete, interleave, neuron_multiple, partition, sub_routing
from .reconstruction import neuron_importance, reconstruct
from .removal import best_experts, remove_experts
from .scores import easy_ep, expert_sums, mean_norm, mix_domains, reap, turn
from .super_experts import super_experts
from .weights import ExpertWeights, as_experts, take_neurons
from .widths import best_neurons, tile_widths

__all__ = [
    "FULL",
    "MAJOR",
    "SKIP",
    "Complete",
    "ExpertWeights",
    "allocate",
    "as_experts",
    "best_experts",
    "best_neurons",
    "cluster",
    "complete",
    "drop_1t",
    "drop_2t",
    "dropped",
    "easy_ep",
    "expert_bytes",
    "expert_distances",
    "expert_sums",
    "heapr",
    "interleave",
    "mean_norm",
    "mix_domains",
    "neuron_importance",
    "neuron_multiple",
    "output_loss",
    "partition",
    "reap",
    "reconstruct",
    "remove_experts",
    "representatives",
    "route_2t",
    "shares",
    "sub_routing",
    "super_experts",
    "take_neurons",
    "tile_widths",
    "turn",
]
