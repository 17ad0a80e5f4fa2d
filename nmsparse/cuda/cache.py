"""Compiled kernels on disk, one folder per user: a kernel is compiled once, not once per process.

An entry's name is a hash of everything that its machine code depends on; its contents carry a checksum. Processes share
the folder without locks: an entry is written under another name and then moved into place, whole. What cannot be read
or written costs a compilation, never an error. Set ``NMSPARSE_CACHE_DIR`` to put the folder elsewhere.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import UnsupportedDeviceError
from .compiler import Cubin, ptxas

__all__ = ["cached", "clear", "folder", "size"]

MAGIC = b"nmsparse cubin 1\n"
SUFFIX = ".cubin"
UNFINISHED = ".writing-"  # also what a process that was killed leaves behind


def cached(kernel: str, cfg: Any, arch: str, build: Callable[[], Cubin]) -> Cubin:
    """The machine code of ``kernel`` with ``cfg`` for ``arch``: from disk, else from ``build()``, which is then kept.

    ``repr(cfg)`` has to say everything that distinguishes two configs, as that of a dataclass does. Numba is not
    imported unless ``build`` does so.
    """
    path = folder() / f"{kernel}-{arch}-{key(kernel, cfg, arch)}{SUFFIX}"
    if (found := _read(path)) is None:
        found = build()
        _write(path, found)
    return found


def folder() -> Path:
    """Where the entries are; it may not exist yet."""
    if chosen := os.environ.get("NMSPARSE_CACHE_DIR"):
        return Path(chosen)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "nmsparse"


def size() -> int:
    """Bytes of all entries."""
    return sum(path.stat().st_size for path in folder().glob(f"*{SUFFIX}"))


def clear() -> int:
    """Remove all entries, also of other versions; how many there were."""
    paths = list(folder().glob(f"*{SUFFIX}"))
    for path in [*paths, *folder().glob(f"{UNFINISHED}*")]:
        path.unlink(missing_ok=True)
    return len(paths)


def key(kernel: str, cfg: Any, arch: str) -> str:
    """Hash of all that the machine code depends on."""
    return hashlib.sha256("\n".join((kernel, repr(cfg), arch, *_toolchain())).encode()).hexdigest()[:32]


@functools.lru_cache(maxsize=1)
def _toolchain() -> tuple[str, ...]:
    """The text of this package's kernels and the versions of what compiles them."""
    root, sources = Path(__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        sources.update(path.relative_to(root).as_posix().encode() + b"\n" + path.read_bytes())
    return sources.hexdigest(), *map(_version, ("nmsparse", "numba", "numba-cuda")), _assembler_version()


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "none"


def _assembler_version() -> str:
    try:
        run = subprocess.run([ptxas(), "--version"], capture_output=True, text=True, check=True)
    except (UnsupportedDeviceError, OSError, subprocess.CalledProcessError):
        return "none"
    return run.stdout


def _read(path: Path) -> Cubin | None:
    """The entry, or None if there is none or it is damaged."""
    try:
        checksum, _, body = path.read_bytes().removeprefix(MAGIC).partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() != checksum:
            return None
        header, _, code = body.partition(b"\n")
        return Cubin(code=code, **json.loads(header))
    except (OSError, ValueError, TypeError):
        return None


def _write(path: Path, cubin: Cubin) -> None:
    body = json.dumps({"entry": cubin.entry, "log": cubin.log}).encode() + b"\n" + cubin.code
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=UNFINISHED)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
