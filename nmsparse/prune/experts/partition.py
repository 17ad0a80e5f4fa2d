"""Cutting experts into sub-experts that sum to the same output, and routing to them.

    y_e(x) = Σ_p down_e[:, cut_p] · h_e[cut_p]        the neurons of an expert, in P runs

The *partial* transformation leaves the router alone: expert e becomes the ids eP..eP+P−1 with the same weight
(:func:`sub_routing`). It is exact for every router. The *complete* transformation makes an ordinary model with E·P
experts and top-k·P (:func:`complete`), for engines and fine-tuning that know nothing of parts; it is exact for the
routers that it accepts. One cut serves DualSparse-MoE (major and minor halves) and the sharding of each expert over
GPUs (MoEShard, arXiv:2503.08467).

Cai et al., "DualSparse-MoE: Coordinating Tensor/Neuron-Level Sparsity with Expert Partition and Reconstruction",
arXiv:2508.18376.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ...errors import NMSparseError
from ...formats import DROPPED, NM, VNM, Pattern, parse
from .weights import ExpertWeights, as_experts, take_neurons


def neuron_multiple(*patterns: str | Pattern, tile: int = 1) -> int:
    """What cuts and widths must be multiples of, so that no group of a pattern and no ``tile`` of a kernel is cut.

    Neurons are rows of gate and up, where V:N:M decides ``v`` rows together and Samoyeds ``m``, and columns of down,
    which 2:4 and V:N:M group by ``m`` and Samoyeds by ``v``.

    >>> neuron_multiple("2:4", tile=64), neuron_multiple("samoyeds:1:2:128"), neuron_multiple("vnm:64:2:10")
    (64, 128, 320)
    """
    sizes = [tile]
    for pattern in map(parse, patterns):
        sizes += [pattern.rows, pattern.m if isinstance(pattern, (NM, VNM)) else pattern.v]
    return math.lcm(*sizes)


def partition(weights: tuple[np.ndarray, np.ndarray], cuts: Sequence[int], *, multiple: int = 1) -> list[ExpertWeights]:
    """The parts of an expert, or of each of E stacked experts, between ``cuts``: their outputs sum to the expert's.

    ``cuts`` are ascending neuron numbers in 1..I-1, as for ``numpy.split``: ``[I // 2]`` halves. Each must be a
    multiple of ``multiple`` (see :func:`neuron_multiple`), and so must I. The parts are copies.

    Raises NMSparseError for other cuts, and for weights that are sparse already.

    >>> w = (np.arange(12.0).reshape(12, 1), np.arange(6.0).reshape(1, 6))  # I = 6, H = 1
    >>> [part.down.tolist() for part in partition(w, [2])]
    [[[0.0, 1.0]], [[2.0, 3.0, 4.0, 5.0]]]
    >>> partition(w, [3], multiple=2)
    Traceback (most recent call last):
    ...
    nmsparse.errors.NMSparseError: cuts: expected ascending multiples of 2 in 1..5 of a width of 6, got [3]
    """
    experts = as_experts(weights)
    ends = [0, *map(int, cuts), experts.width]
    if any(a >= b or b % multiple for a, b in pairwise(ends)):
        raise NMSparseError(
            f"cuts: expected ascending multiples of {multiple} in 1..{experts.width - 1} of a width of "
            f"{experts.width}, got {list(cuts)}"
        )
    return [take_neurons(experts, np.arange(a, b)) for a, b in pairwise(ends)]


def interleave(parts: Sequence[ExpertWeights]) -> ExpertWeights:
    """P parts of E stacked experts as E·P experts, part p of expert e at eP + p; the parts must be equally wide.

    >>> halves = partition((np.zeros((3, 8, 5)), np.zeros((3, 5, 4))), [2])
    >>> interleave(halves).down.shape
    (6, 5, 2)
    """
    if len({part.down.shape for part in parts}) != 1 or parts[0].down.ndim != 3:
        raise NMSparseError(
            f"expected parts (E, …) of one width, got down {[part.down.shape for part in parts]}; run parts of "
            "different widths one after another, each with the routing of the whole"
        )

    def stack(weights: list[np.ndarray]) -> np.ndarray:
        return np.stack(weights, axis=1).reshape(-1, *weights[0].shape[1:])

    return ExpertWeights(stack([part.gate_up for part in parts]), stack([part.down for part in parts]))


def sub_routing(ids: Any, weights: Any, parts: int, kept: Any = None) -> tuple[Any, Any]:
    """The routing (T, k·P) to the parts that :func:`interleave` makes, of a routing ``ids``, ``weights`` (T, k).

    Id e becomes eP..eP+P−1, each with the weight of e; down is *not* multiplied by P. Where ``kept`` (T, k) is given,
    only that many leading parts of each slot run, and the others get the id ``DROPPED`` (-1), which
    :class:`~nmsparse.SparseExperts` leaves out: with P = 2 and the modes of :func:`drop_2t` this is what dropping
    means. dtypes stay; tensors of torch give tensors, on their device and without waiting for it.

    >>> ids, weights = sub_routing(np.array([[3, 1]]), np.array([[0.75, 0.25]]), 2, kept=np.array([[2, 1]]))
    >>> ids.tolist(), weights.tolist()
    ([[6, 7, 2, -1]], [[0.75, 0.75, 0.25, 0.25]])
    """
    library = sys.modules[type(ids).__module__.partition(".")[0]]  # NumPy's and torch's functions have the same names
    split = [ids * parts + part for part in range(parts)]
    if kept is not None:
        split = [library.where(kept > part, sub, DROPPED) for part, sub in enumerate(split)]
    shape = ids.shape[0], ids.shape[1] * parts
    return library.stack(split, -1).reshape(shape), library.stack([weights] * parts, -1).reshape(shape)


class Complete(NamedTuple):
    """What :func:`complete` returns: the parts of ``MoELayer(router_weight, SparseExperts(*experts), router, …)``."""

    router_weight: np.ndarray
    experts: ExpertWeights
    router: Any
    bias: np.ndarray | None


def complete(
    router_weight: np.ndarray,
    weights: tuple[np.ndarray, np.ndarray],
    router: Any,
    parts: int,
    *,
    bias: np.ndarray | None = None,
) -> Complete:
    """The complete transformation: a layer of E·P experts and top k·P that computes what the given layer computes.

    ``router_weight`` (E, H), ``weights`` of E experts, and ``router``, a :class:`nmsparse.moe.Router`, are those of a
    layer; the width must divide by ``parts``. Each router row is repeated P times, and ``down`` is multiplied by P
    where the P weights of a family then sum to the weight of the expert: with softmax, and wherever weights are
    renormalised. A plain sigmoid gives every part the whole weight, so there nothing is multiplied.

    Refused, because repeating rows changes the choice: groups ranked by their two best experts (both would be the same
    expert), and a bias on softmax scores (the scores shrink by P, the bias does not). Use :func:`sub_routing` there.
    Equal router rows tie exactly, and a matrix product that rounds them differently can then choose parts of two
    experts that tie with each other; :func:`sub_routing` cannot.

    >>> from nmsparse.moe import Router
    >>> layer = complete(np.ones((4, 3)), (np.ones((4, 8, 3)), np.ones((4, 3, 4))), Router(2, renormalize=True), 2)
    >>> layer.router.top_k, layer.router_weight.shape, layer.experts.down.shape, layer.experts.down.max().item()
    (4, (8, 3), (8, 3, 2), 2.0)
    """
    experts = as_experts(weights)
    if parts < 1 or experts.width % parts:
        raise NMSparseError(f"parts: expected a divisor of the width {experts.width}, got {parts}")
    problem = None
    if router.topk_groups < router.num_groups and router.group_score == "top2":
        problem = "ranks groups by their two best experts"
    elif bias is not None and router.scoring == "softmax":
        problem = "adds a bias to softmax scores"
    if problem:
        raise NMSparseError(
            f"router: expected one whose choice survives repeated rows, got one that {problem}; leave the router as it "
            "is and route by sub_routing"
        )
    width = experts.width // parts
    split = interleave(partition(experts, range(width, experts.width, width)))
    factor = parts if router.scoring == "softmax" or router.renormalize else 1
    return Complete(
        np.repeat(router_weight, parts, axis=0),
        split._replace(down=split.down * split.down.dtype.type(factor)),
        dataclasses.replace(router, top_k=router.top_k * parts),
        None if bias is None else np.repeat(bias, parts),
    )
