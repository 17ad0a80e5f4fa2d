"""Training a dense model into a pattern: masks that follow the weights, and in the end stand still.

The weights stay dense parameters and every optimiser works on them; what the model computes with is the masked weight.

======================  =============================================================================================
straight-through        forward ``m ⊙ W``; the gradient passes to all of W, so that what is masked can come back
SR-STE                  the same, and ``λ (1 − m) ⊙ W`` added to the gradient: what is masked fades (Zhou et al.,
                        "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", ICLR 2021)
decaying mask           forward ``W ⊙ (m + (1 − m) β)``, β from 1 to 0 (Kao et al., "Training Recipe for N:M Structured
                        Sparsity with Decaying Pruning Mask", arXiv 2209.07617)
refresh                 m is chosen anew from ``|W|`` every few steps
frozen tail             for the last part of the training m stays and the gradient is that of ``m ⊙ W`` exactly
======================  =============================================================================================

λ is divided by Adam's second moment like any gradient: the 2e-4 that was published for SGD does next to nothing there,
some 1e-2 does. A mask that moves until the end keeps the weights from settling, hence the frozen tail.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import NMSparseError
from ..formats import Pattern, parse
from . import layout
from .masks import mask
from .surgery import Select, is_sparse, targets

__all__ = ["MaskTraining", "mask"]


class _StraightThrough(torch.autograd.Function):
    """``W ⊙ (m + (1 − m) β)``, whose gradient is ``dW̃ + λ (1 − m) ⊙ W``, or ``m ⊙ dW̃`` where the masks are frozen.

    β and whether it is frozen are tensors, so that a compiled step does not have to be compiled again.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, kept: Tensor, beta: Tensor, frozen: Tensor, decay: float) -> Tensor:
        ctx.save_for_backward(w, kept, frozen)
        ctx.decay = decay
        return torch.where(kept, w, w * beta)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        w, kept, frozen = ctx.saved_tensors
        through = grad + ctx.decay * w if ctx.decay else grad
        return torch.where(kept, grad, through.masked_fill(frozen, 0.0)), None, None, None, None


class Masked(nn.Module):
    """The parametrization of one weight; ``module`` and ``name`` say in which layout the model keeps it."""

    kept: Tensor
    beta: Tensor
    frozen: Tensor

    def __init__(self, w: Tensor, pattern: Pattern, decay: float, module: nn.Module, name: str):
        super().__init__()
        self.pattern, self.decay, self.name = pattern, decay, name
        # Not a child of its own parametrization.
        self._owner = (module,)
        self.register_buffer("kept", self._choose(w))
        self.register_buffer("beta", torch.zeros((), dtype=w.dtype, device=w.device))
        self.register_buffer("frozen", torch.zeros((), dtype=torch.bool, device=w.device))

    def _choose(self, w: Tensor) -> Tensor:
        (module,) = self._owner
        if not layout.holds_experts(module):
            return mask(w, self.pattern)
        chosen = mask(layout.to_rows(module, self.name, w.detach()), self.pattern)
        return layout.from_rows(module, self.name, chosen).contiguous()

    def refresh(self, w: Tensor) -> Tensor:
        """Choose anew; returns how many elements changed sides."""
        chosen = self._choose(w)
        flips = (chosen ^ self.kept).sum()
        self.kept.copy_(chosen)
        return flips

    def forward(self, w: Tensor) -> Tensor:
        return _StraightThrough.apply(w, self.kept, self.beta, self.frozen, self.decay)


