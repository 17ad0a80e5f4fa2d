"""The op ``nmsparse::route``: from the logits of a router to the experts of each token, one kernel on a GPU.

Its settings are those of :class:`nmsparse.moe.Router`, in the same order. It has no gradient and says so in the
backward pass: routers that train run their own forward.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..errors import NMSparseError
from ..moe import Router
from .library import _define, _library

__all__ = ["Settings", "route", "route_op"]

Settings = tuple[int, str, bool, int, int, str, float]  # the fields of a Router

_router = functools.lru_cache(maxsize=256)(Router)


def route(logits: Tensor, bias: Tensor | None, *settings: Any) -> tuple[Tensor, Tensor]:
    """What ``nmsparse::route`` runs: ``logits`` (T, E) and ``bias`` (E,) → weights float32 and ids int32, both (T, k).

    On a GPU the logits are float32, float16 or bfloat16 and the bias float32. The results are those of
    :func:`nmsparse.moe.route`, in the order in which ``transformers`` returns them.

    >>> route(torch.tensor([[0.0, 2.0, 1.0]]), None, 2, "softmax", True, 1, 1, "max", 1.0)[1]
    tensor([[1, 2]], dtype=torch.int32)
    """
    router = _router(*settings)
    if logits.is_cuda:
        routing = ops._cuda("routing")
        ids, weights = routing.route(logits, routing.logits_of(logits, router, bias))
    else:
        ids, weights = router(logits, bias)
    return weights, ids


def _fake(logits: Tensor, bias: Tensor | None, top_k: int, *settings: Any) -> tuple[Tensor, Tensor]:
    if logits.ndim != 2:
        raise NMSparseError(f"route: expected logits (tokens, experts), got {tuple(logits.shape)}")
    shape = logits.shape[0], top_k
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)


route_op = _define(
    "route(Tensor logits, Tensor? bias, int top_k, str scoring, bool renormalize, int num_groups, int topk_groups, "
    "str group_score, float scale) -> (Tensor, Tensor)",
    route,
    _fake,
)


def _no_gradient(ctx: Any, *grads: Tensor) -> None:
    raise NMSparseError("nmsparse::route has no gradient: call it under torch.no_grad(), or train with another router")


torch.library.register_autograd("nmsparse::route", _no_gradient, lib=_library)
