"""Routers of ``transformers`` as two kernels: the logits by the model's own product, all else by ``nmsparse::route``.

A router of ``transformers`` 5 returns ``(logits, weights, ids)`` and spends half a dozen small kernels on it. The
classes below do what a :class:`nmsparse.moe.Router` does; beside sparse experts their forward is replaced, on the
instance, by one that fits a GPU where no gradient is wanted and that calls the original elsewhere. Class, parameters,
hooks and logits stay what they are. Weights stay float32, which some models would round, and ids become int32.

Only what :func:`router_of` knows is touched: any other router runs as before. As with the hooks of accelerate, a
shallow copy of such a module, as ``nn.DataParallel`` makes them, runs with the parameters of the original.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import MethodType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...cuda.config_route import RouteConfig
from ...errors import NMSparseError
from ...moe import Router
from .. import functional, routing
from ..routing import Settings
from ..surgery import is_sparse

__all__ = ["fuse_routers_", "router_of"]


class _Family(NamedTuple):
    """How routers of some classes make their logits, which settings they have, and whether a bias corrects scores."""

    logits: Callable[[nn.Module, Tensor], Tensor]
    settings: Callable[[nn.Module], Settings]
    corrected: bool = False


# --- logits: to the bit what the original computes -------------------------------------------------------------------


def _linear(module: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, module.weight)


def _linear_with_bias(module: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, module.weight, module.bias)


def _linear_in_float32(module: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x.float(), module.weight.float())


# --- settings --------------------------------------------------------------------------------------------------------


def _softmax(module: nn.Module) -> Settings:
    return module.top_k, "softmax", False, 1, 1, "max", 1.0


def _renormalized(module: nn.Module) -> Settings:
    """Also of the softmax over the chosen logits alone: the sum over all experts cancels."""
    return module.top_k, "softmax", True, 1, 1, "max", 1.0


def _softmax_with_flag(module: nn.Module) -> Settings:
    return module.top_k, "softmax", bool(module.norm_topk_prob), 1, 1, "max", 1.0


def _deepseek_v2(module: nn.Module) -> Settings:
    if module.topk_method not in ("greedy", "group_limited_greedy"):
        raise NMSparseError(f"topk_method: expected greedy or group_limited_greedy, got {module.topk_method!r}")
    groups = (1, 1) if module.topk_method == "greedy" else (module.num_group, module.topk_group)
    return module.top_k, "softmax", False, *groups, "max", module.routed_scaling_factor


def _deepseek_v3(module: nn.Module) -> Settings:
    groups, scale = (module.num_group, module.topk_group), module.routed_scaling_factor
    return module.top_k, "sigmoid", bool(module.norm_topk_prob), *groups, "top2", scale


# --- which classes they are of (read in transformers 5.23) -----------------------------------------------------------

_NAMES = {
    _Family(_linear, _renormalized): (
        "MixtralTopKRouter MiniMaxTopKRouter Qwen3_5MoeTopKRouter Qwen3OmniMoeTextTopKRouter "
        "Qwen3VLMoeTextTopKRouter AriaTextTopKRouter"
    ),
    _Family(_linear, _softmax_with_flag): (
        "Qwen2MoeTopKRouter Qwen3MoeTopKRouter Qwen3NextTopKRouter Qwen3OmniMoeThinkerTextTopKRouter "
        "Qwen3OmniMoeTalkerTextTopKRouter Qwen4ExpTextTopKRouter OlmoeTopKRouter FlexOlmoTopKRouter MellumTopKRouter"
    ),
    _Family(_linear, _softmax): "JambaTopKRouter",
    _Family(_linear_with_bias, _renormalized): "GptOssTopKRouter",
    _Family(_linear_in_float32, _deepseek_v2): (
        "DeepseekV2TopkRouter DeepseekOcr2TextTopkRouter UnlimitedOcrTextTopkRouter"
    ),
    _Family(_linear_in_float32, _deepseek_v3, corrected=True): (
        "DeepseekV3TopkRouter DeepseekV32TopkRouter Glm4MoeTopkRouter Glm4MoeLiteTopkRouter Glm4vMoeTextTopkRouter "
        "Glm5NextTextTopkRouter GlmMoeDsaTopkRouter Dots1TopkRouter Dots3NoteTextTopkRouter ExaoneMoeTopkRouter "
        "HYV4TopkRouter KimiLinearTopkRouter MiMoV2FlashTopkRouter NemotronHTopkRouter SolarOpenTopkRouter "
        "BailingHybridTopkRouter AXK1TopkRouter"
    ),
}
FAMILIES = {name: family for family, names in _NAMES.items() for name in names.split()}


def _family_of(module: nn.Module) -> _Family | None:
    kind = type(module)
    return FAMILIES.get(kind.__name__) if kind.__module__.startswith("transformers.models.") else None


def router_of(module: nn.Module) -> Router | None:
    """The settings of a router of ``transformers``; None for other modules and for what the GPU's kernel cannot do.

    >>> from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralTopKRouter
    >>> router_of(MixtralTopKRouter(MixtralConfig()))
    Router(top_k=2, scoring='softmax', renormalize=True, num_groups=1, topk_groups=1, group_score='max', scale=1.0)
    """
    family = _family_of(module)
    if family is None:
        return None
    try:
        router, experts = Router(*family.settings(module)), len(module.weight)
        router.check(experts)
    except (AttributeError, NMSparseError):  # another version of transformers, settings that fit no kernel
        return None
    return None if RouteConfig(experts, **dataclasses.asdict(router)).problems() else router


# --- the replacement -------------------------------------------------------------------------------------------------


def routed(module: nn.Module, family: _Family, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, weights float32 and ids int32 of a router: what its own forward returns, by ``nmsparse::route``."""
    logits = family.logits(module, hidden_states.reshape(-1, hidden_states.shape[-1]))
    bias = module.e_score_correction_bias.float() if family.corrected else None
    route = routing.route if functional._direct(logits, bias) else routing.route_op
    return logits, *route(logits, bias, *family.settings(module))


