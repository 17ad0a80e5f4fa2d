"""Vectors as values inside compiled functions: one word, one LLVM instruction or two.

A loop over an array leaves it to the compiler whether and how to vectorise. The inner loops of this backend say it:
``acc = fma(splat(w, 64), load(panel, i, 64), acc)`` keeps 64 tokens in registers, as four AVX-512 registers, eight AVX
or sixteen NEON ones. LLVM cuts a vector to what the machine has; one word alone has a second body for AVX-512.

Memory is an address and an index: ``values = address(array)`` once, then ``load(values, i, 16)``. An address costs no
reference count where it is passed on, which an array does, and so **it keeps nothing alive and checks nothing**: the
caller must hold the array, contiguous and long enough, until the work is done.

Numba's disk cache does not see that a kernel depends on this file: after a change here, delete ``__pycache__``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_ELEMENTS = {types.float32: _FLOAT, types.int32: _INT}
# Arrays of 16-bit floats come as integers whose signedness says which they are: see ``storage``.
_BFLOAT16, _FLOAT16 = types.uint16, types.int16


def _has_avx512() -> bool:
    """Whether Numba compiles for AVX-512 here (its settings can name another CPU than this one)."""
    if config.CPU_FEATURES is not None:
        return "+avx512f" in config.CPU_FEATURES
    return config.CPU_NAME in (None, "host") and bool(get_host_cpu_features().get("avx512f"))


AVX512 = _has_avx512()
CANDIDATES = 2 if AVX512 else 3  # vectors out of which 16 stored values pick


class Vector(types.Type):
    """``lanes`` numbers of one ``element`` type, float32 or int32."""

    def __init__(self, element: types.Type, lanes: int):
        self.element, self.lanes = element, lanes
        super().__init__(name=f"Vector({element}, {lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector):
        super().__init__(manager, vector, ir.VectorType(_ELEMENTS[vector.element], vector.lanes))


# --- from and to memory ------------------------------------------------------------------------------------------------


@intrinsic
def address(typingctx, array):
    """Where the elements of ``array`` start."""

    def codegen(context, builder, signature, args):
        return context.make_array(array)(context, builder, value=args[0]).data

    return types.CPointer(array.dtype)(array), codegen


@intrinsic
def offset(typingctx, memory, index):
    """The address of ``memory[index]``."""

    def codegen(context, builder, signature, args):
        return builder.gep(args[0], [args[1]])

    return memory(memory, types.intp), codegen


@intrinsic(prefer_literal=True)
def load(typingctx, memory, index, lanes):
    """``lanes`` elements from ``memory[index]`` on; 16-bit floats become float32."""
    n, stored = lanes.literal_value, memory.dtype
    signature = Vector(types.int32 if stored == types.int32 else types.float32, n)(memory, types.intp, lanes)

    def codegen(context, builder, signature, args):
        loaded = ir.VectorType(context.get_value_type(stored), n)
        value = builder.load(_element(builder, args, loaded), align=stored.bitwidth // 8)
        if stored == _BFLOAT16:
            wide = builder.zext(value, ir.VectorType(_INT, n))
            return builder.bitcast(builder.shl(wide, _constant([16] * n)), ir.VectorType(_FLOAT, n))
        if stored == _FLOAT16:
            return _from_half(builder, value, n)
        return value

    return signature, codegen


@intrinsic
def store(typingctx, memory, index, vector):
    """Write ``vector`` from ``memory[index]`` on."""

    def codegen(context, builder, signature, args):
        builder.store(args[2], _element(builder, args, args[2].type), align=4)
        return context.get_dummy_value()

    return types.void(memory, types.intp, vector), codegen


@intrinsic
def at(typingctx, memory, index):
    """``memory[index]``, an element as it is."""

    def codegen(context, builder, signature, args):
        return builder.load(builder.gep(args[0], [args[1]]))

    return memory.dtype(memory, types.intp), codegen


@intrinsic
def put(typingctx, memory, index, scalar):
    """``memory[index] = scalar``."""

    def codegen(context, builder, signature, args):
        builder.store(args[2], builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.void(memory, types.intp, memory.dtype), codegen


@intrinsic
def word(typingctx, meta, index):
    """Two neighbouring words of uint16 metadata as one uint32: the 2-bit positions of 16 stored values."""

    def codegen(context, builder, signature, args):
        return builder.load(_element(builder, args, _INT), align=2)

    return types.uint32(meta, types.intp), codegen


@intrinsic
def prefetch(typingctx, memory, index):
    """Ask for the cache line of ``memory[index]``, which may lie beyond the end of the array."""

    def codegen(context, builder, signature, args):
        byte = _element(builder, args, ir.IntType(8))
        function = ir.FunctionType(ir.VoidType(), [byte.type, _INT, _INT, _INT])
        read, everywhere, data = _INT(0), _INT(3), _INT(1)
        name = "llvm.prefetch.p0"
        builder.call(
            cgutils.get_or_insert_function(builder.module, function, name), [byte, read, everywhere, data]
        )
        return context.get_dummy_value()

    return types.void(memory, types.intp), codegen


# --- making vectors ----------------------------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def splat(typingctx, scalar, lanes):
    """``lanes`` copies of a float32."""

    def codegen(context, builder, signature, args):
        return _splat(builder, args[0], lanes.literal_value)

    return Vector(types.float32, lanes.literal_value)(types.float32, lanes), codegen


@intrinsic(prefer_literal=True)
def repeat(typingctx, vector, times):
    """The vector, ``times`` times over: ``[a b] -> [a b a b …]``."""
    n, total = vector.lanes, vector.lanes * times.literal_value

    def codegen(context, builder, signature, args):
        return _shuffle(builder, args[0], [lane % n for lane in range(total)])

    return Vector(vector.element, total)(vector, times), codegen


@intrinsic(prefer_literal=True)
def widen(typingctx, vector, lanes):
    """The vector, with zeros after it up to ``lanes``."""
    n, total = vector.lanes, lanes.literal_value

    def codegen(context, builder, signature, args):
        zeros = ir.Constant(args[0].type, None)
        order = [min(lane, n) for lane in range(total)]  # lane n is the first of the zeros
        return builder.shuffle_vector(args[0], zeros, _constant(order))

    return Vector(vector.element, total)(vector, lanes), codegen


# --- arithmetic --------------------------------------------------------------------------------------------------------


@intrinsic
def fma(typingctx, a, b, c):
    """``a * b + c``, in one rounding where the machine can."""

    def codegen(context, builder, signature, args):
        vector = args[0].type
        function = ir.FunctionType(vector, [vector] * 3)
        return builder.call(
            cgutils.get_or_insert_function(builder.module, function, f"llvm.fmuladd.v{vector.count}f32"), args
        )

    return a(a, b, c), codegen


@intrinsic
def add(typingctx, a, b):
    """``a + b``, lane by lane."""

    def codegen(context, builder, signature, args):
        return builder.fadd(*args)

    return a(a, b), codegen


@intrinsic
def lane_sums(typingctx, memory, index):
    """The sums of the lanes of 16 vectors of 16 lanes that follow each other from ``memory[index]`` on."""

    def codegen(context, builder, signature, args):
        first = _element(builder, args, ir.VectorType(_FLOAT, 16))
        vectors = [builder.load(builder.gep(first, [_INT(i)]), align=4) for i in range(16)]
        # Each step adds the halves of what is left of two vectors and puts the results side by side: 16, 8, 4, 2, 1.
        owners = [[i] * 16 for i in range(16)]  # which vector each lane is a part of the sum of
        while len(vectors) > 1:
            part = 16 // (32 // len(vectors))  # lanes that are to be left of each sum
            low = [base + lane for base in range(0, 32, 2 * part) for lane in range(part)]
            high = [lane + part for lane in low]
            half = len(vectors) // 2
            vectors = [
                builder.fadd(
                    builder.shuffle_vector(a, b, _constant(low)), builder.shuffle_vector(a, b, _constant(high))
                )
                for a, b in zip(vectors[:half], vectors[half:], strict=True)
            ]
            owners = [[(a + b)[lane] for lane in low] for a, b in zip(owners[:half], owners[half:], strict=True)]
        return _shuffle(builder, vectors[0], [owners[0].index(i) for i in range(16)])

    return Vector(types.float32, 16)(memory, types.intp), codegen


@intrinsic
def scalar(typingctx, vector):
    """The only lane of a vector of one."""

    def codegen(context, builder, signature, args):
        return builder.extract_element(args[0], _INT(0))

    return types.float32(vector), codegen


# --- the two metadata bits ---------------------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def candidates(typingctx, memory, index, lanes):
    """What the values of a block can meet, for :func:`pick`: ``CANDIDATES`` vectors from ``memory[index]`` on."""
    vector = Vector(memory.dtype, lanes.literal_value)
    signature = types.UniTuple(vector, CANDIDATES)(memory, types.intp, lanes)

    def codegen(context, builder, signature, args):
        loaded = ir.VectorType(_ELEMENTS[vector.element], vector.lanes)
        first = _element(builder, args, loaded)
        vectors = [builder.load(builder.gep(first, [_INT(i)]), align=4) for i in range(CANDIDATES)]
        return context.make_tuple(builder, signature.return_type, vectors)

    return signature, codegen


@intrinsic
def pick(typingctx, positions, candidates):
    """What each of the 16 stored values of a block meets: field i of ``positions``, sixteen 2-bit fields, says which.

    ``candidates`` (laid out by ``planes``) of more than 16 lanes hold several tokens: field i serves lanes i, i + 16, ….
    """
    vector = candidates.dtype

    def codegen(context, builder, signature, args):
        choose = _permute if CANDIDATES == 2 else _blend
        return choose(builder, args[0], cgutils.unpack_tuple(builder, args[1]))

    return vector(types.uint32, candidates), codegen


def _permute(builder: ir.IRBuilder, positions: ir.Value, candidates: list[ir.Value]) -> ir.Value:
    """Out of the 32 columns themselves, with the one AVX-512 instruction that is worth a name of its own here."""
    fields = builder.lshr(_splat(builder, positions, 16), _constant([2 * i for i in range(16)]))
    column = builder.or_(builder.and_(fields, _constant([3] * 16)), _constant([i // 2 * 4 for i in range(16)]))
    vector = ir.VectorType(candidates[0].type.element, 16)
    suffix = "ps" if isinstance(vector.element, ir.FloatType) else "d"
    instruction = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(vector, [vector, column.type, vector]),
        f"llvm.x86.avx512.vpermi2var.{suffix}.512",
    )
    tokens = [range(t, t + 16) for t in range(0, candidates[0].type.count, 16)]
    picked = [
        builder.call(instruction, [_shuffle(builder, low, t), column, _shuffle(builder, high, t)])
        for low, high in [candidates]
        for t in tokens
    ]
    while len(picked) > 1:
        both = _constant(list(range(2 * picked[0].type.count)))
        picked = [builder.shuffle_vector(a, b, both) for a, b in zip(picked[::2], picked[1::2], strict=True)]
    return picked[0]


def _blend(builder: ir.IRBuilder, positions: ir.Value, candidates: list[ir.Value]) -> ir.Value:
    """Out of three: positions ascend, so the first of a group is 0, 1 or 2 and the second 1, 2 or 3."""
    first, middle, last = candidates
    lanes = first.type.count

    def per_lane(bits: Callable[[int], int]) -> ir.Constant:
        return _constant([bits(lane % 16) << 2 * (lane % 16) for lane in range(lanes)])

    def any_of(bits: ir.Constant) -> ir.Value:
        return builder.icmp_unsigned("!=", builder.and_(fields, bits), per_lane(lambda i: 0))

    # Inverting the low bit of the second positions, 1 2 3 -> 0 3 2, lets one rule serve both: the low bit means the
    # middle candidate, else the high bit the last, else it is the first.
    fields = builder.xor(_splat(builder, positions, lanes), per_lane(lambda i: i % 2))
    low, high = any_of(per_lane(lambda i: 1)), any_of(per_lane(lambda i: 2))
    return builder.select(low, middle, builder.select(high, last, first))


# --- threads -----------------------------------------------------------------------------------------------------------


@intrinsic
def increment(typingctx, memory, index):
    """``memory[index]++`` as one step that no other thread can come between; the number it was before."""

    def codegen(context, builder, signature, args):
        one = ir.Constant(ir.IntType(64), 1)
        return builder.atomic_rmw("add", builder.gep(args[0], [args[1]]), one, "seq_cst")

    return types.int64(memory, types.intp), codegen


@intrinsic
def receive(typingctx, memory, index):
    """``memory[index]``; whoever incremented it to this has done all that it did before."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(builder.gep(args[0], [args[1]]), "acquire", align=8)

    return types.int64(memory, types.intp), codegen


