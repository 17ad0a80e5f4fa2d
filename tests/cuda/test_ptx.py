"""PTX instructions as data: texts and operands agree, bad arguments are refused, the assembler takes each of them."""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import replace

import pytest

from nmsparse import NMSparseError
from nmsparse.cuda.ptx import arithmetic, barrier, copy, matrix, memory, mma, warp, wgmma
from nmsparse.cuda.ptx.instruction import Instruction

MODULES = {
    "arithmetic": arithmetic,
    "barrier": barrier,
    "copy": copy,
    "matrix": matrix,
    "memory": memory,
    "mma": mma,
    "warp": warp,
    "wgmma": wgmma,
}
# Arguments of the functions that make instructions: every family, both ends of every range.
MADE = {
    "arithmetic.add_scaled": [(1,), (2,), (8,)],
    "arithmetic.add_to_one_of_two": [(1,), (2,), (8,)],
    "barrier.named_barrier": [(32,), (128,), (1024,)],
    "copy.cp_async": [(4,), (8,), (16,)],
    "copy.wait": [(0,), (3,)],
    "copy.bulk_load": [(None,), ("evict_first",), ("evict_last",)],
    "copy.tensor_load": [
        {},
        {"axes": 1},
        {"axes": 5},
        {"axes": 3, "multicast": True},
        {"multicast": True},
        {"hint": "evict_first"},
        {"multicast": True, "hint": "evict_last"},
    ],
    "matrix.ldmatrix": [(1,), (2,), (4,), {"count": 4, "trans": True}],
    "matrix.stmatrix": [(1,), (2,), (4,), {"count": 2, "trans": True}, {"count": 4, "trans": True}],
    "memory.load": [
        ("shared", "u32", 2),
        ("shared", "f32", 4),
        ("global", "u16"),
        ("global", "u64", 2),
        {"space": "global", "kind": "u32", "count": 4, "hint": "nc"},
        {"space": "global", "kind": "u32", "count": 4, "hint": "L1::no_allocate"},
        {"space": "global", "kind": "f32", "hint": "cg"},
        {"space": "global", "kind": "u8", "hint": "nc"},
    ],
    "memory.load_where": [("s32",), ("f32", 2), ("u32", 4)],
    "memory.store": [
        ("global", "u8"),
        ("shared", "u16"),
        ("global", "f32", 4),
        ("global", "s32"),
        {"space": "global", "kind": "u32", "count": 4, "hint": "cs"},
    ],
    "memory.pack": [("f16",), ("bf16",)],
    "memory.read_again": [("tid.x",), ("ctaid.x",)],
    "memory.unpack": [("f16",), ("bf16",)],
    "memory.set_max_registers": [{"count": 24, "grow": False}, {"count": 240, "grow": True}],
    "mma.mma": [("f16",), ("bf16",)],
    "mma.mma_sp": [("f16",), ("bf16",), ("f16", 1)],
    "mma.mma_sp_tile": [("f16", 1, 1), ("bf16", 2, 4), ("f16", 1, 2, 1)],
    "warp.redux": [("max",), ("min",)],
    "warp.shuffle": [("idx", "u32"), ("bfly", "f32"), ("up", "s32")],
    "wgmma.wgmma": [(8, "f16"), (256, "bf16"), {"n": 64, "dtype": "f16", "a_registers": True}],
    "wgmma.wgmma_sp": [(8, "bf16"), (96, "f16"), (256, "f16"), {"n": 64, "dtype": "bf16", "a_registers": True}],
    "wgmma.wait": [(0,), (7,)],
}
REFUSED = {
    "arithmetic.add_scaled": [(0,)],
    "arithmetic.add_to_one_of_two": [(0,)],
    "barrier.named_barrier": [(0,), (100,), (2048,)],
    "copy.cp_async": [(2,), (32,)],
    "copy.bulk_load": [("evict_never",)],
    "copy.tensor_load": [{"hint": "evict_never"}, {"axes": 0}, {"axes": 6}],
    "matrix.ldmatrix": [(3,), (8,)],
    "matrix.stmatrix": [(3,)],
    "memory.load": [("local", "u32"), ("global", "s64"), ("global", "u32", 3)],
    "memory.load_where": [("u32", 3)],
    "memory.store": [("local", "u32"), ("global", "s64"), ("global", "u32", 3)],
    "memory.pack": [("f32",)],
    "memory.read_again": [("clock",)],
    "memory.unpack": [("e4m3",)],
    "memory.set_max_registers": [{"count": 20, "grow": True}, {"count": 44, "grow": False}],
    "mma.mma": [("f32",)],
    "mma.mma_sp": [("tf32",), ("f16", 2)],
    "mma.mma_sp_tile": [("f32", 1, 1), ("f16", 1, 1, 2)],
    "warp.redux": [("add",)],
    "warp.shuffle": [("down", "u32"), ("idx", "u64")],
    "wgmma.wgmma": [(0, "f16"), (12, "f16"), (264, "f16"), (8, "f32")],
    "wgmma.wgmma_sp": [(0, "f16"), (12, "f16"), (264, "f16"), (8, "f32")],
    "wgmma.wait": [(-1,), (8,)],
}


def call(name, arguments):
    module, function = name.split(".")
    maker = getattr(MODULES[module], function)
    return maker(**arguments) if isinstance(arguments, dict) else maker(*arguments)


