"""A Mixtral language model in NumPy: the part of the demo that is not structured sparsity.

Weights come from a checkpoint in the published Mixtral layout; all arithmetic is float32. Whole windows only: no
key-value cache, no sampling. The MoE layer is the library's: its experts may be dense or sparse.
Jiang et al., "Mixtral of Experts", arXiv:2401.04088.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np

from ..errors import NMSparseError
from ..formats import SparseArray
from ..moe import MoELayer, Router, SparseExperts

Weights = np.ndarray | SparseArray
Routing = list[tuple[np.ndarray, np.ndarray]]  # of each layer: the experts (tokens, k) and their weights (tokens, k)

# Queries scored at once. A block never looks at the keys behind it, which spares 3/8 of the work of a 512-byte window.
_QUERY_BLOCK = 128
FUSED = ("gate_up_proj", "down_proj")  # the matrices of an expert in a checkpoint of ours


@dataclass(frozen=True)
class Config:
    """The numbers of a Mixtral ``config.json`` that shape the forward pass.

    >>> Config.from_dict(dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    ...                       rms_norm_eps=1e-5, num_local_experts=4, rope_theta=1e4)).head_dim
    4
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    rms_norm_eps: float
    rope_theta: float
    sliding_window: int | None
    tied_head: bool

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Config:
        """Read a parsed ``config.json``, of transformers 5 (``rope_parameters``) or before (``rope_theta``).

        Raises NMSparseError for a missing field and for what this forward does not compute.
        """
        kind, activation = config.get("model_type", "mixtral"), config.get("hidden_act", "silu")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        rope_type = rope.get("rope_type") or rope.get("type") or "default"
        for name, got, expected in (
            ("model_type", kind, "mixtral"),
            ("hidden_act", activation, "silu"),
            ("rope_type", rope_type, "default"),
            ("vocab_size", config.get("vocab_size", 256), 256),
        ):
            if got != expected:
                raise NMSparseError(f"the demo runs models with {name} {expected!r}, this config.json says {got!r}")
        try:
            heads = config["num_attention_heads"]
            return cls(
                layers=config["num_hidden_layers"],
                heads=heads,
                kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or config["hidden_size"] // heads,
                experts=config["num_local_experts"],
                rms_norm_eps=config["rms_norm_eps"],
                rope_theta=float(rope["rope_theta"] if "rope_theta" in rope else config["rope_theta"]),
                sliding_window=config.get("sliding_window"),
                tied_head=config.get("tie_word_embeddings", False),
            )
        except KeyError as missing:
            raise NMSparseError(f"config.json has no {missing}: expected the config of a Mixtral checkpoint") from None


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Scale each row of ``x`` (..., H) to root mean square 1, then by ``weight`` (H,). Zhang and Sennrich, 2019.

    >>> rms_norm(np.array([[3.0, 4.0]]), np.array([5.0, 5.0]), 0.0).round(3)
    array([[4.243, 5.657]])
    """
    mean_square = np.einsum("...h,...h->...", x, x) / x.shape[-1]
    return x * (1 / np.sqrt(mean_square + eps))[..., None] * weight


def rotary_angles(length: int, head_dim: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines (length, head_dim / 2), float32, of the rotary embedding. Su et al., RoFormer, 2021.

    >>> cos, sin = rotary_angles(3, 2, 10000.0)
    >>> bool(np.allclose(sin[:, 0], np.sin([0.0, 1.0, 2.0])))
    True
    """
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    angles = np.arange(length)[:, None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Turn the pairs (i, i + D/2) of ``x`` (..., T, D) by the angle of their position (rows of ``cos`` and ``sin``).

    >>> rotate(np.array([[1.0, 0.0]]), np.array([[0.0]]), np.array([[1.0]]))  # a quarter turn
    array([[0., 1.]])
    """
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def causal_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """softmax(q kᵀ / √D) v, each position seeing itself and those before: (..., T, D) for ``q``, ``k`` and ``v``.

    Leading axes broadcast. Computed in blocks of queries, so that the scores of a whole window are never held at once.

    >>> k = v = np.arange(4.0)[:, None]
    >>> causal_attention(np.zeros((4, 1)), k, v)[:, 0]  # equal scores: the mean of what came so far
    array([0. , 0.5, 1. , 1.5])
    """
    length = q.shape[-2]
    out = np.empty(q.shape[:-1] + v.shape[-1:], dtype=q.dtype)
    q = q * q.dtype.type(q.shape[-1] ** -0.5)
    for start in range(0, length, _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, length)
        scores = q[..., start:stop, :] @ k[..., :stop, :].swapaxes(-1, -2)
        scores[..., start:] += np.triu(np.full((stop - start, stop - start), -np.inf, dtype=q.dtype), k=1)
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        total = scores.sum(axis=-1, keepdims=True)
        out[..., start:stop, :] = scores @ v[..., :stop, :] / total
    return out


@dataclass
class Block:
    """One decoder layer: attention weights in float32, and the MoE layer of the library."""

    attention_norm: np.ndarray
    qkv: np.ndarray  # the query, key and value projections, stacked: one matrix product instead of three
    out: np.ndarray
    moe_norm: np.ndarray
    moe: MoELayer


class Mixtral:
    """A Mixtral checkpoint, ready to run: ``model(tokens)`` maps bytes (B, T) to next-byte logits (B, T, vocabulary).

    ``seconds_in_experts`` is the time that the last call spent in the experts (not in the router), ``routing`` what its
    routers chose.
    """

    def __init__(self, config: Config, embedding: np.ndarray, blocks: list[Block], norm: np.ndarray, head: np.ndarray):
        self.config, self.embedding, self.blocks, self.norm, self.head = config, embedding, blocks, norm, head
        self.seconds_in_experts, self.routing = 0.0, Routing()

    def with_experts(self, convert: Callable[[Weights], Weights]) -> Mixtral:
        """The same model with ``convert`` applied to the stacked experts, (E, 2I, H) and (E, H, I), of every layer."""

        def converted(moe: MoELayer) -> MoELayer:
            experts = SparseExperts(convert(moe.experts.gate_up), convert(moe.experts.down))
            return MoELayer(moe.router_weight, experts, moe.router)

        blocks = [replace(block, moe=converted(block.moe)) for block in self.blocks]
        return Mixtral(self.config, self.embedding, blocks, self.norm, self.head)

    @property
    def experts(self) -> list[SparseExperts]:
        """The experts of every layer."""
        return [block.moe.experts for block in self.blocks]

    def describe(self) -> str:
        """One line: layers, experts, sizes, dtype."""
        experts, top_k = self.experts[0], self.blocks[0].moe.router.top_k
        return (
            f"Mixtral: {len(self.blocks)} layers of {experts.num_experts} experts, {top_k} per token, hidden size "
            f"{experts.hidden_size}, expert width {experts.intermediate_size}, {experts.dtype}"
        )

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        c = self.config
        if c.sliding_window is not None and tokens.shape[1] > c.sliding_window:
            raise NMSparseError(f"expected windows of at most {c.sliding_window} bytes (the model's sliding window)")
        self.seconds_in_experts, self.routing = 0.0, Routing()
        x = self.embedding[tokens]
        for block in self.blocks:
            x += self.attention(block, x)
            x += self._experts(block, self.experts_input(block, x))
        return rms_norm(x, self.norm, c.rms_norm_eps) @ self.head.T

    def attention(self, block: Block, x: np.ndarray) -> np.ndarray:
        """What the attention of a block adds to the residual stream ``x`` (B, T, H)."""
        c, (batch, length, _) = self.config, x.shape
        angles = rotary_angles(length, c.head_dim, c.rope_theta)
        x = rms_norm(x, block.attention_norm, c.rms_norm_eps)
        q, k, v = np.split(x @ block.qkv.T, np.cumsum([c.heads, c.kv_heads]) * c.head_dim, axis=-1)
        # Grouped queries: (B, key-value head, queries that share it, T, D); keys and values broadcast over the queries.
        q = q.reshape(batch, length, c.kv_heads, -1, c.head_dim).transpose(0, 2, 3, 1, 4)
        k, v = (t.reshape(batch, length, c.kv_heads, 1, c.head_dim).transpose(0, 2, 3, 1, 4) for t in (k, v))
        mixed = causal_attention(rotate(q, *angles), rotate(k, *angles), v)
        return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1) @ block.out.T

    def experts_input(self, block: Block, x: np.ndarray) -> np.ndarray:
        """What router and experts of a block read where the residual stream, attention included, is ``x`` (B, T, H)."""
        return rms_norm(x, block.moe_norm, self.config.rms_norm_eps)

    def _experts(self, block: Block, x: np.ndarray) -> np.ndarray:
        rows = x.reshape(-1, x.shape[-1])
        self.routing.append(block.moe.route(rows))
        start = perf_counter()
        mixed = block.moe.experts(rows, *self.routing[-1])
        self.seconds_in_experts += perf_counter() - start
        return mixed.reshape(x.shape)


def load(config: Mapping[str, Any], tensor: Callable[[str], Weights]) -> Mixtral:
    """Build the model from a parsed ``config.json`` and a function that returns a tensor of the checkpoint by its name.

    Experts keep the dtype of the checkpoint; everything else becomes float32. Where ``tensor`` raises KeyError for a
    name that it does not know, this raises NMSparseError.
    """
    try:
        return _load(config, tensor)
    except KeyError as error:
        raise NMSparseError(f"expected a checkpoint in the Mixtral layout: {error.args[0]}") from None


def _load(config: Mapping[str, Any], tensor: Callable[[str], Weights]) -> Mixtral:
    c = Config.from_dict(config)

    def float32(name: str) -> np.ndarray:
        return tensor(name).astype(np.float32)

    blocks = []
    for layer in range(c.layers):
        prefix = f"model.layers.{layer}"
        attention, moe = f"{prefix}.self_attn", f"{prefix}.block_sparse_moe"
        experts = _load_experts(f"{moe}.experts", c.experts, tensor)
        blocks.append(
            Block(
                attention_norm=float32(f"{prefix}.input_layernorm.weight"),
                qkv=np.concatenate([float32(f"{attention}.{p}_proj.weight") for p in "qkv"]),
                out=float32(f"{attention}.o_proj.weight"),
                moe_norm=float32(f"{prefix}.post_attention_layernorm.weight"),
                moe=MoELayer(
                    float32(f"{moe}.gate.weight"),
                    experts,
                    Router.from_config(config),
                ),
            )
        )
    embedding = float32("model.embed_tokens.weight")
    head = embedding if c.tied_head else float32("lm_head.weight")
    return Mixtral(c, embedding, blocks, float32("model.norm.weight"), head)


def _load_experts(prefix: str, count: int, tensor: Callable[[str], Weights]) -> SparseExperts:
    """The experts of one layer: as published, or as ``nmsparse convert`` and ``nmsparse prune`` write them."""

    def held(name: str) -> bool:
        try:
            tensor(name)
        except KeyError:
            return False
        return True

    if held(f"{prefix}.down_proj"):
        return SparseExperts(tensor(f"{prefix}.gate_up_proj"), tensor(f"{prefix}.down_proj"))
    if held(f"{prefix}.0.down_proj"):  # a pattern for each expert
        return SparseExperts(*([tensor(f"{prefix}.{e}.{name}") for e in range(count)] for name in FUSED))
    gate, down, up = (np.stack([tensor(f"{prefix}.{e}.{w}.weight") for e in range(count)]) for w in ("w1", "w2", "w3"))
    return SparseExperts(np.concatenate([gate, up], axis=1), down)


def bits_per_byte(logits: np.ndarray, tokens: np.ndarray) -> float:
    """Mean cross entropy, in bits, of ``tokens`` (B, T) under ``logits`` (B, T, vocabulary), first byte not scored.

    >>> bits_per_byte(np.zeros((1, 3, 256)), np.array([[7, 8, 9]]))
    8.0
    """
    logits, following = logits[:, :-1], tokens[:, 1:, None]
    peak = logits.max(axis=-1, keepdims=True)
    log_sum = np.log(np.exp(logits - peak).sum(axis=-1, keepdims=True)) + peak
    nats = log_sum - np.take_along_axis(logits, following, axis=-1)
    return float(nats.mean(dtype=np.float64) / np.log(2))
