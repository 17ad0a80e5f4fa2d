"""What tests of kernel texts share: planted mistakes, two vocabularies compared, the machine code in figures."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from typing import Any


def mistaken(module: Any, maker: str, *edits: tuple[str, str]) -> Any:
    """``maker`` of a kernel's module with its text changed: the first of each pair becomes the second."""
    text = inspect.getsource(module)
    for right, wrong in edits:
        assert right in text, f"the kernel no longer says {right!r}"
        text = text.replace(right, wrong)
    names: dict = {}
    exec(compile(text, "mistaken", "exec"), names)
    return names[maker]


def assert_same_words(on_cpu: dict[str, Any], on_gpu: dict[str, Any]) -> None:
    """Both vocabularies have the same words, with the same arguments where the GPU's word names any."""
    words = {word for word in on_gpu if not word.startswith("__")}
    assert words == set(on_cpu)
    for word in words:
        arguments = inspect.signature(getattr(on_gpu[word], "py_func", lambda *args: 0)).parameters.values()
        if all(argument.kind is argument.POSITIONAL_OR_KEYWORD for argument in arguments):
            assert [argument.name for argument in arguments] == list(inspect.signature(on_cpu[word]).parameters), word


def opcodes_of(text: str) -> tuple[list[str], Counter[str]]:
    """Opcodes of disassembled machine code in order, and how many there are of each family."""
    opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, flags=re.M)
    return opcodes, Counter(opcode.split(".")[0] for opcode in opcodes)
