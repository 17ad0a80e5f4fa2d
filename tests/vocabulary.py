"""Kernel texts, the words that they say, and the page that explains them."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable

from nmsparse.cuda import tile


def words_of(text: str) -> set[str]:
    """What a kernel text says, ``tile.WORD``."""
    nodes = ast.walk(ast.parse(text))
    return {n.attr for n in nodes if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "tile"}


def explained(kernel: str) -> dict[str, list[str]]:
    """Words of the part of the page that is about ``kernel``, with their arguments."""
    parts = re.split(r"^.*:mod:`nmsparse\.cuda\.kernels\.(\w+)`\n[=-]+$", tile.__doc__, flags=re.M)
    part = parts[parts.index(kernel) + 1]
    return {
        word: re.findall(r"\w+", arguments)
        for word, arguments in re.findall(r"^``(\w+)\((.*)\)`` : \w+$", part, flags=re.M)
    }


def arguments_of(function: Callable) -> list[str]:
    """Arguments of a twin's word, without the role that says it."""
    return [*inspect.signature(function).parameters][1:]
