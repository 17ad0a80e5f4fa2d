"""What a PTX instruction is, as data: its text, its operands and what it touches. No front end is imported here.

Operands are numbered ``$0, $1, …``: results first, then operands that are read and written in place, then the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import NMSparseError

__all__ = ["CONSTRAINTS", "Instruction", "check", "one_of"]

# Register classes of inline assembly, by the type of the operand.
CONSTRAINTS = {"u8": "r", "u16": "h", "u32": "r", "s32": "r", "u64": "l", "f32": "f"}


@dataclass(frozen=True)
class Instruction:
    """One PTX instruction, or the few lines that only make sense together (a wait and its loop).

    ``results`` are the types of the values that it returns, ``in_place`` of the registers that it updates (an
    accumulator), ``inputs`` of the operands it reads; all are keys of :data:`CONSTRAINTS`. ``memory`` says that it
    touches memory or orders accesses, so nothing may move across it; ``section`` names its place in the PTX ISA and
    ``arch`` the first architecture that has it. ``convergent``: all lanes of a warp execute it together, so it may not
    move into a branch.

    >>> add = Instruction("add.u32 $0, $1, $2;", results=("u32",), inputs=("u32", "u32"), memory=False)
    >>> add.constraints
    '=r,r,r'
    """

    text: str
    results: tuple[str, ...] = ()
    in_place: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    memory: bool = True
    section: str = ""
    arch: int = 80
    convergent: bool = False

    def __post_init__(self) -> None:
        for kind in (*self.results, *self.in_place, *self.inputs):
            one_of(kind, CONSTRAINTS, "operand type")
        check(not (self.results and self.in_place), "Instruction: expected results or in_place operands, got both")

    @property
    def constraints(self) -> str:
        """The operands' constraints as LLVM and GCC write them: outputs, operands tied to them, inputs, clobbers."""
        written = self.results or self.in_place
        parts = [f"={CONSTRAINTS[kind]}" for kind in written]
        parts += [str(i) for i in range(len(self.in_place))]
        parts += [CONSTRAINTS[kind] for kind in self.inputs]
        return ",".join([*parts, "~{memory}"] if self.memory else parts)


def check(holds: bool, message: str) -> None:
    """Raise :class:`~nmsparse.errors.NMSparseError` with ``message`` unless ``holds``."""
    if not holds:
        raise NMSparseError(message)


def one_of(value: object, allowed: object, what: str) -> object:
    """``value`` if it is among ``allowed``; else an error that lists them.

    >>> one_of("bf16", ("f16", "bf16"), "dtype")
    'bf16'
    """
    check(value in allowed, f"{what}: expected one of {', '.join(map(str, allowed))}, got {value!r}")
    return value
