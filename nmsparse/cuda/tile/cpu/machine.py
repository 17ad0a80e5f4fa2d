"""What a launch consists of: CTAs with their rings in shared memory, and the roles that run in them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .barrier import Barrier, Meeting
from .crew import Crew, KernelError

__all__ = ["PRODUCER", "Accumulator", "Cta", "Group", "Machine", "Ring", "Role"]

PRODUCER = -1
POISON = 0xFF  # as 16-bit floats NaN, as metadata positions that do not ascend


class Ring:
    """Slots in shared memory, and the two barriers of each. A slot is poisoned when its refill begins."""

    def __init__(self, cfg: Any, cta: int) -> None:
        self.memory = np.full((cfg.stages, cfg.slot_bytes), POISON, np.uint8)
        self.full = [Barrier(f"full[{slot}] of CTA {cta}") for slot in range(cfg.stages)]
        self.empty = [Barrier(f"empty[{slot}] of CTA {cta}") for slot in range(cfg.stages)]
        self.fills = [0] * cfg.stages  # fills of each slot begun so far
        self.taken = False  # by sums of other CTAs

    def begin(self, slot: int, fill: int) -> None:
        """Fill number ``fill`` of ``slot`` begins, if it has not yet."""
        if self.fills[slot] == fill:
            self.memory[slot] = POISON
            self.fills[slot] += 1


@dataclass(eq=False)
class Accumulator:
    """Registers ``(128, sums)`` of a warpgroup; NaN until they are written."""

    sums: np.ndarray


@dataclass(eq=False)
class Group:
    """A committed group of ``wgmma``: what it adds to, the slot it reads, and ``finish``, which does both.

    The hardware reads operands at any time before a wait returns; ``finish`` is called at the latest. So it does with
    the registers of the metadata, of which there is a set for even and one for odd steps (``registers``).
    """

    acc: Accumulator
    slot: int
    turn: int
    finish: Callable[[], None]
    registers: int = -1


@dataclass(eq=False)
class Role:
    """One warpgroup: the producer (-1) or a consumer (0, 1, …) of a CTA, and what it has done so far."""

    number: int
    cta: Cta
    seen: dict[Barrier, int] = field(default_factory=dict)  # phases that its waits have shown it
    groups: deque[Group] = field(default_factory=deque)  # under way
    released: list[int] = field(default_factory=list)  # how many fills of each slot it has given back

    def __post_init__(self) -> None:
        self.released = [0] * self.cta.machine.cfg.stages

    def __str__(self) -> str:
        who = "producer" if self.number == PRODUCER else f"consumer {self.number}"
        return f"{who} of CTA {self.cta.number}"

    def pause(self) -> None:
        """Let other roles go on."""
        self.cta.machine.crew.pause(str(self), lambda: True, lambda: "its turn")

    def wait(self, barrier: Barrier, parity: int, turn: int) -> None:
        """Wait as ``mbarrier.try_wait.parity`` does, and remember which phases are known to be complete."""
        what = f"turn {turn}: parity {parity} of "
        self.cta.machine.crew.pause(str(self), lambda: barrier.passed(parity), lambda: what + str(barrier))
        self.seen[barrier] = barrier.phase

    def meet(self) -> None:
        """Wait for all roles of the CTA."""
        self.cta.machine.crew.pause(str(self), self.cta.meeting.arrive(), lambda: "the other roles of its CTA")

    def meet_cluster(self) -> None:
        """Wait for all consumers of the cluster."""
        met = self.cta.cluster[0].consumers.arrive()
        self.cta.machine.crew.pause(str(self), met, lambda: "the other consumers of its cluster")

    def finish_groups(self, but: int = 0) -> None:
        """Finish all groups of ``wgmma`` under way ``but`` the newest ones, oldest first."""
        while len(self.groups) > but:
            self.groups.popleft().finish()

    def knows(self, barrier: Barrier, phases: int) -> bool:
        """Whether a wait has shown it that ``phases`` phases are complete."""
        return self.seen.get(barrier, 0) >= phases

    def require(self, holds: bool, message: str) -> None:
        """Raise unless ``holds``, in the name of this role."""
        if not holds:
            raise KernelError(f"{self}: {message}")


class Cta:
    """A thread block."""

    def __init__(self, number: int, machine: Machine) -> None:
        self.number, self.machine = number, machine
        self.ring = Ring(machine.cfg, number)
        self.roles = [Role(i, self) for i in range(PRODUCER, machine.cfg.warpgroups)]
        self.meeting = Meeting(len(self.roles))
        self.consumers = Meeting((len(self.roles) - 1) * machine.cluster)
        self.received: dict[tuple[int, int, int], np.ndarray] = {}  # sums of a consumer's warp, of a peer

    @property
    def cluster(self) -> list[Cta]:
        """The CTAs of its cluster, by rank."""
        first = self.number - self.rank
        return self.machine.ctas[first : first + self.machine.cluster]

    @property
    def rank(self) -> int:
        """Its place in the cluster."""
        return self.number % self.machine.cluster

    def receive(self, sender: Role, what: tuple[int, int, int], sums: np.ndarray) -> None:
        """``sums`` of a peer arrive, in the place of the ring."""
        for consumer in self.roles[1:]:
            free = consumer.released == self.ring.fills and all(full.idle for full in self.ring.full)
            sender.require(free, f"writes sums over the ring of CTA {self.number}, which {consumer} still reads")
        self.ring.taken = True
        self.received[what] = sums


class Machine:
    """All CTAs of a launch, at the same time."""

    def __init__(self, cfg: Any, workers: int, seed: int, cluster: int = 1) -> None:
        self.cfg, self.workers, self.cluster, self.crew = cfg, workers, cluster, Crew(seed)
        self.ctas = [Cta(number, self) for number in range(workers)]
        self.stored: set[int] = set()  # elements of Y written so far, or on their way

    def check_end(self) -> None:
        """Raise if a launch left something undone."""
        for cta in self.ctas:
            for barrier in cta.ring.full:
                if not barrier.idle:
                    raise KernelError(f"at the end, copies are still under way: {barrier}")
            for consumer in cta.roles[1:]:
                consumer.require(not consumer.groups, "ends while wgmma groups are under way; say wait_wgmma()")
                for slot, fills in enumerate(cta.ring.fills):
                    done = consumer.released[slot]
                    consumer.require(
                        done == fills, f"released {done} of {fills} fills of slot {slot}; each one has to be released"
                    )
