"""A whole Mixture-of-Experts layer: router, routed experts, shared experts."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import NMSparseError, UnsupportedDeviceError
from ..formats.checks import is_on_gpu
from ..ops import _cuda, as_activation, takes_tensors
from .experts import SparseExperts
from .router import Router, finite_float32, sigmoid


class MoELayer:
    """Tokens in, tokens out: routes each token to ``top_k`` of the experts and adds the shared experts, if any.

    ``router_weight`` (E, H) maps tokens to logits; ``router`` says what to do with them; ``bias`` (E,) is DeepSeek-V3's
    ``e_score_correction_bias``. ``shared`` is a :class:`SparseExperts` of one expert that every token takes: with
    weight 1 (DeepSeek), or ``sigmoid(x @ shared_gate)`` where ``shared_gate`` (H,) or (1, H) is given (Qwen2-MoE).
    Several shared experts are one, with their intermediate sizes side by side; DeepSeek stores them so.

    Routing is float32 whatever the dtype of ``x``; the sum of routed and shared experts is rounded once, at the end.
    Raises NMSparseError for parts that do not fit together.

    With experts on a GPU the layer runs there, on arrays of torch or cupy of the experts' dtype: the library's float32
    product makes the logits (with TF32 only where torch was told so), then four launches for the routed experts and
    four for the shared one, whose output is rounded before it is added. Nothing waits, and a CUDA graph of a call, made
    after a first one, follows any routing. The other parts may be on the host or there. See :func:`~nmsparse.moe.route`
    for what nobody can check there.

    >>> rng = np.random.default_rng(0)
    >>> def weights(*shape): return rng.standard_normal(shape, np.float32)
    >>> experts = SparseExperts.from_dense(weights(8, 64, 32), weights(8, 32, 32), "samoyeds:1:2:16")
    >>> layer = MoELayer(weights(8, 32), experts, Router(top_k=2, renormalize=True))
    >>> layer(weights(5, 32)).shape, layer(weights(2, 5, 32)).shape
    ((5, 32), (2, 5, 32))
    """

    def __init__(
        self,
        router_weight: np.ndarray,
        experts: SparseExperts,
        router: Router,
        shared: SparseExperts | None = None,
        shared_gate: np.ndarray | None = None,
        *,
        bias: np.ndarray | None = None,
    ):
        num_experts, hidden = experts.num_experts, experts.hidden_size
        router.check(num_experts)
        self.experts, self.router, self.shared = experts, router, shared
        self.router_weight = finite_float32("router_weight", _host(router_weight), (num_experts, hidden))
        self.bias = None if bias is None else finite_float32("bias", _host(bias), (num_experts,))
        if shared is not None and (shared.num_experts, shared.hidden_size) != (1, hidden):
            raise NMSparseError(
                f"shared: expected one expert of hidden size {hidden}, got {shared!r}; "
                "concatenate several shared experts along their intermediate axis"
            )
        if shared is None and shared_gate is not None:
            raise NMSparseError("shared_gate: expected only together with shared; give both or neither")
        self.shared_gate = None
        if shared_gate is not None:
            self.shared_gate = finite_float32("shared_gate", np.reshape(_host(shared_gate), -1), (hidden,))
        if shared is not None and shared.device != experts.device:
            raise UnsupportedDeviceError(
                f"expected experts and shared in one place, got {experts.device} and {shared.device}"
            )
        self._gpu = None if experts.device == "cpu" else self._layer_on_gpu()

    def __repr__(self) -> str:
        return f"MoELayer({self.router!r}, {self.experts!r}, shared={self.shared!r})"

    def _layer_on_gpu(self) -> Any:
        gpu, shared = _cuda("layer"), None
        if self.shared is not None:
            gated, no_gate = self.shared_gate is not None, np.zeros(self.experts.hidden_size, np.float32)
            router = Router(1, "sigmoid" if gated else "softmax")
            shared = gpu.Routed(self.shared._gpu, router, (self.shared_gate if gated else no_gate)[None])
        return gpu.Layer(gpu.Routed(self.experts._gpu, self.router, self.router_weight, self.bias), shared)

    @takes_tensors
    def route(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The experts (T, k) of tokens ``x`` (T, H), or (…, H) taken as one list of tokens, and their weights (T, k).

        >>> eye = np.eye(2, dtype=np.float32)
        >>> layer = MoELayer(eye, SparseExperts(eye[None].repeat(2, 0), eye[None].repeat(2, 0)), Router(top_k=1))
        >>> layer.route(np.array([[0.0, 3.0]], np.float32))[0]
        array([[1]], dtype=int32)
        """
        if self._gpu is not None:
            return self._gpu.route(x)
        return self.router(self._tokens(x) @ self.router_weight.T, self.bias)

    @takes_tensors
    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The layer's output for ``x`` (T, H) or (…, H), in its shape and dtype."""
        if self._gpu is not None:
            return self._gpu(x)
        x = as_activation(x, "x")
        wide = x if x.dtype == np.float64 else x.astype(np.float32, copy=False)
        y = self.experts(wide, *self.route(x))
        if self.shared is not None:
            y += self.shared(wide, *self._take_shared(x))
        return y.astype(x.dtype, copy=False)

    def _take_shared(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The routing to the shared expert: every token takes it."""
        tokens = self._tokens(x)
        ids = np.zeros((len(tokens), 1), np.int32)
        if self.shared_gate is None:
            return ids, np.ones(ids.shape, np.float32)
        return ids, sigmoid(tokens @ self.shared_gate)[:, None]

    def _tokens(self, x: np.ndarray) -> np.ndarray:
        """``x`` (…, H) as float32 (T, H)."""
        x, hidden = as_activation(x, "x"), self.experts.hidden_size
        if x.ndim == 0 or x.shape[-1] != hidden:
            raise NMSparseError(f"x: expected shape (tokens, {hidden}), got {x.shape}")
        return x.reshape(x.size // max(hidden, 1), hidden).astype(np.float32, copy=False)


def _host(part: Any) -> Any:
    """A small part of the layer where its values can be checked."""
    return _cuda("array").view(part).numpy() if is_on_gpu(part) else part
