"""The queue's rules, and what the retention lets go."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.gateway.actor import pending
from actors.gateway.ledger import Ledger, QueueFull, Task, rfc3339, timestamp
from actors.gateway.messages import TaskResult, TaskSpec

SPEC = TaskSpec("image", ["true"], {}, None, 1.0, 1 << 20, None, "crun")


def add(ledger: Ledger, name: str, running: bool = False) -> Task:
    task = Task(name, SPEC, pending(name, 0.0, None), ledger.next_number(), running)
    ledger.add(task)
    return task


def ended(name: str, at: float) -> TaskResult:
    return TaskResult(name, "stopped", "exited", 0, None, None, "none", rfc3339(0.0), rfc3339(0.0), rfc3339(at), at)


def test_tasks_are_admitted_in_order_as_far_as_there_is_room() -> None:
    ledger = Ledger(parallel=2, queue_max=10)
    for name in "abcd":
        add(ledger, name)
    assert [task.task for task in ledger.admit()] == ["a", "b"]
    assert ledger.admit() == []
    ledger.released("a")
    assert [task.task for task in ledger.admit()] == ["c"]
    assert ledger.running == {"b", "c"} and ledger.queued == 1


def test_a_full_queue_says_so_only_when_nothing_is_free() -> None:
    ledger = Ledger(parallel=1, queue_max=1)
    add(ledger, "a")
    ledger.admit()
    ledger.check_room()
    add(ledger, "b")
    with pytest.raises(QueueFull, match="1 tasks"):
        ledger.check_room()


def test_a_withdrawn_task_is_not_admitted() -> None:
    ledger = Ledger(parallel=1, queue_max=5)
    add(ledger, "a")
    assert ledger.withdraw("a") and not ledger.withdraw("a")
    assert ledger.admit() == []


def test_a_task_that_was_found_running_has_its_place() -> None:
    ledger = Ledger(parallel=1, queue_max=5)
    add(ledger, "a", running=True)
    add(ledger, "b")
    assert ledger.admit() == []


def test_numbers_go_on_after_those_that_were_found() -> None:
    ledger = Ledger(1, 1)
    ledger.add(Task("a", SPEC, pending("a", 0.0, None), 41))
    assert ledger.next_number() == 42


def test_expired_are_the_old_and_the_surplus_oldest_first_and_never_the_running() -> None:
    ledger = Ledger(parallel=10, queue_max=10)
    for number, name in enumerate("abcde"):
        add(ledger, name, running=name == "a").result = ended(name, number)
    add(ledger, "open")
    assert ledger.expired(now_s=4.0, keep_s=2.5, results_max=10) == ["b"]
    assert ledger.expired(now_s=4.0, keep_s=100, results_max=2) == ["b", "c"]
    ledger.forget(["b", "c"])
    assert list(ledger.tasks) == ["a", "d", "e", "open"]


@given(st.floats(0, 4e9))
def test_times_come_back_to_the_microsecond(moment: float) -> None:
    text = rfc3339(moment)
    assert text.endswith("Z") and abs(timestamp(text) - moment) < 2e-6
