"""A team of threads that share the tasks of one call.

Numba's own threads are not used. OpenMP's spin after a parallel region, as do those of the BLAS behind NumPy, and a
program that alternates between the two spends milliseconds per call while they fight over the cores; the workqueue
layer takes longer to wake than a small product takes to run, and is not thread-safe. Here a worker looks out for the
next call for a moment, long enough for the next layer of a model, and then sleeps: see ``doorbell``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable
from typing import Any

import numba

from . import doorbell

# Multiply-adds that are worth the company of workers who are awake (some 5 µs of one core), and worth waking one.
_WORTH_SHARING, _WORTH_WAKING = 100_000, 400_000


class Team:
    """The threads of this process."""

    def __init__(self) -> None:
        self.start_afresh()

    def start_afresh(self) -> None:
        """Forget the workers; a process that was forked has none of them."""
        self._workers: list[threading.Thread] = []
        self._hiring = threading.Lock()
        self._bell = doorbell.new_bell(count() - 1, _new_lock)
        self._cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        self._avoided: int | None = None

    def run(self, kernel: Callable[..., int], tasks: int, cost: float, *args: Any) -> None:
        """``kernel(bell, wake, *args)``, which shares ``tasks`` tasks as :func:`doorbell.share` says.

        ``cost`` (in multiply-adds) decides whether it does, and how many sleeping workers are woken for it.
        """
        workers = min(count(), tasks) - 1
        wake = min(workers, int(cost // _WORTH_WAKING))
        if wake > 0:
            self._prepare(wake)
        if kernel(self._bell, wake if workers > 0 and cost >= _WORTH_SHARING else -1, *args) < tasks:
            raise MemoryError("a kernel found no memory for its work")

    def _prepare(self, wanted: int) -> None:
        if len(self._workers) < wanted:
            with self._hiring:
                while len(self._workers) < wanted:
                    args = self._bell, len(self._workers)
                    worker = threading.Thread(target=doorbell.serve, args=args, name="nmsparse", daemon=True)
                    worker.start()
                    self._workers.append(worker)
                    self._avoided = None
        if _current_core and (core := _current_core()) != self._avoided:
            self._avoid(core)

    def _avoid(self, core: int) -> None:
        """Keep the workers off the caller's core: Linux tends to wake a thread there, behind the one busy on it."""
        self._avoided = core
        if core in self._cores and len(self._cores) > 1:
            for worker in self._workers:
                with contextlib.suppress(OSError):  # somebody has taken those cores away
                    os.sched_setaffinity(worker.native_id, self._cores - {core})


def count() -> int:
    """Threads that a call may use: ``NUMBA_NUM_THREADS``, or the cores this process may run on."""
    return numba.config.NUMBA_NUM_THREADS


def _new_lock() -> int:
    """The address of a lock that is held. It is never freed: a worker may sleep on it until the process ends."""
    lock = ctypes.pythonapi.PyThread_allocate_lock
    lock.restype, lock.argtypes = ctypes.c_void_p, ()
    acquire = ctypes.pythonapi.PyThread_acquire_lock
    acquire.argtypes = ctypes.c_void_p, ctypes.c_int
    made = lock()
    acquire(made, 1)
    return made


_current_core: Callable[[], int] | None = None
if hasattr(os, "sched_setaffinity"):
    _current_core = getattr(ctypes.CDLL(None), "sched_getcpu", None)

team = Team()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=team.start_afresh)
