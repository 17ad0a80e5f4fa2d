"""Roles as threads of which one runs at a time: the next one is drawn from a seed, so every run can be repeated.

Nobody sleeps through a timeout: when all wait and no condition holds, that is a deadlock, and the report says who waits
for what.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable

__all__ = ["Crew", "Deadlock", "KernelError"]


class KernelError(RuntimeError):
    """A kernel text broke a rule of the machine that it runs on."""


class Deadlock(KernelError):
    """Every role waits, and nothing that happens can end it."""


class _Stop(BaseException):
    """Ends a thread after another one failed."""


class Crew:
    """Runs functions as threads that take turns.

    >>> crew, heard = Crew(seed=0), []
    >>> def first(): heard.append("first")
    >>> def second(): crew.pause("second", lambda: bool(heard), lambda: "the first"); heard.append("second")
    >>> crew.run({"second": second, "first": first})
    >>> heard
    ['first', 'second']
    """

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        self._waiting: dict[str, tuple[Callable[[], bool], Callable[[], str]]] = {}
        self._batons: dict[str, threading.Lock] = {}
        self._failure: Exception | None = None

    def run(self, members: dict[str, Callable[[], None]]) -> None:
        """Run all members to their end; raise the first error of any of them."""
        self._batons = {name: threading.Lock() for name in members}
        for baton in self._batons.values():
            baton.acquire()
        self._waiting = {name: (lambda: True, lambda: "its start") for name in members}
        threads = [threading.Thread(target=self._live, args=member, daemon=True) for member in members.items()]
        for thread in threads:
            thread.start()
        self._pass_on()
        for thread in threads:
            thread.join()
        if self._failure:
            raise self._failure

    def pause(self, name: str, ready: Callable[[], bool], what: Callable[[], str]) -> None:
        """Let others run; come back at some time when ``ready()`` holds. ``what()`` names it in a report."""
        self._waiting[name] = ready, what
        self._pass_on()
        self._batons[name].acquire()
        if self._failure:
            raise _Stop

    def _live(self, name: str, body: Callable[[], None]) -> None:
        self._batons[name].acquire()
        try:
            if self._failure is None:
                body()
        except _Stop:
            pass
        except Exception as error:
            self._failure = self._failure or error
        self._pass_on()

    def _pass_on(self) -> None:
        able = []
        if self._failure is None:
            able = [name for name, (ready, _) in self._waiting.items() if ready()]
            if self._waiting and not able:
                lines = (f"  {name} waits for {what()}" for name, (_, what) in sorted(self._waiting.items()))
                self._failure = Deadlock("deadlock:\n" + "\n".join(lines))
        if able:
            name = self._draw.choice(able)
            del self._waiting[name]
            self._batons[name].release()
        with contextlib.suppress(KeyError):  # after a failure all come here at the same time, to end
            while self._failure:
                name, _ = self._waiting.popitem()
                self._batons[name].release()
