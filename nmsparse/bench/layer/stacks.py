"""Decoder layers that transformers builds, several of one kind in a row as in a model, dense and sparse."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

from ...errors import require
from ..gpu import Failures, attempt

__all__ = ["CASES", "LAYERS", "Case", "Contender", "Past", "Shape", "build", "contenders", "implementations"]


class Case(NamedTuple):
    """``sequences`` of ``tokens`` new tokens; with ``past``, so many tokens are in the cache, the new ones included."""

    name: str
    sequences: int
    tokens: int
    past: int


CASES = (Case("prefill", 4, 2048, 0), Case("decode 1", 1, 1, 1024), Case("decode 32", 32, 1, 1024))


class Shape(NamedTuple):
    """A configuration of transformers, and of how many layers a stack consists: so many that what one reads has left
    the cache when it runs again, as in a model."""

    name: str
    config: str
    options: dict[str, Any]
    layers: int


LAYERS = (
    Shape(
        "mixtral-8x7b",
        "MixtralConfig",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": None,
        },
        2,
    ),
    Shape(
        "qwen3-30b-a3b",
        "Qwen3MoeConfig",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
        },
        4,
    ),
)


def build(shape: Shape, device: str, dtype: Any) -> Any:
    """A model of one decoder layer with the weights that transformers draws, and its own rotary embedding."""
    torch, transformers = require("torch", "torch"), require("transformers", "torch")
    # No model is called: the vocabulary does not matter.
    config = getattr(transformers, shape.config)(**shape.options, num_hidden_layers=1, vocab_size=64, pad_token_id=None)
    with torch.device(device):
        model = transformers.AutoModel.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


class Past:
    """Keys and values of a fixed number of tokens; each call writes those of the newest, as with a static cache."""

    def __init__(self, config: Any, case: Case, like: Any):
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = case.sequences, config.num_key_value_heads, case.past, width
        self.keys, self.values = like.new_empty(shape).normal_(), like.new_empty(shape).normal_()

    def update(self, keys: Any, values: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        """What the attention of transformers calls with its new keys and values."""
        for held, new in ((self.keys, keys), (self.values, values)):
            held[:, :, -new.shape[2] :] = new
        return self.keys, self.values


class Contender(NamedTuple):
    """Layers that run their experts by ``implementation``; ``reference`` is the plain loop over the same experts."""

    config: Any
    layers: list[Any]
    implementation: str
    reference: Contender | None = None

    def __call__(self, x: Any, rotary: Any, pasts: list[Any]) -> Any:
        """``x`` (sequences, tokens, hidden) through the first ``len(pasts)`` layers."""
        self.config._experts_implementation = self.implementation
        for layer, past in zip(self.layers, pasts, strict=False):
            x = layer(x, position_embeddings=rotary, attention_mask=None, past_key_values=past)
        return x

    @property
    def experts_nbytes(self) -> int:
        """Bytes of the tensors of one layer's experts."""
        return _nbytes(self.layers[0].mlp.experts)


def implementations() -> list[str]:
    """The implementations of dense experts that transformers offers."""
    require("transformers", "torch")
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    registered = sorted(ALL_EXPERTS_FUNCTIONS.valid_keys())
    return ["eager", *(n for n in registered if ALL_EXPERTS_FUNCTIONS[n].__module__.startswith("transformers."))]


def contenders(
    shape: Shape, patterns: tuple[str, ...], device: str, dtype: Any
) -> tuple[Any, dict[str, Contender], dict[str, int], Failures]:
    """A dense model, all contenders, the bytes of their experts' tensors in a layer, and why others are none."""
    model = build(shape, device, dtype)
    layers = _repeated(model.layers[0], shape.layers, model.config)
    eager = Contender(model.config, layers, "eager")
    made = {name: Contender(model.config, layers, name, eager) for name in implementations()}
    held, failed = {"dense": eager.experts_nbytes}, {}

    def ours(pattern: str) -> None:
        from ...torch import compact_, densify_, sparsify_

        sparse = sparsify_(copy.deepcopy(model), pattern)
        masked = densify_(copy.deepcopy(sparse))
        reference = Contender(masked.config, [masked.layers[0]], "eager")
        own = _repeated(sparse.layers[0], shape.layers, sparse.config)
        for layer in own:
            compact_(layer)
        made[pattern] = Contender(sparse.config, own, "nmsparse", reference)
        held[pattern] = made[pattern].experts_nbytes

    for pattern in patterns:
        attempt(failed, pattern, lambda pattern=pattern: ours(pattern))
    return model, made, held, failed


def _repeated(layer: Any, number: int, config: Any) -> list[Any]:
    """``layer`` and copies of it that share the configuration."""
    return [layer, *(copy.deepcopy(layer, {id(config): config}) for _ in range(number - 1))]


def _nbytes(module: Any) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
