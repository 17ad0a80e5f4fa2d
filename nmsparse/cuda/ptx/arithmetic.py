"""Arithmetic on registers: under a predicate, fused, and the approximations of the special function unit.

Source: PTX ISA, "Floating Point Instructions: add, fma, ex2, rcp", "Predicated Execution".
"""

from __future__ import annotations

from .instruction import Instruction, check

__all__ = ["add_scaled", "add_to_one_of_two", "exp2", "reciprocal"]

# To 2 and 1 units in the last place. Subnormal numbers become 0: one instruction each, where to keep them takes five.
exp2 = Instruction("ex2.approx.ftz.f32 $0, $1;", results=("f32",), inputs=("f32",), memory=False, section="ex2")
reciprocal = Instruction("rcp.approx.ftz.f32 $0, $1;", results=("f32",), inputs=("f32",), memory=False, section="rcp")


def add_to_one_of_two(count: int) -> Instruction:
    """``odd[i] += value[i]`` if the choice is not 0, else ``even[i] += value[i]``, for ``count`` numbers.

    In place: the even ones, then the odd ones. Inputs: the values, the choice. Two predicated additions take half the
    time of two selects, which run on a unit that is half as wide.

    >>> add_to_one_of_two(1).text
    '{ .reg .pred odd; setp.ne.u32 odd, $5, 0; @!odd add.f32 $0, $0, $4; @odd add.f32 $1, $1, $4; }'
    """
    check(count > 0, f"add_to_one_of_two: expected 1 number or more, got {count}")
    adds = " ".join(
        f"@!odd add.f32 ${i}, ${i}, ${4 * count + i}; @odd add.f32 ${count + i}, ${count + i}, ${4 * count + i};"
        for i in range(count)
    )
    return Instruction(
        f"{{ .reg .pred odd; setp.ne.u32 odd, ${5 * count}, 0; {adds} }}",
        in_place=("f32",) * 2 * count,
        inputs=("f32",) * count + ("u32",),
        section="add",
    )


def add_scaled(count: int) -> Instruction:
    """``sum[i] += scale * value[i]``, rounded once, for ``count`` numbers. In place: the sums. Inputs: the values, the
    scale.

    >>> add_scaled(1).text
    'fma.rn.f32 $0, $3, $2, $0;'
    """
    check(count > 0, f"add_scaled: expected 1 number or more, got {count}")
    text = " ".join(f"fma.rn.f32 ${i}, ${3 * count}, ${2 * count + i}, ${i};" for i in range(count))
    return Instruction(text, in_place=("f32",) * count, inputs=("f32",) * (count + 1), section="fma")
