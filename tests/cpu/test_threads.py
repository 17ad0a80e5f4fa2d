"""The team: every task exactly once, whoever runs it; workers that wait, sleep and wake."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from numba import njit

from nmsparse.cpu import doorbell, threads
from nmsparse.cpu.doorbell import change, look, next_task, share, swap
from nmsparse.cpu.simd import address
from nmsparse.cpu.threads import Team

MUCH = 10**12


@njit
def atomics(numbers):
    numbers = address(numbers)
    return change(numbers, 0, -2), swap(numbers, 1, 9), look(numbers, 0)


def test_atomic_words_return_what_was_there():
    numbers = np.array([7, 5], np.int64)
    assert atomics(numbers) == (7, 5, 5)
    assert numbers.tolist() == [5, 9]


@njit(nogil=True)
def mark(bell, wake, *job):
    return share(bell, wake, _mark, job)


@njit
def _mark(queue, marks, work):
    task = next_task(queue)
    while task < len(marks):
        for i in range(work):
            marks[task] += i & 1
        marks[task] += 1 - work // 2
        task = next_task(queue)


@njit(nogil=True)
def fail(bell, wake, *job):
    return share(bell, wake, _fail, job)


@njit
def _fail(queue, marks):
    if marks[0] == 0:
        raise ValueError("no room")


def assert_usable(team, tasks=50, work=0):
    marks = np.zeros(tasks, np.int64)
    team.run(mark, tasks, MUCH, marks, work)
    assert (marks == 1).all()


@pytest.fixture
def four_threads(monkeypatch):
    monkeypatch.setattr(threads, "count", lambda: 4)
    return Team()


def wait_until_asleep(team):
    end = time.monotonic() + 10
    while not team._bell[doorbell._SEATS :: doorbell._SEAT].all():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("tasks", [0, 1, 2, 3, 1000])
@pytest.mark.parametrize("cost", [0, 10**6, MUCH])
def test_every_task_is_done_once(four_threads, tasks, cost):
    for _ in range(20):
        marks = np.zeros(tasks, np.int64)
        four_threads.run(mark, tasks, cost, marks, 0)
        assert (marks == 1).all()


def test_small_work_stays_with_the_caller(four_threads):
    four_threads.run(mark, 100, 1, np.zeros(100, np.int64), 0)
    assert not four_threads._workers


def test_many_calls_at_any_distance(four_threads):
    """Right after the last one, while workers fall asleep, and long after: nobody misses the bell or hears it twice."""
    rng = np.random.default_rng(0)
    for _ in range(3000):
        assert_usable(four_threads, tasks=8, work=int(rng.integers(100)))
        until = time.perf_counter() + rng.choice([0, 1e-5, 1e-4, 3e-4])
        while time.perf_counter() < until:
            pass


def test_idle_workers_sleep_and_wake_for_a_call(four_threads):
    for _ in range(20):
        assert_usable(four_threads)
        wait_until_asleep(four_threads)
    start = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - start < 0.1


def test_several_python_threads_may_call_at_once(four_threads):
    wrong = []

    def call():
        for _ in range(300):
            try:
                assert_usable(four_threads, work=100)
            except AssertionError:
                wrong.append(True)

    callers = [threading.Thread(target=call) for _ in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_a_job_that_fails_is_reported_and_leaves_the_team_usable(four_threads):
    with pytest.raises(MemoryError):
        four_threads.run(fail, 2, MUCH, np.zeros(1, np.int64))
    assert_usable(four_threads)


def test_a_call_holds_no_arrays_when_it_is_over(four_threads):
    marks = np.zeros(50, np.int64)
    held = sys.getrefcount(marks)
    for _ in range(100):
        marks[:] = 0
        four_threads.run(mark, 50, MUCH, marks, 0)
    assert sys.getrefcount(marks) == held


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "while another thread has the team"])
def test_a_forked_process_has_a_team_of_its_own(busy):
    code = f"""
import os, threading, numpy as np
from nmsparse import formats
from nmsparse.cpu.matmul import matmul
a, x = formats.random((600, 1024), "2:4", rng=0), np.ones((8, 1024), np.float32)
want, stop = matmul(a, x), threading.Event()
def call():
    while not stop.is_set():
        matmul(a, x)
other = threading.Thread(target=call)
{busy} and other.start()
for _ in range(10):
    child = os.fork()
    if child == 0:
        os._exit(0 if all(np.array_equal(matmul(a, x), want) for _ in range(10)) else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0 and np.array_equal(matmul(a, x), want)
stop.set()
"""
    run(code, "-W", "ignore::DeprecationWarning")


def test_a_program_may_end_right_after_a_call():
    code = """
import threading, numpy as np
from nmsparse import formats
from nmsparse.cpu.matmul import matmul
a, x = formats.random((600, 1024), "2:4", rng=0), np.ones((8, 1024), np.float32)
def call():
    while True:
        matmul(a, x)
threading.Thread(target=call, daemon=True).start()
for _ in range(10):
    matmul(a, x)
"""
    for _ in range(5):
        run(code)


def run(code, *flags):
    subprocess.run([sys.executable, *flags, "-c", code], check=True, timeout=120)
