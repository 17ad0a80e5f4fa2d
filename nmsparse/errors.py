"""The exceptions of nmsparse, and how it asks for an optional package."""

from __future__ import annotations

import importlib
from types import ModuleType


class NMSparseError(ValueError):
    """Bad input: the message says what was expected, what came, and what to do."""


class UnsupportedDeviceError(RuntimeError):
    """An array lives where no kernel of nmsparse can reach it."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package, or say which extra brings it.

    >>> require("numpy", "test").__name__
    'numpy'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} is needed here and could not be imported ({error}); "
            f"install it with: python -m pip install 'nmsparse[{extra}]'"
        ) from error