def instructions():
    """Every instruction by name: the constants, and what the functions make."""
    for module in MODULES:
        for public in MODULES[module].__all__:
            if isinstance(value := getattr(MODULES[module], public), Instruction):
                yield pytest.param(value, id=f"{module}.{public}")
    for name, calls in MADE.items():
        for arguments in calls:
            shown = arguments.values() if isinstance(arguments, dict) else arguments
            yield pytest.param(call(name, arguments), id=f"{name}({', '.join(map(str, shown))})")


every_instruction = pytest.mark.parametrize("instruction", list(instructions()))


def test_every_public_function_is_tried():
    public = {
        f"{module}.{name}": getattr(MODULES[module], name) for module in MODULES for name in MODULES[module].__all__
    }
    assert {name for name, value in public.items() if inspect.isfunction(value)} == set(MADE)


@every_instruction
def test_text_and_operands_agree(instruction):
    first_input = 2 * len(instruction.in_place) or len(instruction.results)
    inputs = range(first_input, first_input + len(instruction.inputs))
    named = {int(number) for number in re.findall(r"\$(\d+)", instruction.text)}
    written = set(range(len(instruction.results or instruction.in_place)))
    assert named - set(inputs) <= set(range(first_input)), "an operand that does not exist"
    assert named >= {*written, *inputs}, "an operand that the text forgets"
    constraints = instruction.constraints.split(",")
    assert len(constraints) - instruction.memory == first_input + len(instruction.inputs) or not constraints[0]
    assert ("~{memory}" in constraints) == instruction.memory
    assert [c for c in constraints if c.isdigit()] == [str(i) for i in range(len(instruction.in_place))]


@every_instruction
def test_it_says_where_it_is_written(instruction):
    assert instruction.section
    assert instruction.text.count("{") == instruction.text.count("}")
    assert instruction.text.rstrip("} ").endswith((";", ":"))


REFUSALS = [pytest.param(name, arguments, id=f"{name}{arguments}") for name in REFUSED for arguments in REFUSED[name]]


@pytest.mark.parametrize(("name", "arguments"), REFUSALS)
def test_bad_arguments_are_refused(name, arguments):
    with pytest.raises(NMSparseError, match=r"expected .* got"):
        call(name, arguments)


def test_an_instruction_has_known_operands():
    with pytest.raises(NMSparseError, match=r"operand type: expected one of .* got 's64'"):
        Instruction("nop;", inputs=("s64",))
    with pytest.raises(NMSparseError, match="expected results or in_place"):
        Instruction("nop;", results=("u32",), in_place=("f32",))


def kernel_of(instruction):
    """A Numba kernel that runs ``instruction`` on numbers it is given, and keeps what comes out."""
    from numba.cuda import types

    from nmsparse.cuda.ptx.numba_glue import callable_of, registers

    names = {"emit": callable_of(instruction), "registers": registers(max(len(instruction.in_place), 1))}
    casts = {"u8": "uint32", "u16": "uint16", "u32": "uint32", "s32": "int32", "u64": "uint64", "f32": "float32"}
    for kind, cast in casts.items():
        names[kind] = getattr(types, cast)
        names[f"put_{kind}"] = callable_of(memory.store("global", kind))
    inputs = [f"{kind}(number)" for kind in instruction.inputs]
    lines = ["def kernel(out_gmem, number):"]
    if instruction.in_place:
        lines += ["acc = registers()", f"for i in range({len(instruction.in_place)}): acc[i] = f32(0)"]
        inputs = ["acc", *inputs]
        kept = [(kind, f"acc[{i}]") for i, kind in enumerate(instruction.in_place)]
    elif len(instruction.results) == 1:
        kept = [(instruction.results[0], "result")]
    else:
        kept = [(kind, f"result[{i}]") for i, kind in enumerate(instruction.results)]
    lines.append(f"{'result = ' if instruction.results else ''}emit({', '.join(inputs)})")
    lines += [f"put_{kind}(out_gmem + u64(8 * {i}), {value})" for i, (kind, value) in enumerate(kept)]
    exec("\n    ".join(lines), names)
    return names["kernel"]


@every_instruction
def test_the_assembler_takes_it(instruction):
    pytest.importorskip("numba_cuda", reason="numba-cuda is not installed", exc_type=ImportError)
    compiler = importlib.import_module("nmsparse.cuda.compiler")
    arch = {75: "sm_80", 80: "sm_80", 90: "sm_90a"}[instruction.arch]
    ptx, _ = compiler.to_ptx(kernel_of(instruction), "pp", arch, threads=128)
    word = next(word for word in re.findall(r"[a-z][\w.:]+", instruction.text) if "." in word and word[0] != ".")
    assert word.replace("reg.", "") in ptx or word in ptx
    code, log = compiler.assemble(ptx, arch)
    assert code[:4] == b"\x7fELF"
    assert "error" not in log


def test_the_assembler_refuses_a_wrong_text():
    pytest.importorskip("numba_cuda", reason="numba-cuda is not installed", exc_type=ImportError)
    compiler = importlib.import_module("nmsparse.cuda.compiler")
    wrong = replace(barrier.init, text="mbarrier.begin.shared::cta.b64 [$0], $1;")
    ptx, _ = compiler.to_ptx(kernel_of(wrong), "pp", "sm_90a", threads=128)
    with pytest.raises(NMSparseError, match="ptxas sm_90a"):
        compiler.assemble(ptx, "sm_90a")
