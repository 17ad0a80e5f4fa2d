"""The ops: ``nmsparse::linear``, ``nmsparse::grouped_linear`` and ``nmsparse::experts`` of ``torch.library``.

A sparse weight passes through an op as its plain buffers, the pattern as text and the shape, so that an exported
program holds tensors and nothing of ours. ``Library.define`` and ``impl`` rather than ``custom_op``: half the host time
of a call. Every op has a fake and a gradient; how gradients are made is in :mod:`nmsparse.torch.gradients`.

========================  ===========================================================================
``linear``                ``x`` (…, K) → (…, M) ``= x @ W.T + bias``
``grouped_linear``        ``x`` (S, K), ``offsets`` (E,) cumulative ends → (S, M)
``experts``               ``x`` (…, H), ``ids`` and ``weights`` (…, k) → like ``x``
========================  ===========================================================================

``nmsparse::route``, which has no gradient, is in :mod:`nmsparse.torch.routing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..errors import NMSparseError
from . import gradients
from .arrays import array_of, experts_of

__all__ = ["experts_op", "grouped_linear_op", "linear_op"]

_library = torch.library.Library("nmsparse", "DEF")
_DEVICES = ("CPU", "CUDA")


def _define(schema: str, implementation: Any, fake: Any) -> Any:
    """Register an op; returns it."""
    name = _library.define(schema)
    for device in _DEVICES:
        _library.impl(name, implementation, device)
    torch.library.register_fake(f"nmsparse::{name}", fake, lib=_library)
    return getattr(torch.ops.nmsparse, name).default


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of the same shapes and dtypes, in C order."""
    return tuple(tensor.new_empty(tensor.shape) for tensor in tensors)


# --- linear ----------------------------------------------------------------------------------------------------------


def linear(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    indices: Tensor | None,
    pattern: str,
    shape: Sequence[int],
    bias: Tensor | None,
) -> Tensor:
    """What ``nmsparse::linear`` runs."""
    array = array_of(values, meta, indices, pattern, shape)
    if x.is_cuda:
        return ops._cuda("matmul").matmul(x, array, bias=bias)
    y = ops.matmul(x, array.T)
    return y if bias is None else y + bias


def _linear_fake(x, values, meta, indices, pattern, shape, bias):
    if x.shape[-1] != shape[-1] or len(shape) != 2:
        raise NMSparseError(f"linear: expected x (…, K) and a weight (M, K), got {tuple(x.shape)} and {tuple(shape)}")
    return x.new_empty((*x.shape[:-1], shape[0]), dtype=torch.promote_types(x.dtype, values.dtype))


linear_op = _define(
    "linear(Tensor x, Tensor values, Tensor meta, Tensor? indices, str pattern, int[] shape, Tensor? bias) -> Tensor",
    linear,
    _linear_fake,
)


def _linear_setup(ctx, inputs, output):
    x, values, meta, indices, ctx.pattern, ctx.shape, _bias = inputs
    ctx.save_for_backward(x, values, meta, indices)


def _linear_backward(ctx, grad):
    need_x, need_values, *_, need_bias = ctx.needs_input_grad
    x, values, meta, indices = ctx.saved_tensors
    dx, dvalues = gradients.linear(
        grad, x, values, meta, indices, ctx.pattern, ctx.shape, need_x=need_x, need_values=need_values
    )
    dbias = grad.flatten(0, -2).sum(0) if need_bias else None
    return dx, dvalues, None, None, None, None, dbias


torch.library.register_autograd("nmsparse::linear", _linear_backward, setup_context=_linear_setup, lib=_library)


# --- grouped_linear --------------------------------------------------------------------------------------------------


def grouped_linear(
    x: Tensor,
    offsets: Tensor,
    values: Tensor,
    meta: Tensor,
    indices: Tensor | None,
    pattern: str,
    shape: Sequence[int],
) -> Tensor:
    """What ``nmsparse::grouped_linear`` runs."""
    return ops.grouped_matmul(x, array_of(values, meta, indices, pattern, shape), offsets)


