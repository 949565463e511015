"""Timers come in their order, one fault does not stop them, and what is cancelled never comes."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator

import pytest

from supervisor.timers import Timers
from tests.supervisor.actors_under_test import no_timer


@pytest.fixture
def timers() -> Iterator[Timers]:
    timers = Timers()
    yield timers
    timers.close()


def test_timers_come_in_the_order_in_which_they_are_due(timers: Timers) -> None:
    came: queue.SimpleQueue[str] = queue.SimpleQueue()
    tries: list[float] = []
    while not tries or tries[-1] >= 0.2:
        assert len(tries) < 3, tries  # once it may be this thread that did not run for so long between two of them
        began = time.monotonic()
        timers.after(0.6, lambda: came.put("third"))
        timers.after(0.2, lambda: came.put("first"))
        timers.after(0.4, lambda: came.put("second"))
        tries.append(time.monotonic() - began)
        order = [came.get(timeout=60) for _ in range(3)]
        assert time.monotonic() - began >= 0.6
    assert order == ["first", "second", "third"]


def test_of_two_that_are_due_together_the_older_comes_first(timers: Timers) -> None:
    came: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(20):
        timers.after(0.0, lambda number=number: came.put(number))  # type: ignore[misc]
    assert [came.get(timeout=60) for _ in range(20)] == list(range(20))


def test_a_cancelled_timer_never_comes(timers: Timers) -> None:
    came: queue.SimpleQueue[str] = queue.SimpleQueue()
    with no_timer(timers):
        timers.after(0.0, lambda: came.put("cancelled")).cancel()
        timers.after(0.0, lambda: came.put("good"))
    assert came.get(timeout=60) == "good"
    assert came.empty()


def test_a_timer_may_ask_for_another_one(timers: Timers) -> None:
    came: queue.SimpleQueue[str] = queue.SimpleQueue()
    timers.after(0.0, lambda: timers.after(0.0, lambda: came.put("again")) and None)
    assert came.get(timeout=60) == "again"


def test_a_call_that_fails_does_not_stop_the_others(timers: Timers, logged: list[str]) -> None:
    came: queue.SimpleQueue[str] = queue.SimpleQueue()

    def fail() -> None:
        raise RuntimeError("as it should")

    timers.after(0.0, fail)
    timers.after(0.01, lambda: came.put("good"))
    assert came.get(timeout=60) == "good"
    assert logged == ["a timer's call failed"]


def test_closed_timers_never_come(timers: Timers) -> None:
    came: queue.SimpleQueue[str] = queue.SimpleQueue()
    timers.after(0.0, lambda: timers.close() or came.put("the last"))  # type: ignore[func-returns-value]
    assert came.get(timeout=60) == "the last"
    timers.after(0.0, lambda: came.put("too late"))
    timers.close()
    assert came.empty()
