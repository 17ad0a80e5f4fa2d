"""Which elements a pattern keeps, in torch: masks on any device, for training.

The same choice as ``nmsparse.array`` makes (magnitudes, ties to the lower index, NaN first), except that sums are
formed in torch's order, which may decide between sub-rows or columns that are equal to the last bits of float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import Pattern, parse
from .decode import padded

__all__ = ["mask"]


def mask(w: Tensor, pattern: str | Pattern) -> Tensor:
    """What ``pattern`` keeps of ``w`` ``(…, M, K)``, bool in its shape.

    >>> mask(torch.tensor([[1.0, -5.0, 2.0, 0.0, 3.0, 0.0, 1.0, -1.0]]), "2:4").int()
    tensor([[0, 1, 1, 0, 1, 0, 1, 0]], dtype=torch.int32)
    """
    pattern = parse(pattern)
    rows, columns = w.shape[-2:]
    height, width = padded(pattern, w.shape)
    scores = w.detach().abs().nan_to_num(torch.inf, torch.inf)
    if scores.dtype != torch.float64:
        scores = scores.float()
    # Below every weight, so that padding is chosen last.
    scores = F.pad(scores, (0, width - columns, 0, height - rows), value=-1.0)
    kept = _CHOICES[pattern.format](scores, pattern)
    return kept[..., :rows, :columns].contiguous()


def _top(scores: Tensor, n: int) -> Tensor:
    """Where the ``n`` largest of the last axis are; ties to the lower position. The axis is short: no sort is needed.

    An element is kept if fewer than ``n`` others come before it.
    """
    size = scores.shape[-1]
    if size > 16:
        order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :n]
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True)
    before = torch.zeros_like(scores, dtype=torch.int8)
    for other in range(size):
        one = scores[..., other : other + 1]
        lower = torch.arange(size, device=scores.device) > other
        before += (one > scores) | ((one == scores) & lower)
    return before < n


def _sum(scores: Tensor, axis: int) -> Tensor:
    """In float64; padding counts as nothing, and nothing but padding stays below every weight."""
    total = scores.clamp(min=0).sum(axis, dtype=torch.float64)
    return total.where((scores >= 0).any(axis), -1.0)


def _nm(scores: Tensor, pattern: Pattern) -> Tensor:
    return _top(scores.unflatten(-1, (-1, pattern.m)), pattern.n).flatten(-2)


def _vnm(scores: Tensor, pattern: Pattern) -> Tensor:
    blocks = scores.unflatten(-1, (-1, pattern.m)).unflatten(-3, (-1, pattern.v))  # (…, M/v, v, K/m, m)
    columns = _top(_sum(blocks, -3), 4)[..., None, :, :]
    return (_top(blocks.where(columns, -2.0), 2) & columns).flatten(-2).flatten(-3, -2)


def _samoyeds(scores: Tensor, pattern: Pattern) -> Tensor:
    pairs = _top(scores.unflatten(-1, (-1, 4)), 2).flatten(-2)
    kept = scores.where(pairs, 0.0).clamp(min=0)
    width = scores.shape[-1]
    run = min(pattern.v, width)
    short = -width % run
    worth = F.pad(kept, (0, short)).unflatten(-1, (-1, run)).sum(-1, dtype=torch.float64)  # (…, M, runs)
    worth = worth.masked_fill((scores < 0).all(-1, keepdim=True), -1.0)  # rows below the weight
    rows = _top(worth.unflatten(-2, (-1, pattern.m)).mT, pattern.n).mT.flatten(-3, -2)
    return pairs & rows.repeat_interleave(run, dim=-1)[..., :width]


_CHOICES = {"nm": _nm, "vnm": _vnm, "samoyeds": _samoyeds}
