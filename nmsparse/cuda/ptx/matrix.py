"""8×8 matrices of 16-bit elements between shared memory and registers.

A matrix in registers: lane 4r+c holds row r, columns 2c and 2c+1, in one 32-bit register. In shared memory it is
eight rows of 16 bytes, each at its own address: lane 8i+r gives the address of row r of matrix i.
Source: PTX ISA, "ldmatrix", "stmatrix", "movmatrix".
"""

from __future__ import annotations

from .instruction import Instruction, one_of

__all__ = ["ldmatrix", "movmatrix_trans", "stmatrix"]


def ldmatrix(count: int, *, trans: bool = False) -> Instruction:
    """``count`` (1, 2, 4) matrices from shared memory; ``trans`` transposes each.

    >>> ldmatrix(2).text
    'ldmatrix.sync.aligned.m8n8.x2.shared.b16 {$0, $1}, [$2];'
    """
    one_of(count, (1, 2, 4), "ldmatrix count")
    registers = ", ".join(f"${i}" for i in range(count))
    return Instruction(
        f"ldmatrix.sync.aligned.m8n8.x{count}{'.trans' * trans}.shared.b16 {{{registers}}}, [${count}];",
        results=("u32",) * count,
        inputs=("u32",),
        section="ldmatrix",
    )


def stmatrix(count: int, *, trans: bool = False) -> Instruction:
    """``count`` (1, 2, 4) matrices to shared memory; ``trans`` transposes each. Inputs: the address, the registers.

    >>> stmatrix(1, trans=True).text
    'stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [$0], {$1};'
    """
    one_of(count, (1, 2, 4), "stmatrix count")
    registers = ", ".join(f"${i + 1}" for i in range(count))
    return Instruction(
        f"stmatrix.sync.aligned.m8n8.x{count}{'.trans' * trans}.shared.b16 [$0], {{{registers}}};",
        inputs=("u32",) * (count + 1),
        section="stmatrix",
        arch=90,
    )


# The transpose of a matrix that stays in registers.
movmatrix_trans = Instruction(
    "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", results=("u32",), inputs=("u32",), section="movmatrix", arch=75
)
