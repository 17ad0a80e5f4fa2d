"""Where each stored value sits in the dense weight, in torch: what gradients are made of.

The formats define this in NumPy (``SparseArray._coordinates``); here it runs on any device, with an expert axis, and
under ``torch.compile``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import NMSparseError
from ..formats import CLASSES, Pattern, parse
from ..formats.nm import is_24

__all__ = ["check_canonical", "gather", "padded", "scatter"]


def scatter(
    values: Tensor, meta: Tensor, indices: Tensor | None, pattern: str | Pattern, shape: Sequence[int]
) -> Tensor:
    """The dense weight ``(…, M, K)`` of canonical buffers; differentiable in ``values``.

    >>> from nmsparse.formats import random
    >>> from .buffers import as_tensor, to_torch
    >>> A = random((2, 6, 40), "samoyeds:1:2:16", rng=0)
    >>> parts = to_torch(A)
    >>> torch.equal(scatter(parts["values"], parts["meta"], parts["indices"], A.pattern, A.shape),
    ...             as_tensor(A.todense()))
    True
    """
    check_canonical(values, meta)
    pattern, lead = parse(pattern), tuple(shape[:-2])
    height, width = padded(pattern, shape)
    places = _places(meta, indices, pattern, width)
    flat = values.new_zeros((*lead, height * width))
    flat = flat.scatter(-1, places.flatten(-2), values.flatten(-2))
    return flat.view(*lead, height, width)[..., : shape[-2], : shape[-1]]


def gather(dense: Tensor, meta: Tensor, indices: Tensor | None, pattern: str | Pattern) -> Tensor:
    """The elements of ``dense`` ``(…, M, K)`` where ``values`` are stored, 0 in the padding: ``scatter`` transposed."""
    pattern = parse(pattern)
    height, width = padded(pattern, dense.shape)
    dense = torch.nn.functional.pad(dense, (0, width - dense.shape[-1], 0, height - dense.shape[-2]))
    places = _places(meta, indices, pattern, width)
    return dense.flatten(-2).gather(-1, places.flatten(-2)).view(places.shape)


def check_canonical(values: Tensor, meta: Tensor) -> None:
    """Raise for the buffers of weights that ``compact_`` has reduced to what the kernels of one GPU read."""
    if values.numel() and not meta.numel():
        raise NMSparseError(
            "compact weights run on their GPU and nowhere else: train, save, copy, move and decode before compact_"
        )


def padded(pattern: Pattern, shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns that the buffers of a weight ``(…, M, K)`` can address."""
    _, height, width = CLASSES[pattern.format]._layout(pattern, *shape[-2:])
    return height, width


def _places(meta: Tensor, indices: Tensor | None, pattern: Pattern, width: int) -> Tensor:
    """Row times ``width`` plus column of every stored value, int64 in the shape of ``values``."""
    rows = torch.arange(meta.shape[-2], device=meta.device)[:, None]
    if pattern.format == "nm" and not is_24(pattern):
        positions = meta.long().unflatten(-1, (meta.shape[-1] // pattern.n, pattern.n))
        return rows * width + _columns(positions, pattern.m)
    positions = _unpack(meta)
    if pattern.format == "vnm":
        columns = indices.long().repeat_interleave(pattern.v, dim=-3)
        return rows * width + _columns(columns.gather(-1, positions), pattern.m)
    columns = _columns(positions, 4)
    if pattern.format == "samoyeds":
        chunk = torch.arange(columns.shape[-1], device=meta.device) // (pattern.v // 2)
        rows = rows // pattern.n * pattern.m + indices.long()[..., chunk]
    return rows * width + columns


def _columns(positions: Tensor, step: int) -> Tensor:
    """Positions ``(…, G, n)`` in groups of ``step`` columns as dense columns ``(…, G·n)``."""
    groups = torch.arange(positions.shape[-2], device=positions.device)[:, None]
    return (step * groups + positions).flatten(-2)


def _unpack(meta: Tensor) -> Tensor:
    """``metadata.unpack``: words ``(…, W)`` uint16 as positions ``(…, 4W, 2)`` int64."""
    shifts = torch.arange(0, 16, 2, device=meta.device)
    # torch shifts no uint16; its bits as int16 it does.
    return (meta.view(torch.int16).long()[..., None] >> shifts & 3).view(*meta.shape[:-1], 4 * meta.shape[-1], 2)
