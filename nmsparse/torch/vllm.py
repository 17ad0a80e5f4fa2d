"""A plugin for vLLM: the experts of a model pruned when they are loaded, and run by :func:`nmsparse.torch.experts`.

A sketch. It was written against vLLM's sources of 2026 (``FusedMoEMethodBase.apply(layer, x, topk_weights, topk_ids,
…)``) and is tested with stand-ins for vLLM's classes only: **it was never run with vLLM**. vLLM's loader fills dense
experts first, so the memory at start is the dense model's; weights that already are in the pattern lose nothing.

vLLM finds :func:`register` through the entry point group ``vllm.general_plugins``; then, in ``config.json``::

    "quantization_config": {"quant_method": "nmsparse", "pattern": "2:4"}
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NMSparseError
from ..formats import parse
from . import functional
from .gradients import ACTIVATIONS
from .weight import SparseWeight

__all__ = ["register"]

METHOD = "nmsparse"


def register() -> None:
    """Make ``quantization="nmsparse"`` known to vLLM; a second call does nothing."""
    layers = "vllm.model_executor.layers"
    quantization = import_module(f"{layers}.quantization")
    if METHOD in quantization.QUANTIZATION_METHODS:
        return
    base, linear = import_module(f"{layers}.quantization.base_config"), import_module(f"{layers}.linear")
    routed = import_module(f"{layers}.fused_moe.routed_experts")
    dense = import_module(f"{layers}.fused_moe.unquantized_fused_moe_method")

    class NMSparseExpertsMethod(dense.UnquantizedFusedMoEMethod):
        """Dense weights until they are loaded, sparse ones afterwards."""

        pattern: str

        def process_weights_after_loading(self, layer: nn.Module) -> None:
            for name in ("w13", "w2"):
                weight = getattr(layer, f"{name}_weight")
                delattr(layer, f"{name}_weight")
                sparse = SparseWeight.from_dense(weight.data, self.pattern).requires_grad_(False)
                layer.add_module(f"{name}_sparse", sparse)

        @property
        def is_monolithic(self) -> bool:
            return False

        def apply(self, layer: nn.Module, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *shared: Any) -> Tensor:
            activation = str(getattr(layer.activation, "value", layer.activation))
            if activation not in ACTIVATIONS:
                raise NMSparseError(f"activation: expected one of {', '.join(ACTIVATIONS)}; got {activation!r}")
            return functional.experts(x, topk_ids, topk_weights, layer.w13_sparse, layer.w2_sparse, activation)

    @quantization.register_quantization_config(METHOD)
    class NMSparseQuantization(base.QuantizationConfig):
        """``{"quant_method": "nmsparse", "pattern": …}``"""

        def __init__(self, pattern: str):
            super().__init__()
            self.pattern = str(parse(pattern))

        def get_name(self) -> str:
            return METHOD

        def get_supported_act_dtypes(self) -> list[torch.dtype]:
            return [torch.float16, torch.bfloat16]

        @classmethod
        def get_min_capability(cls) -> int:
            return 80

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> NMSparseQuantization:
            return cls(cls.get_from_keys(config, ["pattern"]))

        def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
            if isinstance(layer, linear.LinearBase):
                return linear.UnquantizedLinearMethod()
            if not isinstance(layer, routed.RoutedExperts):
                return None
            if layer.moe_config.has_bias or layer.moe_config.moe_parallel_config.use_ep:
                raise NMSparseError(f"{prefix}: experts with biases or expert parallelism are not supported")
            method = NMSparseExpertsMethod(layer.moe_config)
            method.pattern = self.pattern
            return method
