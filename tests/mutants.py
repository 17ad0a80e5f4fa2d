"""Kernel texts with one mistake planted."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Mutant:
    """``old`` becomes ``new`` in the text of ``case``; the twin answers with ``kind`` and words like ``says``."""

    name: str
    old: str
    new: str
    kind: type[Exception]
    says: str
    case: Any = None
    last: bool = False  # replace the last place, not the first


def text_of(make_kernel: Callable) -> str:
    """The module that defines ``make_kernel``."""
    return inspect.getsource(sys.modules[make_kernel.__module__])


def maker_of(text: str, name: str) -> Callable:
    """The function ``name`` of a kernel text."""
    names: dict[str, Any] = {}
    exec(compile(text, "mutant", "exec"), names)
    return names[name]


def mutated(mutant: Mutant, make_kernel: Callable) -> Callable:
    """``make_kernel`` with the mistake."""
    text = text_of(make_kernel)
    assert mutant.old in text, f"the kernel text no longer says {mutant.old!r}: update this mutant"
    before, after = (text.rsplit if mutant.last else text.split)(mutant.old, 1)
    return maker_of(before + mutant.new + after, make_kernel.__name__)
