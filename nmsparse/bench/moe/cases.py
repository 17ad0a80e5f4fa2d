"""What is measured: published layers, numbers of tokens, routings; and the floor under each time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

__all__ = ["MODELS", "ROUTINGS", "TOKENS", "Case", "Model", "cases_of", "route", "take_turns"]

ZIPF = 0.75  # skewed: expert number r by popularity is drawn in proportion to r ** -ZIPF


class Model(NamedTuple):
    """One MoE layer: E experts of ``down (hidden, intermediate)`` and a ``gate_up`` of twice that, k a token."""

    name: str
    experts: int
    intermediate: int
    hidden: int
    top_k: int

    @property
    def parameters(self) -> int:
        """Weights of all experts."""
        return 3 * self.experts * self.intermediate * self.hidden


MODELS = {
    model.name: model
    for model in (
        Model("mixtral-8x7b", 8, 14336, 4096, 2),
        Model("qwen1.5-moe", 60, 1408, 2048, 4),
        Model("deepseek-v2-lite", 64, 1408, 2048, 6),
        Model("olmoe", 64, 1024, 2048, 8),
        Model("qwen3-30b-a3b", 128, 768, 2048, 8),
    )
}
TOKENS = (1, 8, 64, 512, 4096, 16384)
ROUTINGS = ("uniform", "skewed")


class Case(NamedTuple):
    """``tokens`` tokens through one layer, routed in one of the ways of ROUTINGS."""

    model: Model
    tokens: int
    routing: str

    @property
    def pairs(self) -> int:
        """Tokens times experts of a token."""
        return self.tokens * self.model.top_k

    @property
    def operations(self) -> int:
        """FLOP of all products, with the skipped zeros."""
        return 6 * self.pairs * self.model.intermediate * self.model.hidden

    @property
    def calls(self) -> int:
        """Calls of a CUDA graph: few tokens need many, so that the weights a call reads have left the cache and the
        start of a graph does not count."""
        return next((calls for tokens, calls in ((8, 16), (64, 8), (1024, 2)) if self.tokens <= tokens), 1)


def cases_of(model: Model, tokens: tuple[int, ...] = TOKENS, routings: tuple[str, ...] = ROUTINGS) -> Iterator[Case]:
    """The cases of one model."""
    yield from (Case(model, count, routing) for count in tokens for routing in routings)


def route(case: Case, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """``ids`` int32 and ``weights`` float32, (T, k): k experts drawn without replacement, weights that sum to 1.

    "uniform": all experts are alike. "skewed": popularity falls as a power law (ZIPF) over the experts, in an order
    that the seed shuffles; the busiest of 64 experts gets about six times the mean.

    >>> ids, weights = route(Case(MODELS["olmoe"], 4096, "skewed"))
    >>> ids.shape, weights.dtype.name, round(float(np.bincount(ids.ravel()).max()) / (4096 * 8 / 64), 1)
    ((4096, 8), 'float32', 5.6)
    """
    rng = np.random.default_rng([seed, case.model.experts, case.tokens])
    popularity = -ZIPF * np.log1p(rng.permutation(case.model.experts)) if case.routing == "skewed" else 0
    # Gumbel noise on logarithms of popularities: the k largest are k draws without replacement.
    logits = popularity + rng.gumbel(size=(case.tokens, case.model.experts))
    ids = np.argsort(-logits, axis=1)[:, : case.model.top_k]
    chosen = np.exp(np.take_along_axis(logits, ids, axis=1))
    return ids.astype(np.int32), (chosen / chosen.sum(axis=1, keepdims=True)).astype(np.float32)


def take_turns(ids: np.ndarray, num_experts: int, calls: int, seed: int = 0) -> list[np.ndarray]:
    """The same routing for each of ``calls`` calls, with the experts renamed so that each call reads those whose turn
    is longest ago.

    A model has other weights in each layer, so a layer finds none of its own in the cache. One layer that is timed by
    itself would, with few tokens: what one token needs of a small model fits the L2. With A experts active, call c
    takes numbers cA to cA + A - 1, modulo E. What an expert gets does not change, only which one it is.

    >>> [ids.tolist() for ids in take_turns(np.array([[3, 1]]), 6, 4)]
    [[[1, 0]], [[3, 2]], [[5, 4]], [[1, 0]]]
    """
    rng = np.random.default_rng(seed)
    active = np.unique(ids)
    number = np.zeros(num_experts, np.int32)
    number[rng.permutation(active)] = np.arange(len(active))
    return [((number[ids] + c * len(active)) % num_experts).astype(np.int32) for c in range(calls)]
