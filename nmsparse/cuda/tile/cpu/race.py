"""Memory that several warps share, which notices when nothing orders two accesses to one place.

Each warp counts its own steps and knows how far it has seen the others' (a vector clock); a barrier, or an atomic
operation that releases and acquires, passes that knowledge on. Two accesses to one place by different warps, other
than two reads or two atomic ones, are a race unless the later warp has seen the earlier one's step: whatever the order
in which the warps happened to run. What the lanes of one warp do to each other is not seen.
Source: Flanagan and Freund, "FastTrack", PLDI 2009.
"""

from __future__ import annotations

import numpy as np

from .crew import KernelError

__all__ = ["Cells", "Clocks", "Signal"]

READ, WRITE, ATOMIC = range(3)
CONFLICTS = {READ: (WRITE, ATOMIC), WRITE: (READ, WRITE, ATOMIC), ATOMIC: (READ, WRITE)}
KINDS = "reads", "writes", "adds to"


class Clocks:
    """What each warp has seen of the others.

    >>> clocks, signal = Clocks(2), Signal()
    >>> clocks.release(0, signal); clocks.acquire(1, signal)
    >>> clocks.seen.tolist()
    [[2, 0], [1, 1]]
    """

    def __init__(self, warps: int):
        self.seen = np.eye(warps, dtype=np.int64)

    def release(self, warp: int, signal: Signal) -> None:
        """Who acquires ``signal`` from now on has seen what ``warp`` has done."""
        signal.seen = np.maximum(signal.seen, self.seen[warp])
        self.seen[warp, warp] += 1

    def acquire(self, warp: int, signal: Signal) -> None:
        """``warp`` has seen what has been released."""
        self.seen[warp] = np.maximum(self.seen[warp], signal.seen)


class Signal:
    """What hands knowledge on: a barrier's phase, a counter."""

    def __init__(self) -> None:
        self.seen: np.ndarray | int = 0


class Cells:
    """Numbers in memory, read and written by warps: ``known`` says whether there is something to read.

    >>> clocks = Clocks(2)
    >>> cells = Cells("counts", np.zeros(4, np.int32), clocks)
    >>> cells.write(0, np.array([1, 2]), 5)
    >>> cells.read(1, np.array([2]))
    Traceback (most recent call last):
    ...
    nmsparse.cuda.tile.cpu.crew.KernelError: counts[2]: warp 1 reads what warp 0 writes at the same time; say barrier()
    """

    def __init__(self, name: str, values: np.ndarray, clocks: Clocks, *, known: bool = True):
        self.name, self.values, self.clocks = name, values.reshape(-1), clocks
        self.known = np.full(values.size, known)
        self.stored = np.zeros(values.size, bool)
        self.last = np.zeros((3, values.size, len(clocks.seen)), np.int64)  # step of each warp's last access

    def read(self, warp: int, at: np.ndarray) -> np.ndarray:
        """The numbers at ``at``."""
        self._access(warp, at, READ)
        self._require_known(at)
        return self.values[at]

    def write(self, warp: int, at: np.ndarray, values: np.ndarray | int) -> None:
        """Numbers that may be replaced later."""
        self._access(warp, at, WRITE)
        if np.unique(at).size < at.size:
            raise KernelError(f"{self.name}: warp {warp} stores twice to one place")
        if self.stored[at].any():
            raise KernelError(f"{self.name}[{at[self.stored[at]][0]}] is stored again, by warp {warp}")
        self.values[at], self.known[at] = values, True

    def store(self, warp: int, at: np.ndarray, values: np.ndarray | int) -> None:
        """Results, which stay."""
        self.write(warp, at, values)
        self.stored[at] = True

    def add(self, warp: int, at: np.ndarray, amounts: np.ndarray | int) -> np.ndarray:
        """Atomic additions, one after another; what was there before each."""
        self._access(warp, at, ATOMIC)
        self._require_known(at)
        before = np.empty(at.size, self.values.dtype)
        for lane, (place, amount) in enumerate(zip(at, np.broadcast_to(amounts, at.shape), strict=True)):
            before[lane] = self.values[place]
            self.values[place] += amount
        return before

    def _access(self, warp: int, at: np.ndarray, kind: int) -> None:
        if at.size and not 0 <= at.min() <= at.max() < self.values.size:
            bad = at[(at < 0) | (at >= self.values.size)][0]
            raise KernelError(
                f"{self.name}[{bad}]: warp {warp} {KINDS[kind]} outside of its {self.values.size} numbers"
            )
        for other_kind in CONFLICTS[kind]:
            unseen = self.last[other_kind, at] > self.clocks.seen[warp]
            if unseen.any():
                lane, other = np.argwhere(unseen)[0]
                raise KernelError(
                    f"{self.name}[{at[lane]}]: warp {warp} {KINDS[kind]} what warp {other} {KINDS[other_kind]} "
                    "at the same time; say barrier()"
                )
        self.last[kind, at, warp] = self.clocks.seen[warp, warp]

    def _require_known(self, at: np.ndarray) -> None:
        if not self.known[at].all():
            raise KernelError(f"{self.name}[{at[~self.known[at]][0]}] is read before anything was stored there")
