"""The bridge to torch: ops with gradients, modules, mask training, and the experts of Hugging Face models.

``import nmsparse`` never imports this; importing this imports torch and registers the ops ``torch.ops.nmsparse.*``.
``transformers`` is imported when something of :mod:`nmsparse.torch.hf` is first asked for.
"""

from __future__ import annotations

from typing import Any

from ..errors import require

require("torch", "torch")

from . import routing, train  # noqa: E402, F401
from .arrays import forget  # noqa: E402
from .buffers import as_array, as_tensor  # noqa: E402
from .compact import compact_  # noqa: E402
from .functional import experts, grouped_linear, linear  # noqa: E402
from .modules import SparseExperts, SparseLinear  # noqa: E402
from .surgery import densify_, sparsify_  # noqa: E402
from .weight import SparseWeight  # noqa: E402

__all__ = [
    "SparseExperts",
    "SparseLinear",
    "SparseWeight",
    "as_array",
    "as_tensor",
    "compact_",
    "densify_",
    "experts",
    "forget",
    "from_pretrained",
    "grouped_linear",
    "linear",
    "sparsify_",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "from_pretrained":
        from .hf import from_pretrained

        return from_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
