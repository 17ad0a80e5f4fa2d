"""Between the lanes of a warp: shuffles and reductions, by all 32 lanes at one place of the program.

Source: PTX ISA, "Data Movement and Conversion Instructions: shfl.sync", "Parallel Synchronization: redux.sync".
"""

from __future__ import annotations

from .instruction import Instruction, one_of

__all__ = ["redux", "shuffle"]

CLAMP = {"idx": 31, "bfly": 31, "up": 0}


def shuffle(mode: str, kind: str) -> Instruction:
    """A register of another lane. Inputs: this lane's, and which lane: its number ("idx"), the bits in which it differs
    ("bfly"), or how far below it is ("up", where a lane that has none gets its own).

    >>> shuffle("idx", "f32").text
    'shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;'
    """
    one_of(mode, CLAMP, "shuffle mode")
    one_of(kind, ("u32", "s32", "f32"), "register of a shuffle")
    return Instruction(
        f"shfl.sync.{mode}.b32 $0, $1, $2, {CLAMP[mode]}, 0xffffffff;",
        results=(kind,),
        inputs=(kind, "u32"),
        section="shfl.sync",
        convergent=True,
    )


def redux(operation: str) -> Instruction:
    """The "max" or the "min" of an unsigned register over the lanes, which all get it.

    >>> redux("max").text
    'redux.sync.max.u32 $0, $1, 0xffffffff;'
    """
    one_of(operation, ("max", "min"), "reduction")
    return Instruction(
        f"redux.sync.{operation}.u32 $0, $1, 0xffffffff;",
        results=("u32",),
        inputs=("u32",),
        section="redux.sync",
        convergent=True,
    )
