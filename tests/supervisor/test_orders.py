"""Which of two processes under one order is the one."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

from supervisor.keeping import StandingOrder
from supervisor.orders import Orders, Standing
from supervisor.pidfd import has_ended, same_process

ORDER = StandingOrder("a", "b:c", b"", [], "/nowhere", 1.0)


@pytest.fixture
def sleepers() -> Iterator[list[subprocess.Popen[bytes]]]:
    started = [subprocess.Popen(["sleep", "100"]) for _ in range(2)]
    yield started
    for process in started:
        process.kill()
        process.wait()


def standing(process: subprocess.Popen[bytes]) -> Standing:
    return Standing(ORDER, os.pidfd_open(process.pid), os.memfd_create("channel"))


def is_open(descriptor: int) -> bool:
    return os.path.exists(f"/proc/self/fd/{descriptor}")


@pytest.mark.parametrize(
    ("ours_first", "first_lives", "second_lives", "taken"),
    [
        (True, True, True, False),  # the root supervisor: its own one stays
        (False, True, True, True),  # the keeper: the root supervisor's is taken
        (True, True, False, False),
        (False, True, False, False),
        (True, False, True, True),
        (False, False, True, True),
        (True, False, False, True),
        (False, False, False, True),
    ],
)
def test_a_living_one_before_a_dead_one_and_of_two_the_root_supervisor_s(
    sleepers: list[subprocess.Popen[bytes]], ours_first: bool, first_lives: bool, second_lives: bool, taken: bool
) -> None:
    one, two = map(standing, sleepers)
    for process, lives in zip(sleepers, (first_lives, second_lives), strict=True):
        if not lives:
            process.send_signal(signal.SIGKILL)
            process.wait()
    orders = Orders(ours_first)
    assert orders.put("a", one)
    assert orders.put("a", two) is taken
    kept, closed = (two, one) if taken else (one, two)
    assert orders.get("a") is kept and is_open(kept.pidfd) and is_open(kept.channel)
    assert not is_open(closed.pidfd) and not is_open(closed.channel)
    ended = sleepers[0 if taken else 1]
    assert ended.wait(60) == -signal.SIGKILL
    kept.close()


def test_the_same_process_again_changes_nothing(sleepers: list[subprocess.Popen[bytes]]) -> None:
    one, again, other = standing(sleepers[0]), standing(sleepers[0]), standing(sleepers[1])
    assert same_process(one.pidfd, again.pidfd) and not same_process(one.pidfd, other.pidfd)
    orders = Orders(ours_first=False)
    orders.put("a", one)
    assert not orders.put("a", again)
    assert orders.get("a") is one and not has_ended(one.pidfd) and not is_open(again.pidfd)
    orders.dismiss("a")
    assert sleepers[0].wait(60) == -signal.SIGKILL
    assert orders.names() == [] and orders.get("a") is None
    orders.dismiss("a")
    other.close()
