"""Sparse models in and out of directories, through the quantizer hooks of ``transformers``.

``config.json`` names every sparse weight with its pattern. The hook replaces the experts while the model still is on
the meta device, so that loading makes the sparse buffers and never the dense weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...errors import NMSparseError
from ...formats import parse
from ...io.checkpoint import INDEX
from ..layout import alternate, holds_experts, projections, put_, shape_of
from ..modules import SparseLinear
from ..weight import SparseWeight
from .routers import fuse_routers_

__all__ = ["NMSparseConfig", "NMSparseQuantizer", "from_pretrained", "mark"]

METHOD = "nmsparse"


@register_quantization_config(METHOD)
class NMSparseConfig(QuantizationConfigMixin):
    """What ``config.json`` says under ``quantization_config``.

    ``weights`` maps the name of each sparse weight in the model to its pattern. None stands for all experts in
    ``pattern``, and is what a directory of ``nmsparse convert`` means; there the biases of gate and up are in halves
    (``halves=True``), as the rows are.
    """

    def __init__(
        self,
        weights: Mapping[str, str] | None = None,
        pattern: str | None = None,
        halves: bool = False,
        quant_method: str = METHOD,
    ):
        self.quant_method = quant_method
        self.weights = None if weights is None else dict(weights)
        self.pattern, self.halves = pattern, halves


@register_quantizer(METHOD)
class NMSparseQuantizer(HfQuantizer):
    """Makes the sparse modules before the weights are loaded."""

    def __init__(self, quantization_config: NMSparseConfig, **options: Any):
        super().__init__(quantization_config, **options)
        if not self.pre_quantized:
            raise NMSparseError(
                "from_pretrained prunes nothing: load the dense model and call nmsparse.torch.sparsify_(model, pattern)"
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **options: Any) -> PreTrainedModel:
        for name, pattern in self._weights(model).items():
            owner, _, attribute = name.rpartition(".")
            module = model.get_submodule(owner)
            dtype = getattr(module, attribute).dtype
            if holds_experts(module):
                shape = shape_of(module, attribute)
                weight = SparseWeight(pattern, shape, dtype=dtype, device="meta")
                put_(module, attribute, weight)
            elif isinstance(module, nn.Linear):
                weight = SparseWeight(pattern, module.weight.shape, dtype=dtype, device="meta")
                model.set_submodule(owner, SparseLinear(weight, module.bias))
            else:
                raise NMSparseError(f"{name}: expected a weight of experts or of a linear layer, got {type(module)}")
        self.dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **options: Any) -> PreTrainedModel:
        if self.quantization_config.halves:
            with torch.no_grad():
                for module in model.modules():
                    if holds_experts(module) and module.has_bias and not module.is_concatenated:
                        bias = module.gate_up_proj_bias
                        bias.copy_(alternate(bias.clone()))
        for name, parameter in model.named_parameters():  # transformers 5.17 leaves some in the dtype of the file
            parameter.data = parameter.data.to(self.dtypes.get(name, parameter.dtype))
        # Nothing is quantised: the model may be cast, moved and trained.
        model.is_quantized = False
        mark(model)
        return model

    def _weights(self, model: PreTrainedModel) -> dict[str, str]:
        config = self.quantization_config
        if config.weights is not None:
            return config.weights
        parse(config.pattern)
        return {
            f"{name}.{attribute}": config.pattern
            for name, module in model.named_modules()
            if holds_experts(module)
            for attribute in projections(module)
        }

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def mark(model: PreTrainedModel) -> None:
    """Make ``model`` run its sparse experts, and ``save_pretrained`` write down which weights are sparse."""
    weights = {name: module.pattern for name, module in model.named_modules() if isinstance(module, SparseWeight)}
    model.set_experts_implementation(METHOD if weights else None)  # None: the default of transformers
    fuse_routers_(model)
    if weights:
        model.config.quantization_config = NMSparseConfig(weights)
        model.hf_quantizer = NMSparseQuantizer(model.config.quantization_config, pre_quantized=True)
    elif hasattr(model, "hf_quantizer"):
        del model.hf_quantizer, model.config.quantization_config


def from_pretrained(path: str | PathLike[str], auto_class: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """The model of a directory that ``nmsparse convert`` or :func:`nmsparse.io.convert` wrote, its experts sparse.

    ``auto_class`` is any class of ``transformers`` with ``from_pretrained``, which gets ``options`` (``dtype``,
    ``device_map``, …). No dense experts are ever made. Directories that ``model.save_pretrained`` wrote need no
    function of ours: once this module is imported, ``AutoModel…from_pretrained`` reads them. Raises
    :class:`~nmsparse.errors.NMSparseError` for any other directory.
    """
    config = options.pop("config", None) or AutoConfig.from_pretrained(path)
    summary = getattr(config, METHOD, None)
    if getattr(config, "quantization_config", None) is None:
        if not isinstance(summary, dict) or summary.get("experts_only"):
            what = "holds experts only" if summary else "was not written by nmsparse convert"
            raise NMSparseError(f"{path} {what}; convert the whole model with: nmsparse convert IN OUT --pattern …")
        config.quantization_config = NMSparseConfig(pattern=summary["pattern"], halves=True).to_dict()
        config.transformers_weights = INDEX
    model = auto_class.from_pretrained(path, config=config, **options)
    # They described the directory, not the model.
    for name in (METHOD, "transformers_weights"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    return model
