"""Sparsity patterns: what may be kept, as numbers. The one place that parses pattern strings."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import ClassVar

from ..errors import NMSparseError

SYNTAX = "'n:m' (as in '2:4'), 'vnm:V:2:M' (as in 'vnm:64:2:8') or 'samoyeds:N:M:V' (as in 'samoyeds:1:2:128')"


@dataclass(frozen=True)
class Pattern:
    """A sparsity pattern along the last axis of a weight; one subclass per format.

    ``format`` names the array class, ``density`` is the stored fraction of a weight whose sizes divide evenly, and
    ``rows`` is how many consecutive rows are decided together (a row count that is no multiple of it is padded).
    """

    format: ClassVar[str]

    @property
    def density(self) -> float:
        raise NotImplementedError

    @property
    def rows(self) -> int:
        return 1

    def rule(self, row: int, col: int) -> str:
        """What the pattern allows around one element, in words (for error messages)."""
        raise NotImplementedError

    def _require(self, condition: bool, expected: str) -> None:
        if not condition:
            raise NMSparseError(f"pattern {self}: expected {expected}; write it as {SYNTAX}")


@dataclass(frozen=True)
class NM(Pattern):
    """``n`` of every ``m`` consecutive columns of a row are kept.

    >>> str(NM(2, 4)), NM(2, 4).density
    ('2:4', 0.5)
    """

    n: int
    m: int
    format: ClassVar[str] = "nm"

    def __post_init__(self) -> None:
        # Positions inside a group are stored in a byte.
        self._require(1 <= self.n <= self.m <= 256, "1 <= n <= m <= 256")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def density(self) -> float:
        return self.n / self.m

    def rule(self, row: int, col: int) -> str:
        first = col // self.m * self.m
        return f"{self} keeps {self.n} of columns {first}..{first + self.m - 1} of row {row}"


@dataclass(frozen=True)
class VNM(Pattern):
    """Blocks of ``v`` rows share the choice of 4 of every ``m`` columns; ``n`` = 2 of those 4 are kept in each row.

    The V:N:M pattern of VENOM (Castro et al., SC'23), which sparse tensor cores run as 2:4 on gathered columns.

    >>> str(VNM(64, 2, 8)), VNM(64, 2, 8).density
    ('vnm:64:2:8', 0.25)
    """

    v: int
    n: int
    m: int
    format: ClassVar[str] = "vnm"

    def __post_init__(self) -> None:
        self._require(1 <= self.v <= 65536, "1 <= v <= 65536 rows per block")
        self._require(self.n == 2, "n = 2 (the sparse tensor cores keep 2 of the 4 chosen columns)")
        self._require(4 <= self.m <= 256, "4 <= m <= 256")

    def __str__(self) -> str:
        return f"vnm:{self.v}:{self.n}:{self.m}"

    @property
    def density(self) -> float:
        return self.n / self.m

    @property
    def rows(self) -> int:
        return self.v

    def rule(self, row: int, col: int) -> str:
        top, left = row // self.v * self.v, col // self.m * self.m
        block = f"rows {top}..{top + self.v - 1}, columns {left}..{left + self.m - 1}"
        return f"{self} keeps 4 columns of the block ({block}) and 2 of those 4 in each row"


@dataclass(frozen=True)
class Samoyeds(Pattern):
    """``n`` of every ``m`` rows are kept in each run of ``v`` columns, and what is kept is 2:4.

    The weight pattern of Samoyeds (Wu et al., EuroSys'25, arXiv 2503.10725).

    >>> str(Samoyeds(1, 2, 128)), Samoyeds(1, 2, 128).density
    ('samoyeds:1:2:128', 0.25)
    """

    n: int
    m: int
    v: int
    format: ClassVar[str] = "samoyeds"

    def __post_init__(self) -> None:
        self._require(1 <= self.n <= self.m <= 256, "1 <= n <= m <= 256")
        self._require(self.v >= 4 and self.v % 4 == 0, "v a positive multiple of 4, so that no 2:4 group is cut in two")

    def __str__(self) -> str:
        return f"samoyeds:{self.n}:{self.m}:{self.v}"

    @property
    def density(self) -> float:
        return self.n / self.m / 2

    @property
    def rows(self) -> int:
        return self.m

    def rule(self, row: int, col: int) -> str:
        top, left, group = row // self.m * self.m, col // self.v * self.v, col // 4 * 4
        return (
            f"{self} keeps {self.n} of rows {top}..{top + self.m - 1} in columns {left}..{left + self.v - 1} "
            f"and 2 of columns {group}..{group + 3} in each"
        )


FORMATS: dict[str, type[Pattern]] = {kind.format: kind for kind in (NM, VNM, Samoyeds)}


def parse(text: str | Pattern) -> Pattern:
    """The pattern that a string writes.

    Raises :class:`~nmsparse.errors.NMSparseError` for anything else, naming the accepted forms.

    >>> parse("2:4")
    NM(n=2, m=4)
    >>> parse("samoyeds:1:2:128")
    Samoyeds(n=1, m=2, v=128)
    >>> parse("3/4")
    Traceback (most recent call last):
    ...
    nmsparse.errors.NMSparseError: pattern '3/4' is not understood: expected 'n:m' (as in '2:4'), ...
    """
    if isinstance(text, Pattern):
        return text
    if not isinstance(text, str):
        raise NMSparseError(f"a pattern is a string or a Pattern, got {type(text).__name__}: expected {SYNTAX}")
    name, *numbers = text.strip().lower().split(":")
    kind = FORMATS.get(name)
    if name.isdigit():
        kind, numbers = NM, [name, *numbers]
    if kind is None or not all(re.fullmatch("[0-9]{1,9}", number) for number in numbers):
        raise NMSparseError(f"pattern {text!r} is not understood: expected {SYNTAX}")
    if len(numbers) != len(fields(kind)):
        raise NMSparseError(
            f"pattern {text!r} has {len(numbers)} numbers, {kind.format} takes {len(fields(kind))}: {SYNTAX}"
        )
    return kind(*map(int, numbers))