class MaskTraining:
    """Trains ``model`` into ``pattern``: call :meth:`step` after each step of the optimiser, and :meth:`finish` last.

    ``steps`` is the length of the training; ``select`` chooses as in :func:`~nmsparse.torch.sparsify_`, all experts by
    default. ``decay`` is λ of SR-STE (0: plain straight-through), ``fade`` the share of the training in which β falls
    linearly from 1 to 0 (0: no decaying mask), ``refresh`` the steps between two choices of the masks, ``frozen`` the
    share at the end in which they stand still. The optimiser may be made before or after; it sees the same parameters.

    ``beta`` is the current β, ``frozen`` whether the masks stand still.

    >>> torch.manual_seed(0)
    <torch._C.Generator object at ...>
    >>> model = nn.Sequential(nn.Linear(32, 16))
    >>> optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    >>> training = MaskTraining(model, "2:4", steps=20, select="0", decay=1e-2, refresh=5)
    >>> for _ in range(20):
    ...     optimizer.zero_grad()
    ...     model(torch.ones(4, 32)).square().sum().backward()
    ...     optimizer.step()
    ...     training.step()
    >>> training.finish()
    >>> int((model[0].weight != 0).sum()), type(model[0].weight).__name__
    (256, 'Parameter')
    """

    def __init__(
        self,
        model: nn.Module,
        pattern: str | Pattern,
        *,
        steps: int,
        select: Select = None,
        decay: float = 0.0,
        fade: float = 0.0,
        refresh: int = 10,
        frozen: float = 0.3,
    ):
        if steps < 1 or refresh < 1 or not 0 <= frozen <= 1 or not 0 <= fade <= 1 - frozen or decay < 0:
            raise NMSparseError(
                f"MaskTraining: expected steps and refresh of 1 or more, decay of 0 or more, and shares frozen and "
                f"fade that fit into the training, got {steps=}, {refresh=}, {decay=}, {frozen=}, {fade=}"
            )
        pattern = parse(pattern)
        self.steps, self.fade, self.every, self.tail = steps, fade, refresh, frozen
        self.done, self.beta, self.frozen = 0, 0.0, False
        self._changed: tuple[Any, int] = 0, 1
        self._places = [
            (module, name)
            for _, module in targets(model, select)
            if not is_sparse(module)
            for name in (layout.projections(module) if layout.holds_experts(module) else ("weight",))
        ]
        if not self._places:
            raise NMSparseError(f"MaskTraining: found nothing dense to train in {type(model).__name__}; pass select=")
        for module, name in self._places:
            masked = Masked(getattr(module, name), pattern, decay, module, name)
            parametrize.register_parametrization(module, name, masked)
        self._set(0.0)

    @property
    def flips(self) -> float:
        """Share of the mask elements that changed at the last refresh; waits for the device."""
        changed, size = self._changed
        return float(changed) / size

    def step(self, progress: float | None = None) -> None:
        """One step was taken; ``progress``, from 0 to 1, replaces the count of steps where time is what is limited."""
        self.done += 1
        progress = self.done / self.steps if progress is None else progress
        if self.frozen:
            return
        if self.done % self.every == 0 or progress >= 1 - self.tail:
            self._refresh()
        self._set(progress)

    def finish(self) -> None:
        """Set what is masked to 0 and make the weights plain parameters again; ``sparsify_`` then loses nothing."""
        with torch.no_grad():
            for module, name in self._places:
                masked, original = self._parts(module, name)
                original.mul_(masked.kept)
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        self._places = []

    def _parts(self, module: nn.Module, name: str) -> tuple[Masked, nn.Parameter]:
        parametrization = module.parametrizations[name]
        return parametrization[0], parametrization.original

    @torch.no_grad()
    def _refresh(self) -> None:
        flips = size = 0
        for module, name in self._places:
            masked, original = self._parts(module, name)
            flips, size = flips + masked.refresh(original), size + original.numel()
        self._changed = flips, size

    def _set(self, progress: float) -> None:
        self.frozen = progress >= 1 - self.tail and self.tail > 0
        self.beta = max(0.0, 1 - progress / self.fade) if self.fade and not self.frozen else 0.0
        for module, name in self._places:
            masked, _ = self._parts(module, name)
            masked.beta.fill_(self.beta)
            masked.frozen.fill_(self.frozen)
