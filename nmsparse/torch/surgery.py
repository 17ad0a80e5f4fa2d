"""From a dense model to a sparse one and back, in place."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import TypeVar

from torch import nn
from torch.nn.utils import parametrize

from ..errors import NMSparseError
from ..formats import Pattern, parse
from .layout import holds_experts, parameter_, projections, prune_, sparse_weights
from .modules import SparseLinear
from .weight import SparseWeight

__all__ = ["densify_", "sparsify_"]

Model = TypeVar("Model", bound=nn.Module)
Select = str | Callable[[str, nn.Module], bool] | None


def sparsify_(model: Model, pattern: str | Pattern, select: Select = None) -> Model:
    """Prune the experts of ``model`` by magnitude to ``pattern`` and run them sparse from now on; returns ``model``.

    The experts of a ``transformers`` model are its stacked parameters; each becomes a
    :class:`~nmsparse.torch.SparseWeight` under the same name, and the model's ``experts_implementation`` becomes
    ``"nmsparse"``. ``select`` chooses other modules: a regular expression that is searched in their names, or a
    function of name and module. It may choose experts and ``nn.Linear`` layers, which become
    :class:`~nmsparse.torch.SparseLinear`. Calls with different patterns add up. One dense weight is in memory beside
    the model at a time.

    Weights that already are in the pattern, as after :mod:`nmsparse.torch.train`, lose nothing. Raises
    :class:`~nmsparse.errors.NMSparseError` where nothing is chosen.

    >>> sparsify_(nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)), "2:4", select="0")
    Sequential(
      (0): SparseLinear(
        in_features=32, out_features=16, bias=True
        (weight): SparseWeight(float32[16, 32], 2:4)
      )
      (1): ReLU()
      (2): Linear(in_features=16, out_features=4, bias=True)
    )
    """
    pattern = parse(pattern)
    chosen = [(name, module) for name, module in targets(model, select) if not is_sparse(module)]
    if not chosen:
        what = "experts of transformers" if select is None else "dense experts or nn.Linear layers that select chooses"
        raise NMSparseError(f"sparsify_: found no {what} in {type(model).__name__}; pass select=, a regular expression")
    for name, module in chosen:
        if parametrize.is_parametrized(module):
            raise NMSparseError(f"sparsify_: {name} is parametrized; call MaskTraining.finish() first")
        if holds_experts(module):
            for attribute in projections(module):
                prune_(module, attribute, pattern)
        else:
            _replace(model, name, SparseLinear.from_linear(module, pattern))
    _tell_transformers(model)
    return model


def densify_(model: Model) -> Model:
    """Undo :func:`sparsify_`: every sparse weight becomes a dense parameter with zeros; returns ``model``.

    >>> layer = nn.Sequential(nn.Linear(32, 16))
    >>> densify_(sparsify_(layer, "2:4", select="0"))
    Sequential(
      (0): Linear(in_features=32, out_features=16, bias=True)
    )
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseLinear):
            dense = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            dense.weight, dense.bias = nn.Parameter(module.weight.todense().detach()), module.bias
            _replace(model, name, dense)
        elif holds_experts(module):
            for attribute in projections(module):
                if isinstance(getattr(module, attribute), SparseWeight):
                    parameter_(module, attribute)
    _tell_transformers(model)
    return model


def targets(model: nn.Module, select: Select = None) -> list[tuple[str, nn.Module]]:
    """Experts modules and linear layers that ``select`` chooses, with their names; all experts if it is None."""

    def choose(name: str, module: nn.Module) -> bool:
        if select is None:
            return holds_experts(module)
        if not (holds_experts(module) or isinstance(module, nn.Linear)):
            return False
        return bool(re.search(select, name)) if isinstance(select, str) else select(name, module)

    return [(name, module) for name, module in model.named_modules() if choose(name, module)]


def is_sparse(module: nn.Module) -> bool:
    """Whether an experts module has sparse weights already."""
    return holds_experts(module) and sparse_weights(module) is not None


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    if not name:
        raise NMSparseError("a linear layer cannot become another in place; use SparseLinear.from_linear(layer, …)")
    model.set_submodule(name, module)


def _tell_transformers(model: nn.Module) -> None:
    """A model of transformers learns which implementation runs its experts, and what to save."""
    transformers = sys.modules.get("transformers")
    if transformers is not None and isinstance(model, transformers.PreTrainedModel):
        from .hf import mark

        mark(model)
    elif any(holds_experts(module) for module in model.modules()):
        from .hf import fuse_routers_  # and registers the implementation

        for module in model.modules():
            if holds_experts(module):
                module.config._experts_implementation = "nmsparse"
        fuse_routers_(model)
