"""One actor alone: what Pykka would let slip, does not."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest

import supervisor.actor
from supervisor.actor import Stop
from supervisor.answers import Answer, Deferred, Refused, Worked, WorkFailed, refusal
from supervisor.exits import NORMAL, STOPPED, Cause, Exit, Exited
from supervisor.system import System
from tests.supervisor.actors_under_test import TIMEOUT_S, Alone, Log, Puppet, crash, hold, no_timer


@pytest.fixture
def alone(system: System, logged: list[str]) -> Alone:
    return Alone(system)


def stop(puppet: Puppet) -> None:
    puppet.mailbox(Stop())
    assert puppet.gone.wait(TIMEOUT_S)


# --- begin and end ---


def test_an_actor_begins_hears_and_ends(alone: Alone) -> None:
    puppet = alone.start("a")
    puppet.mailbox("hello")
    assert alone.log.take(2) == [("begin", "a"), ("message", "a", "hello")]
    stop(puppet)
    assert alone.log.next() == ("end", "a", "stopped")
    assert alone.exited() == Exited("a", 0, STOPPED)


def test_an_actor_that_finishes_ends_normally(alone: Alone) -> None:
    alone.start("a", generation=3).mailbox(Puppet.finish)
    assert alone.exited() == Exited("a", 3, NORMAL)


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(1), KeyboardInterrupt(), GeneratorExit()])
def test_an_actor_that_cannot_begin_is_said_to_have_ended(alone: Alone, error: BaseException) -> None:
    puppet = alone.start("a", begin=crash(error))
    text = f"{type(error).__name__}: {error}"
    assert puppet.failed_to_begin == text
    assert alone.exited() == Exited("a", 0, Exit(Cause.CRASH, text))
    assert alone.log.take(2) == [("begin", "a"), ("end", "a", text)]
    assert not alone.system.tell("a", "hello")


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(1), KeyboardInterrupt(), GeneratorExit()])
def test_an_actor_that_raises_ends_and_no_other(alone: Alone, error: BaseException) -> None:
    puppet, other = alone.start("a"), alone.start("b")
    puppet.mailbox(crash(error))
    assert alone.exited() == Exited("a", 0, Exit(Cause.CRASH, f"{type(error).__name__}: {error}"))
    assert alone.system.ask("b", lambda puppet: "still there", TIMEOUT_S) == "still there"
    stop(other)


def test_an_actor_that_cannot_end_in_order_has_ended_all_the_same(alone: Alone, logged: list[str]) -> None:
    alone.start("a", end=crash(SystemExit("no"))).mailbox(Puppet.finish)
    assert alone.exited() == Exited("a", 0, NORMAL)
    assert logged == ["a could not end in order"]


def test_an_actor_that_has_nothing_to_do_may_finish_while_it_begins(alone: Alone) -> None:
    puppet = alone.start("a", begin=Puppet.finish)
    assert alone.exited() == Exited("a", 0, NORMAL)
    assert puppet.failed_to_begin is None
    assert not alone.system.tell("a", "hello")


def test_stop_comes_after_the_message_in_hand_and_before_all_that_waits(alone: Alone) -> None:
    entered, go = threading.Event(), threading.Event()
    puppet = alone.start("a")
    puppet.mailbox(hold(entered, go))
    puppet.mailbox("waits")
    assert entered.wait(TIMEOUT_S)
    puppet.mailbox(Stop())
    go.set()
    assert alone.exited() == Exited("a", 0, STOPPED)
    assert alone.log.take(2) == [("begin", "a"), ("end", "a", "stopped")]
    assert alone.log.silent


def test_an_actor_told_to_stop_while_it_begins_never_gets_its_name(alone: Alone) -> None:
    entered, go = threading.Event(), threading.Event()
    puppet = Puppet(alone.system, "a", alone.log, begin=hold(entered, go))
    puppet.launch(0, alone.hears)
    assert entered.wait(TIMEOUT_S)
    puppet.mailbox(Stop())  # its supervisor leaves it behind, and starts another one
    successor = alone.start("a")
    go.set()
    assert alone.exited().exit.text == "stopped"
    assert puppet.begun.wait(TIMEOUT_S)
    assert alone.system.ask("a", lambda puppet: puppet, TIMEOUT_S) is successor
    stop(successor)


# --- requests ---


def test_a_request_is_answered_with_what_is_returned(alone: Alone) -> None:
    puppet = alone.start("a")
    assert alone.system.ask("a", lambda puppet: puppet.name, TIMEOUT_S) == "a"
    stop(puppet)


def test_a_request_is_answered_later(alone: Alone) -> None:
    puppet, later = alone.start("a"), Deferred()
    asked = Log()
    number = alone.system.request("a", lambda puppet: later, asked)
    assert alone.system.ask("a", lambda puppet: "meanwhile", TIMEOUT_S) == "meanwhile"
    assert asked.silent
    later.set("now")
    assert asked.next() == (Answer(number, "now"),)
    stop(puppet)


def test_a_handler_that_says_no_goes_on(alone: Alone) -> None:
    puppet = alone.start("a")
    with pytest.raises(RuntimeError, match="^not today$"):
        alone.system.ask("a", lambda puppet: refusal("not today"), TIMEOUT_S)
    assert alone.system.ask("a", lambda puppet: 1, TIMEOUT_S) == 1
    stop(puppet)


def test_a_request_at_which_the_actor_crashes_is_refused_with_the_exception(alone: Alone) -> None:
    alone.start("a")
    with pytest.raises(RuntimeError, match="^boom$"):
        alone.system.ask("a", crash(SystemExit("boom")), TIMEOUT_S)
    assert alone.exited().exit.text == "SystemExit: boom"


def test_requests_behind_a_crash_go_to_the_next_incarnation(alone: Alone) -> None:
    entered, go = threading.Event(), threading.Event()
    first, asked = alone.start("a"), Log()
    first.mailbox(hold(entered, go))
    assert entered.wait(TIMEOUT_S)
    first.mailbox(crash(ValueError("no")))
    number = alone.system.request("a", lambda puppet: puppet.generation, asked)
    go.set()
    alone.exited()
    second = alone.start("a", generation=1)
    assert asked.next() == (Answer(number, 1),)
    stop(second)


def test_an_answer_that_a_dead_incarnation_owed_is_given_by_the_next(alone: Alone) -> None:
    first, asked, owed = alone.start("a"), Log(), Deferred()
    number = alone.system.request("a", lambda puppet: owed if puppet.generation == 0 else "mine", asked)
    first.mailbox(crash(ValueError("no")))
    alone.exited()
    assert asked.silent
    second = alone.start("a", generation=1)
    assert asked.next() == (Answer(number, "mine"),)
    owed.set("too late")
    assert asked.silent
    stop(second)


def test_a_refusal_by_an_actor_that_is_ending_is_not_its_word(alone: Alone) -> None:
    """A supervisor hands a request on to its child, and crashes: the child, stopped with it, refuses; the next child answers."""
    owed, asked = Deferred(), Log()
    first = alone.start("a", end=lambda puppet: owed.set_exception(ValueError("my child has ended")))
    number = alone.system.request("a", lambda puppet: owed if puppet.generation == 0 else "mine", asked)
    first.mailbox(crash(ValueError("no")))
    alone.exited()
    assert asked.silent
    second = alone.start("a", generation=1)
    assert asked.next() == (Answer(number, "mine"),)
    stop(second)


def test_asks_that_race_a_stop_are_all_answered(alone: Alone) -> None:
    """By the actor, or with a refusal when it has ended for good; never by nobody."""
    for _ in range(20):
        puppet, asked = alone.start("a"), Log()
        start = threading.Barrier(3)

        def ask(asked: Log = asked, start: threading.Barrier = start) -> None:
            start.wait(TIMEOUT_S)
            for _ in range(20):
                alone.system.request("a", lambda puppet: 1, asked)

        askers = [threading.Thread(target=ask) for _ in range(2)]
        for asker in askers:
            asker.start()
        start.wait(TIMEOUT_S)
        puppet.mailbox(Stop())
        alone.exited()
        alone.system.forget("a")
        for asker in askers:
            asker.join(TIMEOUT_S)
        answers = [answer for (answer,) in asked.take(40)]
        assert all(isinstance(answer, Answer | Refused) for answer in answers)
        assert len({answer.request for answer in answers}) == 40


# --- the inbox ---


def test_the_inbox_is_bounded_and_what_matters_gets_in(
    alone: Alone, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor.actor, "INBOX_MAX", 3)
    entered, go, asked = threading.Event(), threading.Event(), Log()
    puppet = alone.start("a")
    puppet.mailbox(hold(entered, go))
    assert entered.wait(TIMEOUT_S)
    for number in range(5):
        puppet.mailbox(number)
    number = alone.system.request("a", "hello", asked)
    assert asked.next() == (Refused(number, "a is overloaded"),)
    assert logged == ["a has 3 messages waiting; what comes now is lost"]
    vital = [Answer(1, "yes"), Refused(2, "no"), Worked("key", 3), Exited("child", 0, NORMAL)]
    for message in vital:  # for each of these somebody waits, who would wait for ever
        puppet.mailbox(message)
    go.set()
    came = alone.log.take(1 + 3 + len(vital))
    assert came == [("begin", "a"), *(("message", "a", message) for message in [0, 1, 2, *vital])]
    puppet.mailbox("room again")
    assert alone.log.next() == ("message", "a", "room again")
    stop(puppet)


def test_a_full_inbox_does_not_keep_an_actor_from_being_stopped(alone: Alone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor.actor, "INBOX_MAX", 1)
    entered, go = threading.Event(), threading.Event()
    puppet = alone.start("a")
    puppet.mailbox(hold(entered, go))
    assert entered.wait(TIMEOUT_S)
    puppet.mailbox("fills it")
    puppet.mailbox(Stop())
    go.set()
    assert alone.exited().exit.text == "stopped"


# --- timers and work ---


def test_a_timer_arrives_as_a_message(alone: Alone) -> None:
    puppet = alone.start("a", begin=lambda puppet: puppet.after(0.01, "tick"))
    assert alone.log.take(2) == [("begin", "a"), ("message", "a", "tick")]
    stop(puppet)


def test_a_timer_of_a_dead_incarnation_vanishes(alone: Alone) -> None:
    with no_timer(alone.system.timers):
        first = alone.start("a", begin=lambda puppet: puppet.after(0.0, "of the first"))
        stop(first)
        second = alone.start("a", begin=lambda puppet: puppet.after(0.0, "of the second"))
    assert alone.log.take(4)[3] == ("message", "a", "of the second")
    assert alone.log.silent
    stop(second)


def test_a_timer_far_away_does_not_keep_a_dead_incarnation(alone: Alone) -> None:
    puppet = alone.start("a", begin=lambda puppet: puppet.after(3600, "tick"))
    stop(puppet)
    left = weakref.ref(puppet)
    for thread in threading.enumerate():
        if thread.name.startswith("Puppet"):
            thread.join(TIMEOUT_S)
    del puppet, thread
    gc.collect()
    assert left() is None


def test_work_comes_back_with_its_key(alone: Alone) -> None:
    puppet = alone.start("a", begin=lambda puppet: puppet.work("sum", lambda a, b: a + b, 1, 2))
    assert alone.log.take(2)[1] == ("message", "a", Worked("sum", 3))
    stop(puppet)


def test_work_that_fails_comes_back_with_its_exception(alone: Alone) -> None:
    puppet = alone.start("a", begin=lambda puppet: puppet.work("key", crash(ValueError("no")), puppet))
    _, _, failed = alone.log.take(2)[1]
    assert isinstance(failed, WorkFailed) and repr(failed.error) == "ValueError('no')"
    stop(puppet)


def test_work_that_would_end_its_thread_comes_back_as_well(alone: Alone) -> None:
    puppet = alone.start("a", begin=lambda puppet: puppet.work("key", crash(SystemExit("out")), puppet))
    _, _, failed = alone.log.take(2)[1]
    assert isinstance(failed, WorkFailed) and str(failed.error) == "SystemExit: out"
    stop(puppet)


def test_a_result_for_a_dead_incarnation_vanishes(alone: Alone) -> None:
    go: dict[int, threading.Event] = {0: threading.Event(), 1: threading.Event()}

    def begin(puppet: Any) -> None:
        puppet.work(puppet.generation, go[puppet.generation].wait, TIMEOUT_S)

    stop(alone.start("a", begin=begin))
    second = alone.start("a", generation=1, begin=begin)
    go[0].set()
    go[1].set()
    alone.log.take(3)
    assert alone.log.next() == ("message", "a", Worked(1, True))
    stop(second)
    assert alone.log.take(1) == [("end", "a", "stopped")]


def test_an_actor_asks_another_and_gets_the_answer_as_a_message(alone: Alone) -> None:
    answerer = alone.start("b")
    numbers: list[int] = []
    asker = alone.start("a", begin=lambda puppet: numbers.append(puppet.request("b", lambda puppet: puppet.name)))
    assert alone.log.take(3)[2] == ("message", "a", Answer(numbers[0], "b"))
    stop(asker)
    stop(answerer)
