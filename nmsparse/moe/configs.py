"""From the router fields of a Hugging Face ``config.json`` to the settings of :class:`~nmsparse.moe.Router`.

What the published implementations do that papers and configs do not say (read in transformers 5.23):

- Mixtral always renormalises and has no flag for it; with one expert per token every weight is 1.
- Qwen2-MoE, Qwen3-MoE and OLMoE do not renormalise unless the config sets ``norm_topk_prob``.
- These four compute the logits in the dtype of the model, and the last three round the weights to it; DeepSeek computes
  the logits in float32. nmsparse does everything in float32.
- DeepSeek-V2: ``transformers`` ignores ``norm_topk_prob``, other implementations obey it. What has no single meaning is
  refused.
- DeepSeek-V2 reads ``n_group`` only with ``topk_method="group_limited_greedy"``. The code shipped with DeepSeek's
  checkpoints spells the other method "gready".
- DeepSeek-V3 scales after it renormalises, and renormalises even a single expert per token (the code shipped with the
  checkpoints does not).
- DeepSeek-V3 masks dropped groups with -inf; the code shipped with the checkpoints masks with 0, which chooses a
  dropped expert where biases make the kept ones negative.
- ``torch.topk(..., sorted=False)`` leaves the order of DeepSeek's experts open; nmsparse sorts by weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import NMSparseError

Settings = dict[str, Any]


def settings_of(config: Mapping[str, Any]) -> Settings:
    """The keyword arguments of :class:`~nmsparse.moe.Router` for a parsed ``config.json``.

    Raises NMSparseError for an unknown model and for fields that are missing or have no single meaning.

    >>> settings_of({"model_type": "mixtral", "num_experts_per_tok": 2})
    {'top_k': 2, 'renormalize': True}
    """
    if not isinstance(config, Mapping):
        raise NMSparseError(
            f"config: expected a mapping such as a parsed config.json, got {type(config).__name__}; "
            "pass config.to_dict() for a transformers config"
        )
    model_type = config.get("model_type")
    if model_type not in MODELS:
        raise NMSparseError(
            f"model_type: expected one of {', '.join(MODELS)}; got {model_type!r}; "
            "for another model write its settings as nmsparse.moe.Router(top_k=...)"
        )
    if config.get("num_experts_per_tok") is None:
        raise NMSparseError(f"num_experts_per_tok: expected in the config of a {model_type} model, but it is missing")
    return {"top_k": config["num_experts_per_tok"], **MODELS[model_type](config)}


def _mixtral(config: Mapping[str, Any]) -> Settings:
    return {"renormalize": True}


def _softmax_with_flag(config: Mapping[str, Any]) -> Settings:
    return {"renormalize": bool(config.get("norm_topk_prob"))}


def _deepseek_v2(config: Mapping[str, Any]) -> Settings:
    _expect(config, "scoring_func", "softmax")
    method = _expect(config, "topk_method", "greedy", "gready", "group_limited_greedy")
    if config.get("norm_topk_prob"):
        raise NMSparseError(
            "norm_topk_prob: expected false in a deepseek_v2 config, got true; transformers ignores it and others obey "
            "it, so choose yourself: nmsparse.moe.Router(top_k=..., renormalize=..., scale=...)"
        )
    groups = _groups(config) if method == "group_limited_greedy" else {}
    return {"scale": _number(config, "routed_scaling_factor", 1.0), **groups}


def _deepseek_v3(config: Mapping[str, Any]) -> Settings:
    _expect(config, "scoring_func", "sigmoid")
    _expect(config, "topk_method", "noaux_tc")
    return {
        "scoring": "sigmoid",
        "renormalize": bool(config.get("norm_topk_prob", True)),
        "group_score": "top2",
        "scale": _number(config, "routed_scaling_factor", 2.5),
        **_groups({"n_group": 8, "topk_group": 4, **config}),
    }


MODELS: dict[str, Callable[[Mapping[str, Any]], Settings]] = {
    "mixtral": _mixtral,
    "qwen2_moe": _softmax_with_flag,
    "qwen3_moe": _softmax_with_flag,
    "olmoe": _softmax_with_flag,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
}


def _expect(config: Mapping[str, Any], name: str, *known: str) -> str:
    """The value of a field, which must be one of ``known``; the first of them if the field is missing."""
    value = config.get(name) or known[0]
    if value not in known:
        raise NMSparseError(
            f"{name}: expected {' or '.join(map(repr, known))} in a {config['model_type']} config, got {value!r}"
        )
    return value


def _number(config: Mapping[str, Any], name: str, default: float) -> float:
    value = config.get(name)
    return default if value is None else value


def _groups(config: Mapping[str, Any]) -> Settings:
    missing = [name for name in ("n_group", "topk_group") if config.get(name) is None]
    if missing:
        raise NMSparseError(f"{' and '.join(missing)}: expected in a {config['model_type']} config that limits groups")
    return {"num_groups": config["n_group"], "topk_groups": config["topk_group"]}
