"""``nn.Module``s with sparse weights: a linear layer, and the experts of a Mixture-of-Experts layer."""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import NMSparseError
from ..formats import Pattern
from . import functional
from .gradients import ACTIVATIONS
from .weight import SparseWeight

__all__ = ["SparseExperts", "SparseLinear"]


class SparseLinear(nn.Module):
    """``nn.Linear`` with a sparse weight ``(out_features, in_features)``.

    >>> import torch
    >>> layer = SparseLinear.from_linear(nn.Linear(64, 32), "2:4")
    >>> layer
    SparseLinear(
      in_features=64, out_features=32, bias=True
      (weight): SparseWeight(float32[32, 64], 2:4)
    )
    >>> layer(torch.ones(5, 64)).shape
    torch.Size([5, 32])
    """

    bias: nn.Parameter | None

    def __init__(self, weight: SparseWeight, bias: Tensor | None = None):
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach()))

    @classmethod
    def from_linear(cls, linear: nn.Linear, pattern: str | Pattern) -> SparseLinear:
        """Prune a dense layer by magnitude; the bias is shared."""
        return cls(SparseWeight.from_dense(linear.weight, pattern), linear.bias)

    @property
    def in_features(self) -> int:
        """K."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """M."""
        return self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class SparseExperts(nn.Module):
    """The experts of a layer: ``y[t] = Σ_j weights[t, j] · down[e] (act(gate x) * up x)``, e = ids[t, j].

    ``gate_up_proj`` (E, 2I, H) holds the gate's rows, then the up rows; (E, I, H) is without a gate. ``down_proj`` is
    (E, H, I). ``activation`` is a key of ``nmsparse.reference.ACTIVATIONS``.

    >>> import torch
    >>> layer = SparseExperts.from_dense(torch.randn(4, 64, 32), torch.randn(4, 32, 32), "samoyeds:1:2:16")
    >>> layer(torch.ones(3, 32), torch.tensor([[0, 1], [3, 0], [2, 3]]), torch.full((3, 2), 0.5)).shape
    torch.Size([3, 32])
    """

    def __init__(self, gate_up_proj: SparseWeight, down_proj: SparseWeight, activation: str = "silu"):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise NMSparseError(f"activation: expected one of {', '.join(ACTIVATIONS)}; got {activation!r}")
        self.gate_up_proj, self.down_proj, self.activation = gate_up_proj, down_proj, activation

    @classmethod
    def from_dense(
        cls, gate_up: Tensor, down: Tensor, pattern: str | Pattern, activation: str = "silu"
    ) -> SparseExperts:
        """Prune dense experts by magnitude."""
        return cls(SparseWeight.from_dense(gate_up, pattern), SparseWeight.from_dense(down, pattern), activation)

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        own = self._modules  # by attribute each takes half a microsecond
        return functional.experts(x, topk_ids, topk_weights, own["gate_up_proj"], own["down_proj"], self.activation)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
