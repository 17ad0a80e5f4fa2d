"""Instructions as functions that Numba CUDA compiles: the only file that knows LLVM."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.cuda import types

from .instruction import Instruction

try:
    from numba.cuda.extending import intrinsic, overload
except ImportError as error:  # numba has a numba.cuda of its own, without these
    raise ImportError(
        "GPU kernels are compiled by numba-cuda; install it with: python -m pip install 'nmsparse[cuda13]'"
    ) from error

__all__ = ["address_of", "callable_of", "registers", "teach"]

NUMBA = {
    "u8": types.uint32,  # bytes come in registers of 32 bits
    "u16": types.uint16,
    "u32": types.uint32,
    "s32": types.int32,
    "u64": types.uint64,
    "f32": types.float32,
}
LLVM = {
    "u8": ir.IntType(32),
    "u16": ir.IntType(16),
    "u32": ir.IntType(32),
    "s32": ir.IntType(32),
    "u64": ir.IntType(64),
    "f32": ir.FloatType(),
}


def callable_of(instruction: Instruction, first: int = 0, places: Sequence[int] = ()) -> Callable[..., Any]:
    """A Numba CUDA function that emits ``instruction``.

    Its arguments are the inputs; for instructions with ``in_place`` operands a local array comes first, whose elements
    at ``places``, or from ``first`` on, are the accumulators. They are read and written with constant indices only, so
    the array stays in registers. One result comes back as a scalar, several as a tuple.
    """
    places = places or range(first, first + len(instruction.in_place))
    arity = len(instruction.inputs) + bool(instruction.in_place)

    def typed(typingctx: Any, *operands: Any) -> Any:
        accumulator = operands[:1] if instruction.in_place else ()
        inputs = [NUMBA[kind] for kind in instruction.inputs]
        results = [NUMBA[kind] for kind in instruction.results]
        result = types.void if not results else results[0] if len(results) == 1 else types.Tuple(results)
        return result(*accumulator, *inputs), lambda *args: _emit(instruction, places, *args)

    # Numba reads the number of arguments off the signature.
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = ["typingctx", *(f"operand{i}" for i in range(arity))]
    typed.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
    return intrinsic(typed)


def _emit(
    instruction: Instruction, elements: Sequence[int], context: Any, builder: ir.IRBuilder, signature: Any, args: Any
) -> Any:
    places, args = [], list(args)
    if instruction.in_place:
        array = context.make_array(signature.args[0])(context, builder, value=args.pop(0))
        places = [builder.gep(array.data, [ir.Constant(ir.IntType(32), i)]) for i in elements]
    written = [LLVM[kind] for kind in instruction.results or instruction.in_place]
    returned = ir.VoidType() if not written else written[0] if len(written) == 1 else ir.LiteralStructType(written)
    operands = [builder.load(place) for place in places] + args
    function = ir.FunctionType(returned, [operand.type for operand in operands])
    text = ir.InlineAsm(function, instruction.text, instruction.constraints, side_effect=instruction.memory)
    value = builder.call(text, operands, attrs=("convergent",) if instruction.convergent else ())
    for i, place in enumerate(places):
        builder.store(builder.extract_value(value, i) if len(places) > 1 else value, place)
    if not instruction.results:
        return context.get_dummy_value()
    if len(written) == 1:
        return value
    return context.make_tuple(
        builder, signature.return_type, [builder.extract_value(value, i) for i in range(len(written))]
    )


@intrinsic
def address_of(typingctx: Any, array: Any) -> Any:
    """Generic address of an array's first element."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, value=args[0]).data
        return builder.ptrtoint(data, ir.IntType(64))

    return types.uint64(array), codegen


def registers(count: int, kind: str = "f32") -> Callable[[], Any]:
    """A function that returns a fresh array of ``count`` elements, such as the ``in_place`` operands want.

    What ``cuda.local.array`` is, but usable inside a device function that returns it.
    """
    array_type = types.Array(NUMBA[kind], 1, "C")

    @intrinsic
    def array(typingctx: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            with builder.goto_entry_block():
                place = builder.alloca(ir.ArrayType(LLVM[kind], count))
            array = context.make_array(array_type)(context, builder)
            size = context.get_constant(types.intp, count), context.get_constant(types.intp, 4)
            context.populate_array(
                array,
                data=builder.bitcast(place, array.data.type),
                shape=size[:1],
                strides=size[1:],
                itemsize=size[1],
                meminfo=None,
            )
            return array._getvalue()

        return array_type(), codegen

    return array


def teach(function: Callable[..., Any], implementation: Callable[..., Any] | None = None) -> None:
    """Let kernels call the plain Python ``function``: compiled as it is, or as ``implementation``."""
    source = implementation or function
    chooser: Any = lambda *args: source  # noqa: E731  (a def would hide the signature set below)
    chooser.__signature__ = inspect.signature(function)
    overload(function, inline="never")(chooser)
