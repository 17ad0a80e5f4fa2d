"""The two metadata bits at work: what each stored value of a 2:4 row meets."""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from . import llvm
from .llvm import AVX512, INT, Vector

CANDIDATES = 2 if AVX512 else 3  # vectors out of which the 16 stored values of a block pick


@intrinsic
def word(typingctx, meta, index):
    """Two neighbouring words of uint16 metadata as one uint32: the 2-bit positions of 16 stored values."""

    def codegen(context, builder, signature, args):
        return builder.load(llvm.element(builder, args, INT), align=2)

    return types.uint32(meta, types.intp), codegen


@intrinsic(prefer_literal=True)
def candidates(typingctx, memory, index, lanes):
    """What the values of a block can meet, for :func:`pick`: ``CANDIDATES`` vectors from ``memory[index]`` on."""
    vector = Vector(memory.dtype, lanes.literal_value)
    signature = types.UniTuple(vector, CANDIDATES)(memory, types.intp, lanes)

    def codegen(context, builder, signature, args):
        loaded = ir.VectorType(llvm.ELEMENTS[vector.element], vector.lanes)
        first = llvm.element(builder, args, loaded)
        vectors = [builder.load(builder.gep(first, [INT(i)]), align=4) for i in range(CANDIDATES)]
        return context.make_tuple(builder, signature.return_type, vectors)

    return signature, codegen


@intrinsic
def pick(typingctx, positions, candidates):
    """What each of the 16 stored values of a block meets: field i of ``positions``, sixteen 2-bit fields, says which.

    ``candidates`` (laid out by ``planes``) of more than 16 lanes hold several tokens: field i serves lanes i, i + 16, …
    With AVX-512, ``positions`` may also be a vector: which of the 32 columns.
    """
    vector = candidates.dtype
    of_24 = not isinstance(positions, Vector)

    def codegen(context, builder, signature, args):
        found = cgutils.unpack_tuple(builder, args[1])
        if CANDIDATES == 3:
            return _blend(builder, args[0], found)
        return _permute(builder, _columns(builder, args[0]) if of_24 else args[0], found)

    return vector(types.uint32 if of_24 else positions, candidates), codegen


def _columns(builder: ir.IRBuilder, positions: ir.Value) -> ir.Value:
    """2-bit positions as columns of a block."""
    fields = builder.lshr(llvm.splat(builder, positions, 16), llvm.constant([2 * i for i in range(16)]))
    return builder.or_(builder.and_(fields, llvm.constant([3] * 16)), llvm.constant([i // 2 * 4 for i in range(16)]))


def _permute(builder: ir.IRBuilder, column: ir.Value, candidates: list[ir.Value]) -> ir.Value:
    """Out of the 32 columns themselves, with the one AVX-512 instruction that is worth a name of its own here."""
    vector = ir.VectorType(candidates[0].type.element, 16)
    suffix = "ps" if isinstance(vector.element, ir.FloatType) else "d"
    instruction = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(vector, [vector, column.type, vector]),
        f"llvm.x86.avx512.vpermi2var.{suffix}.512",
    )
    low, high = candidates
    tokens = [range(lane, lane + 16) for lane in range(0, low.type.count, 16)]
    picked = [
        builder.call(instruction, [llvm.shuffle(builder, low, token), column, llvm.shuffle(builder, high, token)])
        for token in tokens
    ]
    while len(picked) > 1:
        both = llvm.constant(list(range(2 * picked[0].type.count)))
        picked = [builder.shuffle_vector(a, b, both) for a, b in zip(picked[::2], picked[1::2], strict=True)]
    return picked[0]


def _blend(builder: ir.IRBuilder, positions: ir.Value, candidates: list[ir.Value]) -> ir.Value:
    """Out of three: positions ascend, so the first of a group is 0, 1 or 2 and the second 1, 2 or 3."""
    first, middle, last = candidates
    lanes = first.type.count

    def per_lane(bits: Callable[[int], int]) -> ir.Constant:
        return llvm.constant([bits(lane % 16) << 2 * (lane % 16) for lane in range(lanes)])

    def any_of(bits: ir.Constant) -> ir.Value:
        return builder.icmp_unsigned("!=", builder.and_(fields, bits), per_lane(lambda i: 0))

    # Inverting the low bit of the second positions, 1 2 3 -> 0 3 2, lets one rule serve both: the low bit means the
    # middle candidate, else the high bit the last, else it is the first.
    fields = builder.xor(llvm.splat(builder, positions, lanes), per_lane(lambda i: i % 2))
    low, high = any_of(per_lane(lambda i: 1)), any_of(per_lane(lambda i: 2))
    return builder.select(low, middle, builder.select(high, last, first))


# --- the first few of 16 lanes ---------------------------------------------------------------------------------------


def _first(builder: ir.IRBuilder, count: ir.Value, lanes: int = 16) -> ir.Value:
    """Whether a lane (of each 16) is among the first ``count``."""
    count = llvm.splat(builder, builder.trunc(count, INT), lanes)
    return builder.icmp_signed("<", llvm.constant([lane % 16 for lane in range(lanes)]), count)


def _load_first(builder: ir.IRBuilder, args: list[ir.Value]) -> ir.Value:
    """The first ``count`` of 16 elements of memory, and zeros: nothing else is read."""
    memory, index, count = args
    vector = ir.VectorType(memory.type.pointee, 16)
    place, mask = llvm.element(builder, [memory, index], vector), _first(builder, count)
    kind = ir.FunctionType(vector, [place.type, INT, mask.type, vector])
    suffix = {"float": "f32"}.get(str(vector.element), str(vector.element))
    load = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.load.v16{suffix}.p0")
    return builder.call(load, [place, INT(1), mask, ir.Constant(vector, None)])


@intrinsic
def load_first(typingctx, values, index, count):
    """16 lanes: the first ``count`` values from ``values[index]`` on, and zeros."""

    def codegen(context, builder, signature, args):
        return llvm.as_float(builder, _load_first(builder, args), values.dtype)

    return Vector(types.float32, 16)(values, types.intp, types.intp), codegen


@intrinsic
def positions(typingctx, meta, index, count):
    """The same of uint8 metadata."""

    def codegen(context, builder, signature, args):
        return builder.zext(_load_first(builder, args), ir.VectorType(INT, 16))

    return Vector(types.int32, 16)(meta, types.intp, types.intp), codegen


@intrinsic
def fma_first(typingctx, a, b, c, count):
    """``a * b + c`` in the first ``count`` of 16 lanes, ``c`` in the others; more lanes hold several tokens."""

    def codegen(context, builder, signature, args):
        *terms, count = args
        vector = terms[2].type
        function = ir.FunctionType(vector, [vector] * 3)
        name = f"llvm.fmuladd.v{vector.count}f32"
        product = builder.call(cgutils.get_or_insert_function(builder.module, function, name), terms)
        return builder.select(_first(builder, count, vector.count), product, terms[2])

    return c(a, b, c, types.intp), codegen