# --- LLVM, in short ----------------------------------------------------------------------------------------------------


def _element(builder: ir.IRBuilder, args: list, element: ir.Type) -> ir.Value:
    """Where the ``memory, index`` that head ``args`` point, as a pointer to ``element``."""
    return builder.bitcast(builder.gep(args[0], [args[1]]), element.as_pointer())


def _constant(numbers: list[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(_INT, len(numbers)), numbers)


def _shuffle(builder: ir.IRBuilder, vector: ir.Value, lanes: Any) -> ir.Value:
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), _constant(list(lanes)))


def _splat(builder: ir.IRBuilder, scalar: ir.Value, lanes: int) -> ir.Value:
    vector = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    return _shuffle(builder, builder.insert_element(vector, scalar, _INT(0)), [0] * lanes)


def _from_half(builder: ir.IRBuilder, half: ir.Value, n: int) -> ir.Value:
    """IEEE half to single, in integers: not every machine has the instruction, and LLVM would call a C function."""
    floats = ir.VectorType(_FLOAT, n)
    # Sign and magnitude move to where a float has them (and a sign extension fills what the mask clears).
    bits = builder.shl(builder.sext(half, ir.VectorType(_INT, n)), _constant([13] * n))
    bits = builder.and_(bits, _constant([0x8FFFE000 - 2**32] * n))
    # The exponent is 112 too small. Multiplying mends it for subnormals too.
    value = builder.fmul(builder.bitcast(bits, floats), ir.Constant(floats, [2.0**112] * n))
    # The largest exponent means inf or NaN in either.
    top = builder.and_(bits, _constant([0x0F800000] * n))
    special = builder.icmp_unsigned("==", top, _constant([0x0F800000] * n))
    raised = builder.or_(builder.bitcast(value, bits.type), _constant([0x7F800000] * n))
    return builder.bitcast(builder.select(special, raised, builder.bitcast(value, bits.type)), floats)
