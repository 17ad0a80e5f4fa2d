"""Warp matrix multiply-accumulate with a 2:4 sparse A: 32 threads, every operand in registers, sm_80 and later.

``D[m, n] += Σ_k A[m, k] · B[k, n]`` for 16 rows, 8 columns and 32 dense k; who holds what:
:mod:`nmsparse.formats.fragments`. Source: PTX ISA, "Warp Level Matrix Multiply-Accumulate with sparse matrix A".
"""

from __future__ import annotations

from .instruction import Instruction, one_of

__all__ = ["mma", "mma_sp", "mma_sp_tile"]

DTYPES = ("f16", "bf16")


def mma_sp(dtype: str, selector: int = 0) -> Instruction:
    """``m16n8k32``. Inputs: 4 registers of A (stored 16×16), 4 of B, metadata from the lanes of ``selector``.

    The ``ordered_metadata`` form asks for ascending positions, which the canonical metadata has, and is the one that
    runs at full rate.

    >>> mma_sp("f16").inputs == ("u32",) * 9
    True
    """
    one_of(dtype, DTYPES, "mma.sp dtype")
    one_of(selector, (0, 1), "sparsity selector")
    return Instruction(
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{dtype}.{dtype}.f32 "
        f"{{$0, $1, $2, $3}}, {{$8, $9, $10, $11}}, {{$12, $13, $14, $15}}, {{$4, $5, $6, $7}}, $16, 0x{selector};",
        in_place=("f32",) * 4,
        inputs=("u32",) * 9,
        memory=False,
        section="mma.sp",
    )


def mma_sp_tile(dtype: str, high: int, wide: int, selector: int = 0) -> Instruction:
    """``high × wide`` times ``m16n8k32``: a tile of ``16·high`` rows by ``8·wide`` columns.

    Accumulators row by row of instructions, 4 each. Inputs: 4 registers of A for each row, 4 of B for each column, a
    metadata register for each row.

    >>> tile = mma_sp_tile("f16", 2, 4)
    >>> len(tile.in_place), len(tile.inputs), tile.text.count("mma.sp")
    (32, 26, 8)
    """
    one_of(dtype, DTYPES, "mma.sp dtype")
    one_of(selector, (0, 1), "sparsity selector")
    sums = 4 * high * wide
    a, b, meta = 2 * sums, 2 * sums + 4 * high, 2 * sums + 4 * (high + wide)  # the sums stand twice: out and in

    def four(first: int) -> str:
        return f"{{${first}, ${first + 1}, ${first + 2}, ${first + 3}}}"

    def one(i: int, j: int) -> str:
        acc = 4 * (i * wide + j)
        return (
            f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{dtype}.{dtype}.f32 "
            f"{four(acc)}, {four(a + 4 * i)}, {four(b + 4 * j)}, {four(sums + acc)}, ${meta + i}, 0x{selector};"
        )

    return Instruction(
        " ".join(one(i, j) for i in range(high) for j in range(wide)),
        in_place=("f32",) * sums,
        inputs=("u32",) * (4 * (high + wide) + high),
        memory=False,
        section="mma.sp",
    )


def mma(dtype: str) -> Instruction:
    """The dense ``m16n8k16``. Inputs: 4 registers of A, 2 of B.

    >>> len(mma("bf16").inputs)
    6
    """
    one_of(dtype, DTYPES, "mma dtype")
    return Instruction(
        f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 "
        "{$0, $1, $2, $3}, {$8, $9, $10, $11}, {$12, $13}, {$4, $5, $6, $7};",
        in_place=("f32",) * 4,
        inputs=("u32",) * 6,
        memory=False,
        section="mma",
    )
