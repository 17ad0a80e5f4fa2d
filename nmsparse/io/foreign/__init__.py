"""Sparse weights that other libraries wrote, as our arrays: one file each, NumPy in, canonical buffers out.

Every reader checks each position, so that a layout that was guessed wrong is an error and not a wrong model. To write
for others, decode: ``A.todense()`` is what all of them compress.
"""

from __future__ import annotations

from .bitmask import from_bitmask, read_bitmask_checkpoint
from .cusparselt import from_cusparselt
from .cutlass import from_cutlass
from .jax import from_jax
from .samoyeds import from_samoyeds_kernel

__all__ = [
    "from_bitmask",
    "from_cusparselt",
    "from_cutlass",
    "from_jax",
    "from_samoyeds_kernel",
    "read_bitmask_checkpoint",
]
