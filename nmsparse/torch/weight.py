"""A sparse array as a module of plain tensors, which ``state_dict``, ``to`` and ``deepcopy`` understand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..formats import CLASSES, Pattern, SparseArray, parse
from .buffers import from_torch, to_torch
from .decode import check_canonical, scatter

__all__ = ["SparseWeight"]


class SparseWeight(nn.Module):
    """A weight ``(M, K)``, or ``(E, M, K)`` for experts, in its canonical buffers.

    ``values`` is a parameter: training it moves the kept elements and never the pattern. ``meta`` and ``indices`` (of
    two-level patterns) are buffers. In a ``state_dict`` they are ``<name>.values``, ``<name>.meta`` and
    ``<name>.indices``, the tensors that :func:`nmsparse.save` writes.

    >>> weight = SparseWeight.from_dense(torch.eye(8, 16), "2:4")
    >>> weight
    SparseWeight(float32[8, 16], 2:4)
    >>> {name: (list(t.shape), t.dtype) for name, t in weight.state_dict().items()}
    {'values': ([8, 8], torch.float32), 'meta': ([8, 1], torch.uint16)}
    >>> torch.equal(weight.todense(), torch.eye(8, 16))
    True
    """

    indices: Tensor | None

    def __init__(
        self,
        pattern: str | Pattern,
        shape: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        kind = parse(pattern)
        self.pattern, self.shape = str(kind), [int(size) for size in shape]
        layout, *_ = CLASSES[kind.format]._layout(kind, *self.shape[-2:])
        # Zeros are at position 0 of every group until something is loaded, which a full check would refuse.
        parts = {
            name: torch.zeros(
                (*self.shape[:-2], *sizes), dtype=dtype if own is None else getattr(torch, own.__name__), device=device
            )
            for name, (sizes, own) in layout.items()
        }
        self.values = nn.Parameter(parts["values"])
        self.register_buffer("meta", parts["meta"])
        self.register_buffer("indices", parts.get("indices"))

    @classmethod
    def from_array(cls, array: SparseArray) -> SparseWeight:
        """The weight that shares the memory of ``array``."""
        weight = cls(array.pattern, array.shape, device="meta")
        for name, tensor in to_torch(array).items():
            setattr(weight, name, nn.Parameter(tensor) if name == "values" else tensor)
        return weight

    @classmethod
    def from_dense(cls, dense: Tensor, pattern: str | Pattern, **options: Any) -> SparseWeight:
        """Prune and pack ``dense`` on its device; ``scores``, ``mask`` and ``strict`` as in :func:`nmsparse.array`."""
        with torch.no_grad():
            return cls.from_array(ops.array(dense.detach().contiguous(), pattern, **options))

    def __call__(self) -> tuple[Tensor, Tensor, Tensor | None, str, list[int]]:
        hooked = self._forward_pre_hooks or self._forward_hooks  # without any, what torch looks for takes a microsecond
        return super().__call__() if hooked else self.forward()

    def forward(self) -> tuple[Tensor, Tensor, Tensor | None, str, list[int]]:
        """What an op takes for this weight; by a call, so that hooks that bring offloaded tensors back see it."""
        buffers = self._buffers  # not by attribute: ``nn.Module.__getattr__`` takes half a microsecond for each
        return self._parameters["values"], buffers["meta"], buffers["indices"], self.pattern, self.shape

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the kept values."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(t.nbytes for t in (self.values, self.meta, self.indices) if t is not None)

    @property
    def is_compact(self) -> bool:
        """Whether only the packed form is left: see :func:`nmsparse.torch.compact_`."""
        return self.values.numel() > 0 and not self.meta.numel()

    def array(self) -> SparseArray:
        """The :class:`~nmsparse.formats.SparseArray` on the same memory; every position is checked."""
        return from_torch({name: t.detach() for name, t in self.state_dict().items()}, self.pattern, tuple(self.shape))

    def todense(self) -> Tensor:
        """The dense weight; differentiable in ``values``."""
        return scatter(*self())

    def _save_to_state_dict(self, *arguments: Any) -> None:
        check_canonical(self.values, self.meta)
        super()._save_to_state_dict(*arguments)

    def __getstate__(self) -> dict[str, Any]:
        check_canonical(self.values, self.meta)
        # Plain pickle cannot read a uint16 tensor back (torch 2.13), an int16 one it can.
        return {**self.__dict__, "_buffers": _viewed(self._buffers, torch.uint16, torch.int16)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_buffers": _viewed(state["_buffers"], torch.int16, torch.uint16)})

    def extra_repr(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{self.shape}, {self.pattern}"


def _viewed(buffers: dict[str, Any], old: torch.dtype, new: torch.dtype) -> dict[str, Any]:
    return {name: t.view(new) if t is not None and t.dtype == old else t for name, t in buffers.items()}
