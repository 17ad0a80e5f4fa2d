"""Vectors as a type of Numba, and the few LLVM idioms that the words of ``simd`` and ``pick`` are made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import config, types
from numba.extending import models, register_model

FLOAT, INT, LONG = ir.FloatType(), ir.IntType(32), ir.IntType(64)
ELEMENTS = {types.float32: FLOAT, types.int32: INT}
# Arrays of 16-bit floats come as integers whose signedness says which they are: see ``storage``.
BFLOAT16, FLOAT16 = types.uint16, types.int16


def _has_avx512() -> bool:
    """Whether Numba compiles for AVX-512 here (its settings can name another CPU than this one)."""
    if config.CPU_FEATURES is not None:
        return "+avx512f" in config.CPU_FEATURES
    return config.CPU_NAME in (None, "host") and bool(get_host_cpu_features().get("avx512f"))


AVX512 = _has_avx512()


class Vector(types.Type):
    """``lanes`` numbers of one ``element`` type, float32 or int32."""

    def __init__(self, element: types.Type, lanes: int):
        self.element, self.lanes = element, lanes
        super().__init__(name=f"Vector({element}, {lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector):
        super().__init__(manager, vector, ir.VectorType(ELEMENTS[vector.element], vector.lanes))


def element(builder: ir.IRBuilder, args: list[ir.Value], kind: ir.Type) -> ir.Value:
    """Where the ``memory, index`` that head ``args`` point, as a pointer to ``kind``."""
    return builder.bitcast(builder.gep(args[0], [args[1]]), kind.as_pointer())


def constant(numbers: list[int]) -> ir.Constant:
    """A vector of int32."""
    return ir.Constant(ir.VectorType(INT, len(numbers)), numbers)


def shuffle(builder: ir.IRBuilder, vector: ir.Value, lanes: Iterable[int]) -> ir.Value:
    """The vector of the ``lanes`` of another."""
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), constant(list(lanes)))


def splat(builder: ir.IRBuilder, scalar: ir.Value, lanes: int) -> ir.Value:
    """A vector of copies."""
    vector = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    return shuffle(builder, builder.insert_element(vector, scalar, INT(0)), [0] * lanes)


def as_float(builder: ir.IRBuilder, value: ir.Value, stored: types.Type) -> ir.Value:
    """A vector of stored elements as float32."""
    n = value.type.count
    if stored == BFLOAT16:
        wide = builder.zext(value, ir.VectorType(INT, n))
        return builder.bitcast(builder.shl(wide, constant([16] * n)), ir.VectorType(FLOAT, n))
    return _from_half(builder, value) if stored == FLOAT16 else value


def _from_half(builder: ir.IRBuilder, half: ir.Value) -> ir.Value:
    """IEEE half to single, in integers: not every machine has the instruction, and LLVM would call a C function."""
    n = half.type.count
    floats = ir.VectorType(FLOAT, n)
    # Sign and magnitude move to where a float has them (and a sign extension fills what the mask clears).
    bits = builder.shl(builder.sext(half, ir.VectorType(INT, n)), constant([13] * n))
    bits = builder.and_(bits, constant([0x8FFFE000 - 2**32] * n))
    # The exponent is 112 too small. Multiplying mends it for subnormals too.
    value = builder.fmul(builder.bitcast(bits, floats), ir.Constant(floats, [2.0**112] * n))
    # The largest exponent means inf or NaN in either.
    top = builder.and_(bits, constant([0x0F800000] * n))
    special = builder.icmp_unsigned("==", top, constant([0x0F800000] * n))
    raised = builder.or_(builder.bitcast(value, bits.type), constant([0x7F800000] * n))
    return builder.bitcast(builder.select(special, raised, builder.bitcast(value, bits.type)), floats)
