"""Launches that overlap, on NumPy: here none does, but a word that touches global memory too early raises."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from .crew import KernelError

__all__ = ["overlapping"]


def overlapping(tile: SimpleNamespace) -> SimpleNamespace:
    """The words of ``tile`` for one launch, and :mod:`~nmsparse.cuda.tile.gpu.overlap`'s.

    Words with an argument in global memory, whose name ends in ``gmem``, may be said by threads that have said
    ``await_previous``.
    """
    here = threading.local()  # .awaited, if the running thread has said it

    def await_previous() -> None:
        here.awaited = True

    def begin_next() -> None:
        pass

    def guarded(word: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def say(*arguments: Any) -> Any:
            if not hasattr(here, "awaited"):
                raise KernelError(f"{word} touches global memory, which the previous launch may; say await_previous()")
            return function(*arguments)

        return say

    words = {
        word: guarded(word, function) if callable(function) and _touches_memory(function) else function
        for word, function in vars(tile).items()
    }
    return SimpleNamespace(**words, await_previous=await_previous, begin_next=begin_next)


def _touches_memory(function: Callable[..., Any]) -> bool:
    return any(name.endswith("gmem") for name in inspect.signature(function).parameters)
