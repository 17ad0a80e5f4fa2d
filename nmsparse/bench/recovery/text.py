"""The text that tiny-moe is trained on: Python's standard library, without what its held-out text contains."""

from __future__ import annotations

import sysconfig
from pathlib import Path

__all__ = ["standard_library"]

LONG = 40  # characters of a line that two modules share by copying rather than by chance
SHARED = 0.2  # of a file's long lines


def standard_library(heldout: bytes, folder: Path | None = None) -> bytes:
    """All ``*.py`` below ``folder`` (default: the running Python's own library), joined by zero bytes.

    A file is left out if it is a module of ``heldout``, or if a fifth of its long lines occur there: other releases of
    Python have the same modules, slightly changed, and generated tables repeat each other.
    """
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    modules, lines = {*heldout.split(b"\0")}, {*_long_lines(heldout)}
    kept = []
    for path in sorted(folder.rglob("*.py")):
        if {"site-packages", "dist-packages"} & {*path.relative_to(folder).parts}:
            continue
        text = path.read_bytes()
        own = _long_lines(text)
        if text not in modules and sum(line in lines for line in own) <= SHARED * len(own):
            kept.append(text)
    return b"\0".join(kept)


def _long_lines(text: bytes) -> list[bytes]:
    return [line for raw in text.replace(b"\0", b"\n").splitlines() if len(line := raw.strip()) >= LONG]