def _grouped_fake(x, offsets, values, meta, indices, pattern, shape):
    if x.ndim != 2 or len(shape) != 3 or x.shape[1] != shape[2]:
        raise NMSparseError(
            f"grouped_linear: expected x (S, K) and a weight (E, M, K), got {tuple(x.shape)} and {tuple(shape)}"
        )
    return x.new_empty((x.shape[0], shape[1]), dtype=torch.promote_types(x.dtype, values.dtype))


grouped_linear_op = _define(
    "grouped_linear(Tensor x, Tensor offsets, Tensor values, Tensor meta, Tensor? indices, str pattern, int[] shape)"
    " -> Tensor",
    grouped_linear,
    _grouped_fake,
)

# The gradients of products with experts loop over the experts on the host: ops of their own, opaque to a compiler.
grouped_linear_backward_op = _define(
    "grouped_linear_backward(Tensor grad, Tensor x, Tensor offsets, Tensor values, Tensor meta, Tensor? indices, "
    "str pattern, int[] shape, bool need_values) -> (Tensor, Tensor)",
    gradients.grouped_linear,
    lambda grad, x, offsets, values, *weight: _contiguous(x, values),
)


def _grouped_setup(ctx, inputs, output):
    *tensors, ctx.pattern, ctx.shape = inputs
    ctx.save_for_backward(*tensors)


def _grouped_backward(ctx, grad):
    need_values = ctx.needs_input_grad[2]
    dx, dvalues = grouped_linear_backward_op(grad, *ctx.saved_tensors, ctx.pattern, ctx.shape, need_values)
    return dx, None, dvalues if need_values else None, None, None, None, None


torch.library.register_autograd(
    "nmsparse::grouped_linear", _grouped_backward, setup_context=_grouped_setup, lib=_library
)


# --- experts ---------------------------------------------------------------------------------------------------------

_EXPERTS = (
    "Tensor x, Tensor ids, Tensor weights, "
    "Tensor gate_up_values, Tensor gate_up_meta, Tensor? gate_up_indices, str gate_up_pattern, int[] gate_up_shape, "
    "Tensor down_values, Tensor down_meta, Tensor? down_indices, str down_pattern, int[] down_shape, str activation"
)


def experts(x: Tensor, ids: Tensor, weights: Tensor, *projections: Any) -> Tensor:
    """What ``nmsparse::experts`` runs."""
    layer = experts_of(projections[:5], projections[5:10], projections[10])
    if x.is_cuda:  # the kernels want them in C order
        return (layer._gpu or layer)(x.contiguous(), ids.contiguous(), weights.contiguous())
    return layer(x, ids, weights)


experts_op = _define(
    f"experts({_EXPERTS}) -> Tensor",
    experts,
    lambda x, *rest: x.new_empty(x.shape),
)

experts_backward_op = _define(
    f"experts_backward(Tensor grad, {_EXPERTS}, bool need_values) -> (Tensor, Tensor, Tensor, Tensor)",
    gradients.experts,
    lambda grad, x, ids, weights, *projections: _contiguous(x, weights, projections[0], projections[5]),
)


def _experts_setup(ctx, inputs, output):
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
    ctx.inputs = [None if isinstance(value, Tensor) else (value,) for value in inputs]


def _experts_backward(ctx, grad):
    tensors = iter(ctx.saved_tensors)
    inputs = [next(tensors) if kept is None else kept[0] for kept in ctx.inputs]
    need_values = ctx.needs_input_grad[3] or ctx.needs_input_grad[8]
    dx, dweights, dgate_up, ddown = experts_backward_op(grad, *inputs, need_values)
    if not need_values:
        dgate_up = ddown = None
    return dx, None, dweights, dgate_up, None, None, None, None, ddown, None, None, None, None, None


torch.library.register_autograd("nmsparse::experts", _experts_backward, setup_context=_experts_setup, lib=_library)
