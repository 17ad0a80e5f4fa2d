"""A team of threads that share the tasks of one call.

Numba's own threads are not used. OpenMP's spin after a parallel region, as do those of the BLAS behind NumPy, and a
program that alternates between the two spends milliseconds per call while they fight over the cores; the workqueue
layer takes longer to wake than a small product takes to run, and is not thread-safe. Here a worker sleeps on a lock
and wakes in some ten microseconds. What it runs is compiled code that has released the GIL, and the calling thread
waits for the tasks, not for the worker: one that wakes too late finds nothing left and costs nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Callable

import numba
import numpy as np
from numba import njit

from .simd import increment, receive

_WORTH_SHARING = 400_000  # multiply-adds, some 20 µs of one core: less runs faster on the calling thread
_NEXT, _DONE, _LEFT = 0, 8, 16  # where a queue counts tasks taken, tasks done, callers gone: each its own cache line
_PATIENCE = 200_000  # looks at a queue before a thread gives up, about a nanosecond each


@njit(forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)
def next_task(queue):
    """The number of a task, different for every thread that asks. Every task taken is to be reported :func:`done`."""
    return increment(queue, _NEXT)


@njit(forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)
def done(queue):
    """Report a task finished."""
    increment(queue, _DONE)


@njit(forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)
def leave(queue, tasks, caller):
    """The end of a job: the caller waits until all tasks are done, the workers until the caller has gone.

    All return to Python and need the GIL for a moment. The caller finds it free if it goes first; otherwise it may fall
    asleep on it, which costs more than a small product.
    """
    for _ in range(_PATIENCE):
        if receive(queue, _DONE) >= tasks if caller else receive(queue, _LEFT) > 0:
            break
    if caller:
        increment(queue, _LEFT)


class _Worker:
    """A thread that sleeps until there is a job; a job that comes before it woke for the last replaces that one."""

    def __init__(self) -> None:
        self._bell = threading.Lock()
        self._bell.acquire()
        self._called = False
        self._job: Callable[[], object] | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._loop, name="nmsparse", daemon=True)
        self._thread.start()
        self._avoids: int | None = None

    def call(self, job: Callable[[], object]) -> None:
        self._job = job
        if not self._called:
            self._called = True
            self._bell.release()

    def _loop(self) -> None:
        while True:
            self._bell.acquire()
            self._called = False
            job, self._job = self._job, None
            if job is not None:  # it may have been done with the call before
                try:
                    job()
                except BaseException as error:
                    self.error = error
            job = None  # holds the arrays of the call

    def avoid(self, core: int, cores: set[int]) -> None:
        """Keep off the caller's core: Linux tends to wake a thread there, behind the one that is busy on it."""
        if core != self._avoids:
            with contextlib.suppress(OSError):  # somebody has taken those cores away
                os.sched_setaffinity(self._thread.native_id, cores - {core})
            self._avoids = core


class Team:
    """The threads of this process."""

    def __init__(self) -> None:
        self.start_afresh()

    def start_afresh(self) -> None:
        """Forget the workers; a process that was forked has none of them, and perhaps a lock that nobody holds."""
        self._workers: list[_Worker] = []
        self._busy = threading.Lock()
        self._cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()

    def run(self, job: Callable[[np.ndarray, bool], object], tasks: int, cost: float) -> None:
        """Run ``job(queue, caller)`` on every thread at once, and return when the ``tasks`` in the queue are finished.

        A job takes tasks from the queue until none is left, then leaves. It runs on the calling thread alone if
        ``cost`` (in multiply-adds) is small, or while another call has the team.
        """
        queue = np.zeros(24, np.int64)
        threads = min(count(), tasks, 1 + int(cost // _WORTH_SHARING))
        if threads == 1 or not self._busy.acquire(blocking=False):
            job(queue, True)
            return
        try:
            self._call_workers(lambda: job(queue, False), threads - 1)
            job(queue, True)
            while queue[_DONE] < tasks:  # a worker has lost its core in the middle of a task
                for worker in self._workers:
                    if worker.error is not None:
                        raise worker.error
                time.sleep(1e-5)
        finally:
            self._busy.release()

    def _call_workers(self, job: Callable[[], object], wanted: int) -> None:
        while len(self._workers) < wanted:
            self._workers.append(_Worker())
        core = _current_core() if _current_core else None
        for worker in self._workers[:wanted]:
            if core in self._cores and len(self._cores) > 1:
                worker.avoid(core, self._cores)
            worker.error = None
            worker.call(job)


def count() -> int:
    """Threads that a call may use: ``NUMBA_NUM_THREADS``, or the cores this process may run on."""
    return numba.config.NUMBA_NUM_THREADS


_current_core: Callable[[], int] | None = None
if hasattr(os, "sched_setaffinity"):
    _current_core = getattr(ctypes.CDLL(None), "sched_getcpu", None)

team = Team()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=team.start_afresh)
