"""The vocabulary on NumPy: the same kernel text runs without a GPU, and every rule of the machine is checked.

Each role (producer, consumers) of each CTA is a thread, and one thread runs at a time, drawn from a seed. What the
hardware may do late happens here as late as it may: copies land just before their barrier's phase completes, a product
reads its operands when it is waited for, and a ring slot is NaN from the moment its refill begins. A word that breaks a
rule raises :class:`KernelError`, which says who did what; a wait that nothing can end raises :class:`Deadlock`.
What the twin cannot show: time, bank conflicts, alignment, races between the threads of a warpgroup, memory order that
is weaker than Python's, and whatever the bodies of the GPU's words do that their equations do not say.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from .crew import Deadlock, KernelError
from .machine import PRODUCER, Machine, Role
from .store import store_words
from .words import consumer_words, place_words, producer_words, ring_words

__all__ = ["Deadlock", "KernelError", "launch", "make", "vocabulary"]

Words = dict[str, Callable[..., Any]]

_here = threading.local()  # .role: who the running thread is


def make(cfg: Any) -> SimpleNamespace:
    """The words of :mod:`~nmsparse.cuda.kernels.gemm` for ``cfg``, as the namespace that a kernel text receives."""
    everyone = {**place_words(cfg), **ring_words(cfg)}
    return vocabulary(everyone, producer_words(cfg), {**consumer_words(cfg), **store_words(cfg)})


def vocabulary(everyone: Words, producer: Words, consumer: Words) -> SimpleNamespace:
    """Words by who may say them. Each gets the role that says it first."""
    tile = SimpleNamespace(PRODUCER=PRODUCER)
    for words, who in ((everyone, None), (producer, "the producer"), (consumer, "a consumer")):
        for word, function in words.items():
            setattr(tile, word, _said_by(who, word, function))
    return tile


def _said_by(who: str | None, word: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` for the role that runs; an error unless it is ``who``, everyone if None."""

    @functools.wraps(function)
    def say(*arguments: Any) -> Any:
        role: Role = _here.role
        speaker = "the producer" if role.number == PRODUCER else "a consumer"
        role.require(who in (None, speaker), f"{word} is a word for {who}")
        if who:  # words for everyone say where a role is, or wait themselves
            role.pause()
        return function(role, *arguments)

    return say


def launch(
    make_kernel: Callable[[Any, Any], Callable[..., None]],
    cfg: Any,
    workers: int,
    arguments: Sequence[Any],
    *,
    make: Callable[[Any], SimpleNamespace] = make,
    seed: int = 0,
    cluster: int = 1,
) -> None:
    """Run ``make_kernel(tile, cfg)(*arguments)`` on ``workers`` CTAs at once, in clusters of ``cluster``, ``tile`` by
    ``make``.

    Arguments are those of the kernel: arrays instead of addresses and tensor maps. ``seed`` draws the order in which
    roles go on; another seed is another interleaving.
    """
    machine = Machine(cfg, workers, seed, cluster)
    kernel = make_kernel(make(cfg), cfg)

    def live(role: Role) -> None:
        _here.role = role
        kernel(*arguments)

    machine.crew.run({str(role): functools.partial(live, role) for cta in machine.ctas for role in cta.roles})
    machine.check_end()
