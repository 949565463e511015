"""Threads for what blocks: as many as are needed up to a bound, and none that keeps the process from ending."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from supervisor.pool import Pool


@pytest.fixture
def pool() -> Iterator[Pool]:
    pool = Pool(3)
    yield pool
    pool.close(60)


def test_as_many_run_at_once_as_are_allowed(pool: Pool) -> None:
    together = threading.Barrier(3)
    passed: list[int] = []
    for _ in range(6):
        pool.run(lambda: passed.append(together.wait(60)))
    pool.close(60)
    assert sorted(passed) == [0, 0, 1, 1, 2, 2]


def test_a_thread_that_is_idle_is_used_again() -> None:
    pool, threads = Pool(20), []
    for _ in range(20):
        done = threading.Event()
        pool.run(lambda done=done: (threads.append(threading.current_thread()), done.set()))  # type: ignore[misc]
        assert done.wait(60)
        time.sleep(0.01)  # until it is idle, as good as always
    pool.close(60)
    assert len(set(threads)) < 20  # not one each; how many, depends on who is faster


def test_more_than_the_threads_can_do_waits_its_turn(pool: Pool) -> None:
    go, done = threading.Event(), []
    for number in range(10):
        pool.run(lambda number=number: go.wait(60) and done.append(number))  # type: ignore[misc]
    assert done == []
    go.set()
    pool.close(60)
    assert sorted(done) == list(range(10))


def test_what_hangs_does_not_keep_the_process_from_ending() -> None:
    script = "import threading; from supervisor.pool import Pool; Pool(1).run(threading.Event().wait); print('ends')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ends\n", "")