def fits(module: nn.Module, hidden_states: Tensor) -> bool:
    """Whether a call is one for the replacement."""
    return hidden_states.is_cuda and not wants_gradient(module, hidden_states)


def wants_gradient(module: nn.Module, hidden_states: Tensor) -> bool:
    """Whether somebody may ask for the gradient of a call."""
    if not torch.is_grad_enabled():
        return False
    return hidden_states.requires_grad or any(parameter.requires_grad for parameter in module.parameters())


def routed_forward(module: nn.Module, family: _Family, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What stands where the forward of ``module`` stood."""
    if fits(module, hidden_states):
        return routed(module, family, hidden_states)
    return type(module).forward(module, hidden_states)


def fuse_routers_(model: nn.Module) -> None:
    """Give the routers beside sparse experts their replacement, and take it from all others; again is no harm."""
    for block in model.modules():
        sparse = any(map(is_sparse, block.children()))
        for module in block.children():
            if _family_of(module) is not None:
                (_put if sparse and router_of(module) is not None else _take)(module)


def _put(module: nn.Module) -> None:
    name, own = _place(module), MethodType(type(module).forward, module)
    if vars(module).get(name, own) == own:  # else somebody replaced it before
        setattr(module, name, functools.partial(routed_forward, module, _family_of(module)))


def _take(module: nn.Module) -> None:
    name = _place(module)
    if getattr(vars(module).get(name), "func", None) is routed_forward:
        delattr(module, name)
        if name != "forward":
            setattr(module, name, MethodType(type(module).forward, module))


def _place(module: nn.Module) -> str:
    """The attribute that runs a router; accelerate's hooks move what they wrap to another."""
    return "_old_forward" if "_old_forward" in vars(module) else "forward"
