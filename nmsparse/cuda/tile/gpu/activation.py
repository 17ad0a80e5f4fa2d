"""Activations on fp32 registers, by the names of :data:`nmsparse.reference.ACTIVATIONS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import libdevice, types

from ...ptx import arithmetic
from ...ptx.numba_glue import callable_of

__all__ = ["ACTIVATIONS"]

f32 = types.float32

jit = cuda.jit(device=True, forceinline=True)

_exp2, _reciprocal = callable_of(arithmetic.exp2), callable_of(arithmetic.reciprocal)
LOG2_E = 1.4426950408889634


@jit
def silu(x):
    return x * _reciprocal(f32(1) + _exp2(x * f32(-LOG2_E)))


@jit
def gelu(x):
    return f32(0.5) * x * (f32(1) + libdevice.erff(x * f32(0.7071067811865476)))


@jit
def gelu_tanh(x):
    return f32(0.5) * x * (f32(1) + libdevice.tanhf(f32(0.7978845608028654) * (x + f32(0.044715) * x * x * x)))


@jit
def relu(x):
    return x if x > f32(0) or x != x else f32(0)  # a NaN stays


@jit
def relu2(x):
    return relu(x) * relu(x)


@jit
def identity(x):
    return x


ACTIVATIONS: dict[str, Callable[..., Any]] = {
    function.py_func.__name__: function for function in (silu, gelu, gelu_tanh, relu, relu2, identity)
}
