"""nmsparse: structured sparsity that pays for Mixture-of-Experts models.

>>> import numpy as np, nmsparse
>>> w = np.random.default_rng(0).standard_normal((256, 512), np.float32)
>>> A = nmsparse.array(w, "samoyeds:1:2:128")
>>> A
SamoyedsArray(float32[256, 512], samoyeds:1:2:128, nnz=32768, device='cpu')
>>> x = np.ones((4, 512), np.float32)
>>> np.allclose(x @ A.T, x @ A.todense().T, atol=1e-4)
True
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import formats, prune, reference
from .errors import NMSparseError, UnsupportedDeviceError
from .formats import NMArray, RaggedTokens, SamoyedsArray, VNMArray, random, stack
from .ops import array, grouped_matmul, matmul

if TYPE_CHECKING:
    from . import moe
    from .io import load, save
    from .moe import MoELayer, SparseExperts, route

__version__ = "0.1.0"

__all__ = [
    "MoELayer",
    "NMArray",
    "NMSparseError",
    "RaggedTokens",
    "SamoyedsArray",
    "SparseExperts",
    "UnsupportedDeviceError",
    "VNMArray",
    "array",
    "formats",
    "grouped_matmul",
    "load",
    "matmul",
    "moe",
    "prune",
    "random",
    "reference",
    "route",
    "save",
    "stack",
]

# Loaded when first asked for, so that a program that only multiplies starts faster.
_LATER = {"load": "io", "save": "io", "moe": "moe", "MoELayer": "moe", "SparseExperts": "moe", "route": "moe"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'nmsparse' has no attribute {name!r}")
    module = import_module(f".{_LATER[name]}", __name__)
    return module if name == _LATER[name] else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
