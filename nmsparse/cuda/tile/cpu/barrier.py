"""mbarriers, with every rule of theirs as an error."""

from __future__ import annotations

from collections.abc import Callable

from .crew import KernelError

__all__ = ["Barrier", "Meeting"]


class Barrier:
    """Counts arrivals and bytes; when all have come the phase is complete and the next one begins.

    A copy lands, as late as the hardware may let it, just before the phase completes that counts its bytes.

    >>> full = Barrier("full[0]")
    >>> full.init(1)
    >>> full.arrive("producer", expect=64)
    >>> full.passed(0), str(full)
    (False, 'full[0], phase 0: 1 of 1 arrivals, 64 bytes missing')
    >>> full.copy(64, lambda: print("landed"))
    landed
    >>> full.passed(0)
    True
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.phase = 0  # phases completed so far
        self._count: int | None = None
        self._arrived: dict[str, int] = {}
        self._missing = 0
        self._landing: list[Callable[[], None]] = []

    def __str__(self) -> str:
        arrived = sum(self._arrived.values())
        return f"{self.name}, phase {self.phase}: {arrived} of {self._count} arrivals, {self._missing} bytes missing"

    @property
    def idle(self) -> bool:
        """Whether nothing has happened in the phase under way."""
        return not self._arrived and not self._missing and not self._landing

    def init(self, count: int) -> None:
        """Phases of ``count`` arrivals from here on."""
        self._count = count

    def arrive(self, who: str, times: int = 1, expect: int = 0) -> None:
        """``who`` arrives, as ``times`` threads, and announces ``expect`` bytes for this phase."""
        self._check_init()
        if who in self._arrived:
            raise KernelError(f"{who} arrives twice at {self}: expected one arrival in each phase")
        self._arrived[who] = times
        self._missing += expect
        self._advance()

    def copy(self, size: int, land: Callable[[], None]) -> None:
        """``size`` bytes on their way: ``land()`` puts them in place."""
        self._check_init()
        self._missing -= size
        self._landing.append(land)
        self._advance()

    def passed(self, parity: int) -> bool:
        """Whether a wait for ``parity`` returns: the phase under way has the other one."""
        self._check_init()
        return self.phase & 1 != parity

    def _advance(self) -> None:
        arrived = sum(self._arrived.values())
        if arrived > self._count:  # type: ignore[operator]
            raise KernelError(f"too many arrivals at {self}")
        if arrived == self._count and self._missing < 0:
            raise KernelError(f"{-self._missing} bytes more than expected at {self}")
        if arrived == self._count and self._missing == 0:
            for land in self._landing:
                land()
            self._arrived, self._landing = {}, []
            self.phase += 1

    def _check_init(self) -> None:
        if self._count is None:
            raise KernelError(f"{self.name} is used before mbarrier.init; say ring() first")


class Meeting:
    """A barrier of all roles of a block, or of all consumers of a cluster.

    >>> meeting = Meeting(2)
    >>> first, second = meeting.arrive(), meeting.arrive()
    >>> first(), second()
    (True, True)
    """

    def __init__(self, parties: int) -> None:
        self._parties, self._arrivals = parties, 0

    def arrive(self) -> Callable[[], bool]:
        """Arrive; the function returned says whether all parties have."""
        due = (self._arrivals // self._parties + 1) * self._parties
        self._arrivals += 1
        return lambda: self._arrivals >= due
