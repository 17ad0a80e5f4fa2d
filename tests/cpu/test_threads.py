"""The team: every task exactly once, whoever runs it, and errors come back to the caller."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from numba import njit

from nmsparse.cpu import threads
from nmsparse.cpu.simd import address
from nmsparse.cpu.threads import Team, done, leave, next_task

MUCH = 10**12


@njit(nogil=True)
def mark(tasks, queue, caller, marks):
    queue = address(queue)
    task = next_task(queue)
    while task < tasks:
        marks[task] += 1
        done(queue)
        task = next_task(queue)
    leave(queue, tasks, caller)


@pytest.fixture
def four_threads(monkeypatch):
    monkeypatch.setattr(threads, "count", lambda: 4)
    return Team()


@pytest.mark.parametrize("tasks", [0, 1, 2, 3, 1000])
@pytest.mark.parametrize("cost", [0, 10**6, MUCH])
def test_every_task_is_done_once(four_threads, tasks, cost):
    for _ in range(20):
        marks = np.zeros(tasks, np.int64)
        four_threads.run(lambda queue, caller, marks=marks: mark(tasks, queue, caller, marks), tasks, cost)
        assert (marks == 1).all()


def test_small_work_stays_with_the_caller(four_threads):
    ran = set()
    four_threads.run(lambda queue, caller: ran.add(threading.get_ident()), 0, cost=1)
    assert ran == {threading.get_ident()}
    assert not four_threads._workers


def test_a_call_inside_a_call_runs_alone(four_threads):
    inner = np.zeros(10, np.int64)

    def outer(queue, caller):
        if caller:
            four_threads.run(lambda queue, caller: mark(10, queue, caller, inner), 10, MUCH)
        mark(2, queue, caller, np.zeros(2, np.int64))

    four_threads.run(outer, 2, MUCH)
    assert (inner == 1).all()


def test_a_worker_that_fails_with_a_task_tells_the_caller(four_threads):
    taken = threading.Event()

    def job(queue, caller):
        if not caller:
            queue[0] += 1  # takes the only other task, and never reports it
            taken.set()
            raise RuntimeError("lost")
        assert taken.wait(10)
        queue[8] += 1

    with pytest.raises(RuntimeError, match="lost"):
        four_threads.run(job, 2, MUCH)
    assert_usable(four_threads)


def assert_usable(team):
    marks = np.zeros(5, np.int64)
    team.run(lambda queue, caller: mark(5, queue, caller, marks), 5, MUCH)
    assert (marks == 1).all()


def test_the_callers_own_error_leaves_the_team_usable(four_threads):
    def job(queue, caller):
        if caller:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        four_threads.run(job, 2, MUCH)
    assert_usable(four_threads)


def test_the_caller_does_not_wait_for_a_worker_that_has_no_task(four_threads):
    def job(queue, caller):
        if caller:
            mark(3, queue, caller, np.zeros(3, np.int64))
        else:
            time.sleep(1)

    start = time.perf_counter()
    four_threads.run(job, 3, MUCH)
    assert time.perf_counter() - start < 0.5


def test_idle_workers_hold_no_arrays(four_threads):
    class Held:
        pass

    held, gone = Held(), threading.Event()
    __import__("weakref").finalize(held, gone.set)
    four_threads.run(lambda queue, caller, held=held: None, 0, MUCH)
    four_threads.run(lambda queue, caller, held=held: mark(2, queue, caller, np.zeros(2, np.int64)), 2, MUCH)
    del held
    assert gone.wait(5)
