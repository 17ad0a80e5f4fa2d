"""Hugging Face ``transformers`` 5: ``experts_implementation="nmsparse"``, and loading and saving sparse models.

Importing this imports ``transformers`` and registers both with it.
"""

from __future__ import annotations

from ...errors import require

require("transformers", "torch")

from .experts import experts_forward  # noqa: E402
from .loading import NMSparseConfig, from_pretrained, mark  # noqa: E402
from .routers import fuse_routers_, router_of  # noqa: E402

__all__ = ["NMSparseConfig", "experts_forward", "from_pretrained", "fuse_routers_", "mark", "router_of"]
