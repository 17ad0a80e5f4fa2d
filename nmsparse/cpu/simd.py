"""Vectors as values inside compiled functions: one word, one LLVM instruction or two.

A loop over an array leaves it to the compiler whether and how to vectorise. The inner loops of this backend say it:
``acc = fma(splat(w, 64), load(panel, i, 64), acc)`` keeps 64 tokens in registers, as four AVX-512 registers, eight AVX
or sixteen NEON ones. LLVM cuts a vector to what the machine has: no instruction set has a name here.

Memory is an address and an index: ``values = address(array)`` once, then ``load(values, i, 16)``. An address costs no
reference count where it is passed on, which an array does, and so **it keeps nothing alive and checks nothing**: the
caller must hold the array, contiguous and long enough, until the work is done.

Numba's disk cache sees only the file that a kernel stands in: after a change to what it calls, delete ``__pycache__``.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from . import llvm
from .llvm import FLOAT, INT, LONG, Vector

# --- from and to memory ----------------------------------------------------------------------------------------------


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
        value = builder.load(llvm.element(builder, args, loaded), align=stored.bitwidth // 8)
        return llvm.as_float(builder, value, stored)

    return signature, codegen


@intrinsic
def store(typingctx, memory, index, vector):
    """Write ``vector`` from ``memory[index]`` on."""

    def codegen(context, builder, signature, args):
        builder.store(args[2], llvm.element(builder, args, args[2].type), align=4)
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
def prefetch(typingctx, memory, index):
    """Ask for the cache line of ``memory[index]``, which may lie beyond the end of the array."""

    def codegen(context, builder, signature, args):
        byte = llvm.element(builder, args, ir.IntType(8))
        function = ir.FunctionType(ir.VoidType(), [byte.type, INT, INT, INT])
        read, everywhere, data = INT(0), INT(3), INT(1)
        name = "llvm.prefetch.p0"
        builder.call(cgutils.get_or_insert_function(builder.module, function, name), [byte, read, everywhere, data])
        return context.get_dummy_value()

    return types.void(memory, types.intp), codegen


# --- making vectors --------------------------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def splat(typingctx, scalar, lanes):
    """``lanes`` copies of a float32."""

    def codegen(context, builder, signature, args):
        return llvm.splat(builder, args[0], lanes.literal_value)

    return Vector(types.float32, lanes.literal_value)(types.float32, lanes), codegen


@intrinsic(prefer_literal=True)
def repeat(typingctx, vector, times):
    """The vector, ``times`` times over: ``[a b] -> [a b a b …]``."""
    n, total = vector.lanes, vector.lanes * times.literal_value

    def codegen(context, builder, signature, args):
        return llvm.shuffle(builder, args[0], [lane % n for lane in range(total)])

    return Vector(vector.element, total)(vector, times), codegen


@intrinsic(prefer_literal=True)
def widen(typingctx, vector, lanes):
    """The vector, with zeros after it up to ``lanes``."""
    n, total = vector.lanes, lanes.literal_value

    def codegen(context, builder, signature, args):
        zeros = ir.Constant(args[0].type, None)
        order = [min(lane, n) for lane in range(total)]  # lane n is the first of the zeros
        return builder.shuffle_vector(args[0], zeros, llvm.constant(order))

    return Vector(vector.element, total)(vector, lanes), codegen


# --- arithmetic ------------------------------------------------------------------------------------------------------


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
        return builder.fadd(*args) if a.element == types.float32 else builder.add(*args)

    return a(a, b), codegen


@intrinsic
def lane_sums(typingctx, memory, index):
    """The sums of the lanes of 16 vectors of 16 lanes that follow each other from ``memory[index]`` on."""

    def codegen(context, builder, signature, args):
        first = llvm.element(builder, args, ir.VectorType(FLOAT, 16))
        vectors = [builder.load(builder.gep(first, [INT(i)]), align=4) for i in range(16)]
        # Each step adds the halves of what is left of two vectors and puts the results side by side: 16, 8, 4, 2, 1.
        owners = [[i] * 16 for i in range(16)]  # which vector each lane is a part of the sum of
        while len(vectors) > 1:
            part = 16 // (32 // len(vectors))  # lanes that are to be left of each sum
            low = [base + lane for base in range(0, 32, 2 * part) for lane in range(part)]
            high = [lane + part for lane in low]
            half = len(vectors) // 2
            vectors = [
                builder.fadd(
                    builder.shuffle_vector(a, b, llvm.constant(low)), builder.shuffle_vector(a, b, llvm.constant(high))
                )
                for a, b in zip(vectors[:half], vectors[half:], strict=True)
            ]
            owners = [[(a + b)[lane] for lane in low] for a, b in zip(owners[:half], owners[half:], strict=True)]
        return llvm.shuffle(builder, vectors[0], [owners[0].index(i) for i in range(16)])

    return Vector(types.float32, 16)(memory, types.intp), codegen


@intrinsic
def number(typingctx, stored):
    """A stored element (see ``storage``) as the float32 that it is."""

    def codegen(context, builder, signature, args):
        one = ir.Constant(ir.VectorType(args[0].type, 1), ir.Undefined)
        value = llvm.as_float(builder, builder.insert_element(one, args[0], INT(0)), stored)
        return builder.extract_element(value, INT(0))

    return types.float32(stored), codegen


# --- sixteen vectors at once -----------------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def transpose(typingctx, source, rows, column, target, start, stride, side):
    """``target[start + c * stride + r] = source[rows[r] + column + c]``, r and c below ``side`` (a power of 2)."""
    n = side.literal_value

    def codegen(context, builder, signature, args):
        memory, places, left, target, start, stride, _ = args
        square = ir.VectorType(FLOAT, n)
        vectors = []
        for r in range(n):
            place = builder.load(builder.gep(places, [LONG(r)]))
            vectors.append(builder.load(llvm.element(builder, [memory, builder.add(place, left)], square), align=4))
        # Zipping the first half of the vectors with the second brings each element one bit of its row nearer.
        low, high = ([lane // 2 + lane % 2 * n + half for lane in range(n)] for half in (0, n // 2))
        for _ in range(n.bit_length() - 1):
            pairs = list(zip(vectors[: n // 2], vectors[n // 2 :], strict=True))
            vectors = [builder.shuffle_vector(a, b, llvm.constant(part)) for a, b in pairs for part in (low, high)]
        for vector in vectors:
            builder.store(vector, llvm.element(builder, [target, start], square), align=4)
            start = builder.add(start, stride)
        return context.get_dummy_value()

    integer = types.intp
    return types.void(source, rows, integer, target, integer, integer, side), codegen
