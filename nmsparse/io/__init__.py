"""Files: sparse arrays in safetensors, checkpoints read lazily, and Mixture-of-Experts checkpoints converted to N:M.

Needs the ``safetensors`` package (``pip install 'nmsparse[hf]'``). Nothing is ever pickled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .checkpoint import ArrayInfo, Checkpoint, load
from .saving import save

if TYPE_CHECKING:
    from .conversion import Conversion, LayerReport, convert

__all__ = ["ArrayInfo", "Checkpoint", "Conversion", "LayerReport", "convert", "load", "save"]


def __getattr__(name: str) -> Any:
    """Conversion is imported when it is used: ``import nmsparse`` has to stay fast."""
    if name in ("Conversion", "LayerReport", "convert"):
        from . import conversion

        return getattr(conversion, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
