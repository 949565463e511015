"""Supervisors with real actors: what starts when, what is started again, what ends what."""

from __future__ import annotations

import ctypes
import gc
import linecache
import math
import os
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from loguru import logger

from supervisor.actor import Actor, LeftBehind, Stop
from supervisor.answers import Deferred, Refused
from supervisor.events import TEXT_CHARS_MAX, EventLog, read_events
from supervisor.exits import STOPPED, Cause, Exit, Exited
from supervisor.rules import DeleteChild, EnsureChild, RestartChild, StartChild, State, TerminateChild, WhichChildren
from supervisor.spec import ChildSpec, Flags, Restart, Type
from supervisor.strategy import Strategy
from supervisor.system import System
from supervisor.tree import Supervisor
from tests.supervisor.actors_under_test import TIMEOUT_S, Alone, Log, Puppet, crash, hold, no_timer

AT_ONCE = Flags(backoff_s=(0.0,))


class Grove(Alone):
    """Supervisors, with puppets below them that all note what happens to them in one log."""

    def __init__(self, system: System) -> None:
        super().__init__(system)
        self.tops: list[Supervisor] = []

    def spec(
        self, name: str, restart: Restart = Restart.PERMANENT, shutdown_s: float | None = 5.0, **behaviour: Any
    ) -> ChildSpec:
        return ChildSpec(name, lambda: Puppet(self.system, name, self.log, **behaviour), restart, shutdown_s)

    def plant(self, *children: ChildSpec, flags: Flags = AT_ONCE, kind: type[Supervisor] = Supervisor) -> Supervisor:
        """Start a supervisor at the top."""
        top = kind(self.system, "top", children, flags)
        self.tops.append(top)
        top.launch(0, self.hears)
        assert top.begun.wait(TIMEOUT_S)
        return top

    def ask(self, name: str, message: Callable[[Puppet], Any]) -> Any:
        return self.system.ask(name, message, TIMEOUT_S)

    def end(self) -> None:
        for top in self.tops:
            top.mailbox(Stop())
            assert top.gone.wait(TIMEOUT_S)


class Dynamic(Supervisor):
    """Starts the child of each spec that it gets as a message."""

    def on_message(self, message: Any) -> Any:
        if not isinstance(message, ChildSpec):
            return super().on_message(message)
        self.ensure_child(message)
        return self.children[message.id].restarts


@pytest.fixture
def grove(system: System, logged: list[str]) -> Iterator[Grove]:
    grove = Grove(system)
    yield grove
    grove.end()


def incarnation(puppet: Puppet) -> tuple[int, Puppet]:
    return puppet.generation, puppet


def one_after_another(doings: list[Callable[[Puppet], Any]]) -> Callable[[Puppet], Any]:
    """Each incarnation does the next one."""
    turns = iter(doings)

    def do(puppet: Puppet) -> Any:
        return next(turns)(puppet)

    return do


# --- start ---


def test_children_start_in_order_each_when_the_one_before_has_begun(grove: Grove) -> None:
    began: list[str] = []

    def slowly(puppet: Puppet) -> None:
        began.append(f"{puppet.name} begins")
        time.sleep(0.02)  # what is tested is that the next one does not use this time
        began.append(f"{puppet.name} has begun")

    grove.plant(*(grove.spec(name, begin=slowly) for name in "abc"))
    assert began == [f"{name} {what}" for name in "abc" for what in ("begins", "has begun")]


def test_a_child_may_ask_one_that_starts_after_it(grove: Grove) -> None:
    grove.plant(grove.spec("a", begin=lambda puppet: puppet.request("b", lambda other: other.name)), grove.spec("b"))
    assert [event[:2] for event in grove.log.take(3)] == [("begin", "a"), ("begin", "b"), ("message", "a")]


def test_when_a_child_cannot_start_those_that_did_end_in_reverse(grove: Grove) -> None:
    top = grove.plant(grove.spec("a"), grove.spec("b"), grove.spec("c", begin=crash(OSError("no disk"))), grove.spec("d"))
    assert top.failed_to_begin == "StartFailed: c: OSError: no disk"
    assert grove.exited() == Exited("top", 0, Exit(Cause.CRASH, "StartFailed: c: OSError: no disk"))
    assert grove.log.take(6) == [
        ("begin", "a"),
        ("begin", "b"),
        ("begin", "c"),
        ("end", "c", "OSError: no disk"),
        ("end", "b", "stopped"),
        ("end", "a", "stopped"),
    ]
    assert grove.log.silent
    for name in "abcd":
        with pytest.raises(RuntimeError, match=f"there is no {name}"):
            grove.ask(name, lambda puppet: None)


def test_when_a_child_cannot_even_be_made_those_that_started_end(grove: Grove) -> None:
    def make() -> Actor:
        raise SystemExit("no")

    top = grove.plant(grove.spec("a"), ChildSpec("b", make), grove.spec("c"))
    assert top.failed_to_begin == "StartFailed: b: SystemExit: no"
    assert grove.log.take(2) == [("begin", "a"), ("end", "a", "stopped")]
    assert grove.log.silent


def test_a_child_that_takes_too_long_to_begin_has_failed(grove: Grove) -> None:
    entered, go = threading.Event(), threading.Event()
    slow = replace(grove.spec("b", begin=hold(entered, go), shutdown_s=0.01), start_timeout_s=0.5)
    top = grove.plant(grove.spec("a"), slow)
    assert top.failed_to_begin == "StartFailed: b: not begun after 0.5 s"
    go.set()
    assert grove.log.take(4) == [("begin", "a"), ("begin", "b"), ("end", "a", "stopped"), ("end", "b", "stopped")]


# --- restart type × how it ended: OTP's truth table ---

normally, badly = Puppet.finish, crash(ValueError("no"))


@pytest.mark.parametrize(
    ("restart", "message", "again"),
    [
        (Restart.PERMANENT, normally, True),
        (Restart.PERMANENT, badly, True),
        (Restart.TRANSIENT, normally, False),
        (Restart.TRANSIENT, badly, True),
        (Restart.TEMPORARY, normally, False),
        (Restart.TEMPORARY, badly, False),
    ],
    ids=["permanent-normal", "permanent-crash", "transient-normal", "transient-crash", "temporary-normal", "temporary-crash"],
)
def test_which_child_is_started_again(grove: Grove, restart: Restart, message: Any, again: bool) -> None:
    top = grove.plant(grove.spec("sibling"), grove.spec("a", restart))
    sibling, first = grove.ask("sibling", incarnation), grove.ask("a", incarnation)
    asked = Log()
    first[1].mailbox(message)
    assert first[1].gone.wait(TIMEOUT_S)
    grove.system.request("a", lambda puppet: puppet.generation, asked)
    (answer,) = asked.next()  # what is asked in between waits for the next one, or for the word that there is none
    if again:
        assert answer.value > first[0]
        assert grove.ask("a", incarnation)[1] is not first[1]
        assert [child["restarts"] for child in top.snapshot()["children"]] == [0, 1]
    else:
        assert isinstance(answer, Refused) and answer.error in ("a has ended", "there is no a")
        left = [("sibling", "running"), *([("a", "down")] if restart is Restart.TRANSIENT else [])]
        assert [(child["name"], child["state"]) for child in top.snapshot()["children"]] == left
    assert grove.ask("sibling", incarnation) == sibling


def test_a_child_that_fails_to_begin_again_is_tried_again(grove: Grove) -> None:
    tries = iter([None, OSError("not yet"), OSError("not yet"), None])

    def begin(puppet: Puppet) -> None:
        if error := next(tries):
            raise error

    top = grove.plant(grove.spec("a", begin=begin))
    first = grove.ask("a", incarnation)[1]
    first.mailbox(badly)
    assert first.gone.wait(TIMEOUT_S)
    assert grove.ask("a", incarnation)[1] is not first
    assert top.children["a"].restarts == 3


def test_a_child_that_cannot_be_made_again_is_tried_again_and_its_siblings_stay(grove: Grove) -> None:
    tries = iter([None, RuntimeError("no thread"), None])

    def make() -> Actor:
        if error := next(tries):
            raise error
        return Puppet(grove.system, "a", grove.log)

    top = grove.plant(ChildSpec("a", make), grove.spec("b"))
    grove.log.take(2)
    grove.system.tell("a", badly)
    assert grove.log.take(2) == [("end", "a", "ValueError: no"), ("begin", "a")]
    assert grove.ask("a", lambda puppet: top.children["a"].restarts) == 2
    assert not top.gone.is_set()
    assert grove.log.silent


# --- backoff and intensity ---


def test_pauses_grow_and_begin_anew_after_a_long_life(grove: Grove) -> None:
    """The pauses are what `restarts` says, and are kept: measured from an end to the next beginning."""
    moments: list[tuple[str, float]] = []
    note: Callable[[str], Callable[[Puppet], None]] = lambda what: lambda puppet: moments.append((what, time.monotonic()))
    flags = Flags(intensity=None, period_s=1.0, backoff_s=(0.0, 0.05, 0.3), jitter=0.0)
    grove.plant(grove.spec("a", begin=note("begin"), end=note("end")), flags=flags)
    assert grove.log.next() == ("begin", "a")
    late_s: list[float] = []
    while not late_s or min(late_s) >= 0.25:
        assert len(late_s) < 3, late_s  # once it may be the machine that had something else to do
        del moments[:-1]
        time.sleep(1.01 if late_s else 0.0)
        for life in range(5):
            if life == 4:
                time.sleep(1.01)  # longer than period_s: a life that counts
            grove.ask("a", incarnation)  # that it begins is said before it has its name
            grove.system.tell("a", badly) or pytest.fail("it has its name")
            assert grove.log.take(2)[1] == ("begin", "a")
        pauses_s = [begin - end for (_, end), (_, begin) in zip(moments[1::2], moments[2::2], strict=True)]
        over_s = [pause_s - least_s for pause_s, least_s in zip(pauses_s, [0.0, 0.05, 0.3, 0.3, 0.0], strict=True)]
        late_s.append(max(over_s) if min(over_s) >= 0 else math.inf)


def test_too_many_restarts_end_the_supervisor_and_its_children_in_reverse(grove: Grove) -> None:
    top = grove.plant(grove.spec("a"), grove.spec("b"), grove.spec("c"), flags=Flags(intensity=2, backoff_s=(0.0,)))
    grove.log.take(3)
    for _ in range(2):
        grove.system.tell("b", badly)
        assert grove.log.take(2) == [("end", "b", "ValueError: no"), ("begin", "b")]
        grove.ask("b", lambda puppet: None)
    grove.system.tell("b", badly)
    text = "TooManyRestarts: more than 2 in 30 s; the last is b (ValueError: no)"
    assert grove.exited() == Exited("top", 0, Exit(Cause.SHUTDOWN, text))
    assert grove.log.take(3) == [("end", "b", "ValueError: no"), ("end", "c", "stopped"), ("end", "a", "stopped")]
    assert top.gone.is_set()


def test_restarts_that_lie_far_apart_never_end_the_supervisor(grove: Grove) -> None:
    top = grove.plant(grove.spec("a"), flags=Flags(intensity=1, period_s=0.02, backoff_s=(0.0,)))
    for restarts in range(4):
        first = grove.ask("a", incarnation)[1]
        assert top.children["a"].restarts == restarts
        first.mailbox(badly)
        assert first.gone.wait(TIMEOUT_S)
        assert grove.ask("a", incarnation)[1] is not first
        assert top.children["a"].restarts == restarts + 1
        time.sleep(0.03)  # what is tested is that this time counts
    assert not top.gone.is_set()


def test_a_supervisor_that_gives_up_is_its_supervisors_to_mend(grove: Grove) -> None:
    inner = ChildSpec(
        "inner",
        lambda: Supervisor(grove.system, "inner", [grove.spec("a"), grove.spec("b")], Flags(intensity=0)),
        type=Type.SUPERVISOR,
    )
    top = grove.plant(grove.spec("outer"), inner)
    outer, first = grove.ask("outer", incarnation), grove.ask("b", incarnation)
    grove.log.take(3)
    grove.system.tell("a", badly)
    assert grove.log.take(4) == [("end", "a", "ValueError: no"), ("end", "b", "stopped"), ("begin", "a"), ("begin", "b")]
    assert grove.ask("outer", incarnation) == outer
    second = grove.ask("b", incarnation)
    assert second[1] is not first[1]
    assert [child["restarts"] for child in top.snapshot()["children"]] == [0, 1]


def test_a_crash_of_every_level_goes_up_to_the_top(grove: Grove) -> None:
    inner = lambda: Supervisor(grove.system, "inner", [grove.spec("a")], Flags(intensity=0))
    grove.plant(ChildSpec("inner", inner, type=Type.SUPERVISOR), flags=Flags(intensity=0))
    grove.system.tell("a", badly)
    assert grove.exited().exit.text.endswith(
        "the last is inner (TooManyRestarts: more than 0 in 30 s; the last is a (ValueError: no))"
    )


# --- shutdown ---


def test_children_are_stopped_in_the_reverse_of_their_start(grove: Grove) -> None:
    top = grove.plant(*(grove.spec(name) for name in "abcd"))
    grove.log.take(4)
    top.mailbox(Stop())
    assert grove.exited() == Exited("top", 0, STOPPED)
    assert grove.log.take(4) == [("end", name, "stopped") for name in "dcba"]


def test_a_child_is_stopped_only_when_the_one_after_it_has_ended(grove: Grove) -> None:
    entered, go = threading.Event(), threading.Event()
    top = grove.plant(grove.spec("a"), grove.spec("b", end=hold(entered, go)))
    grove.log.take(2)
    top.mailbox(Stop())
    assert entered.wait(TIMEOUT_S)
    assert grove.log.next() == ("end", "b", "stopped")
    assert grove.ask("a", lambda puppet: "still there") == "still there"
    go.set()
    assert grove.log.next() == ("end", "a", "stopped")


def test_a_child_that_is_stuck_is_left_behind_after_its_time(grove: Grove, logged: list[str]) -> None:
    entered, go = threading.Event(), threading.Event()
    top = grove.plant(grove.spec("a"), grove.spec("b", shutdown_s=0.02))
    grove.log.take(2)
    grove.system.tell("b", hold(entered, go))
    assert entered.wait(TIMEOUT_S)
    asked = Log()
    number = grove.system.request("b", lambda puppet: "never", asked)
    top.mailbox(Stop())
    assert asked.next() == (Refused(number, "b has ended"),)
    assert grove.log.next() == ("end", "a", "stopped")
    assert logged == ["b has not ended within 0.02 s of being told to; it is left behind"]
    assert not grove.system.tell("b", "hello")
    go.set()
    assert grove.log.next() == ("end", "b", "stopped")  # as soon as it can


def test_a_supervisor_is_waited_for_as_long_as_its_children_take(grove: Grove) -> None:
    entered, go = threading.Event(), threading.Event()
    inner = lambda: Supervisor(grove.system, "inner", [grove.spec("a", end=hold(entered, go))])
    top = grove.plant(ChildSpec("inner", inner, type=Type.SUPERVISOR))
    top.mailbox(Stop())
    assert entered.wait(TIMEOUT_S)
    assert not top.gone.is_set()
    go.set()
    assert top.gone.wait(TIMEOUT_S)


def test_a_child_that_is_to_be_started_again_is_not_when_its_supervisor_stops(grove: Grove) -> None:
    top = grove.plant(grove.spec("a"), flags=Flags(backoff_s=(0.03,)))
    with no_timer(grove.system.timers):  # nor is the pause over
        grove.system.tell("a", badly)
        assert grove.log.take(2)[1] == ("end", "a", "ValueError: no")
        asked = Log()
        number = grove.system.request("a", lambda puppet: None, asked)
        top.mailbox(Stop())
        assert asked.next() == (Refused(number, "a has ended"),)
    after = Log()
    grove.system.timers.after(0.05, lambda: after("the pause is over"))
    after.next()
    assert grove.log.silent


# --- dynamic children ---


def test_children_may_be_added_and_are_stopped_in_reverse_like_the_others(grove: Grove) -> None:
    top = grove.plant(grove.spec("a"), kind=Dynamic)
    for name in "bc":
        grove.system.ask("top", grove.spec(name), TIMEOUT_S)
    assert sorted(grove.log.take(3)) == [("begin", name) for name in "abc"]
    top.mailbox(Stop())
    assert grove.log.take(3) == [("end", name, "stopped") for name in "cba"]


def test_a_child_that_is_there_already_stays_as_it_is(grove: Grove) -> None:
    grove.plant(grove.spec("a"), kind=Dynamic)
    first = grove.ask("a", incarnation)
    assert grove.system.ask("top", grove.spec("a"), TIMEOUT_S) == 0
    assert grove.ask("a", incarnation) == first


def test_a_dynamic_child_that_cannot_begin_is_tried_again_and_ends_nobody(grove: Grove) -> None:
    tries = iter([OSError("not yet"), None])

    def begin(puppet: Puppet) -> None:
        if error := next(tries):
            raise error

    top = grove.plant(grove.spec("a"), flags=Flags(intensity=None, backoff_s=(0.0,)), kind=Dynamic)
    grove.system.ask("top", grove.spec("b", begin=begin), TIMEOUT_S)
    assert grove.ask("b", lambda puppet: top.children["b"].restarts) == 1
    assert not top.gone.is_set()


def test_a_name_is_free_again_when_its_child_has_ended_for_good(grove: Grove) -> None:
    grove.plant(kind=Dynamic)
    generations: list[int] = []
    for _ in range(3):
        grove.system.ask("top", grove.spec("a", Restart.TEMPORARY), TIMEOUT_S)
        generations.append(grove.ask("a", lambda puppet: puppet.generation))
        grove.log.take(1)
        grove.system.tell("a", normally)
        grove.log.take(1)
        with pytest.raises(RuntimeError, match="a has ended|there is no a"):
            grove.ask("a", lambda puppet: None)
    assert len(set(generations)) == 3  # none of them is taken for another


# --- groups ---


@pytest.mark.parametrize(
    ("strategy", "ended", "begun"),
    [(Strategy.ONE_FOR_ALL, ["b", "c", "a"], ["a", "b", "c"]), (Strategy.REST_FOR_ONE, ["b", "c"], ["b", "c"])],
    ids=["one_for_all", "rest_for_one"],
)
def test_a_group_ends_in_reverse_and_begins_in_order(
    grove: Grove, strategy: Strategy, ended: list[str], begun: list[str]
) -> None:
    grove.plant(*(grove.spec(name) for name in "abc"), flags=Flags(strategy=strategy, backoff_s=(0.0,)))
    grove.log.take(3)
    grove.system.tell("b", badly)
    events = grove.log.take(len(ended) + len(begun))
    assert [name for what, name, *_ in events if what == "end"] == ended
    assert [name for what, name, *_ in events[len(ended) :]] == begun
    asked = [grove.ask(name, lambda puppet: puppet.name) for name in "abc"]
    assert asked == list("abc")
    assert grove.log.silent


def test_what_is_asked_while_a_group_is_started_again_waits_for_it(grove: Grove) -> None:
    entered, go = threading.Event(), threading.Event()
    ends = one_after_another([hold(entered, go), lambda puppet: None])
    flags = Flags(strategy=Strategy.ONE_FOR_ALL, backoff_s=(0.0,))
    grove.plant(grove.spec("a", end=ends), grove.spec("b"), flags=flags)
    first = grove.ask("a", incarnation)
    grove.system.tell("b", badly)
    assert entered.wait(TIMEOUT_S)
    asked = Log()
    grove.system.request("a", incarnation, asked)
    go.set()
    (answer,) = asked.next()
    assert answer.value[0] > first[0]


# --- administration, by message ---


def test_a_supervisor_is_administered_by_messages(grove: Grove) -> None:
    grove.plant(grove.spec("a"))
    ask = lambda request: grove.system.ask("top", request, TIMEOUT_S)
    row = ask(StartChild(grove.spec("b")))
    assert (row.id, row.state, row.restarts) == ("b", State.RUNNING, 0)
    assert row.generation == grove.ask("b", lambda puppet: puppet.generation)
    assert ask(TerminateChild("b")) is None
    with pytest.raises(RuntimeError, match="there is no b"):
        grove.ask("b", lambda puppet: None)
    assert [row.state for row in ask(WhichChildren())] == [State.RUNNING, State.DOWN]
    assert ask(RestartChild("b")).generation > row.generation
    assert grove.ask("b", lambda puppet: puppet.name) == "b"
    with pytest.raises(RuntimeError, match="b is running"):
        ask(DeleteChild("b"))


def test_who_adds_a_child_hears_that_it_could_not_begin(grove: Grove) -> None:
    grove.plant()
    with pytest.raises(RuntimeError, match="OSError: no disk"):
        grove.system.ask("top", StartChild(grove.spec("a", begin=crash(OSError("no disk")))), TIMEOUT_S)
    assert grove.system.ask("top", WhichChildren(), TIMEOUT_S) == ()


def test_otp_55_tree(grove: Grove) -> None:
    """Two levels.  What was added to a supervisor is not there any more when it has been started again."""
    inner = ChildSpec("inner", lambda: Dynamic(grove.system, "inner", [grove.spec("static")], AT_ONCE), type=Type.SUPERVISOR)
    top = grove.plant(inner, grove.spec("other"))
    grove.system.ask("inner", StartChild(grove.spec("added")), TIMEOUT_S)
    grove.log.take(3)
    other, first = grove.ask("other", incarnation), top.children["inner"].generation
    grove.system.tell("inner", "no message of a supervisor's") or pytest.fail("it has its name")
    grove.system.tell("inner", EnsureChild(object()))  # type: ignore[arg-type]  # at which its handler raises
    assert grove.log.take(3) == [("end", name, "stopped") for name in ("added", "static")] + [("begin", "static")]
    with pytest.raises(RuntimeError, match="added has ended|there is no added"):
        grove.ask("added", lambda puppet: None)
    assert [row.id for row in grove.system.ask("inner", WhichChildren(), TIMEOUT_S)] == ["static"]
    assert top.children["inner"].generation > first
    assert grove.ask("other", incarnation) == other


def test_otp_63_simple_global_supervisor(grove: Grove) -> None:
    """However the one below dies, it is found under its name again; and so it is when its supervisor itself does."""
    inner = ChildSpec("inner", lambda: Dynamic(grove.system, "inner", [grove.spec("a")], AT_ONCE), type=Type.SUPERVISOR)
    grove.plant(inner)
    seen = {grove.ask("a", incarnation)[0]}
    for way in (normally, badly, crash(SystemExit("out")), crash(KeyboardInterrupt()), None):
        _, puppet = grove.ask("a", incarnation)
        if way is None:
            grove.system.tell("inner", EnsureChild(object()))  # type: ignore[arg-type]
        else:
            puppet.mailbox(way)
        assert puppet.gone.wait(TIMEOUT_S)
        while grove.system.reference("a") is None:
            time.sleep(0.001)
        seen.add(grove.ask("a", incarnation)[0])
    assert len(seen) == 6


def test_a_supervisor_whose_handler_raises_stops_its_children_in_reverse(grove: Grove) -> None:
    top = grove.plant(grove.spec("a"), grove.spec("b"), kind=Dynamic)
    grove.log.take(2)
    top.mailbox(EnsureChild(object()))  # type: ignore[arg-type]
    assert grove.log.take(2) == [("end", "b", "stopped"), ("end", "a", "stopped")]
    assert grove.exited().exit.cause is Cause.CRASH


def test_a_supervisor_is_stopped_while_it_starts(grove: Grove) -> None:
    entered, go = threading.Event(), threading.Event()
    top = Supervisor(grove.system, "top", [grove.spec("a"), grove.spec("b", begin=hold(entered, go)), grove.spec("c")])
    top.launch(0, grove.hears)
    assert entered.wait(TIMEOUT_S)
    top.mailbox(Stop())
    go.set()
    assert grove.exited() == Exited("top", 0, STOPPED)
    assert grove.log.take(4) == [("begin", "a"), ("begin", "b"), ("end", "b", "stopped"), ("end", "a", "stopped")]
    assert grove.log.silent


# --- ready, in time ---


class Slow(Puppet):
    """Is ready when `ready` is set."""

    def __init__(self, system: System, name: str, log: Log, ready: Deferred) -> None:
        super().__init__(system, name, log)
        self.ready = ready

    def on_begin(self) -> Deferred:
        super().on_begin()
        return self.ready


def test_a_child_is_ready_when_it_says_so_and_the_next_waits_for_it(grove: Grove) -> None:
    ready = Deferred()
    top = Supervisor(
        grove.system, "top", [ChildSpec("a", lambda: Slow(grove.system, "a", grove.log, ready)), grove.spec("b")], AT_ONCE
    )
    grove.tops.append(top)
    top.launch(0, grove.hears)
    assert grove.log.next() == ("begin", "a")
    assert not top.begun.wait(0.03)  # what is tested is that nobody uses this time
    assert [row["state"] for row in top.snapshot()["children"]] == ["starting", "starting"]
    ready.set(None)  # from this thread: it may come from any
    assert top.begun.wait(TIMEOUT_S)
    assert grove.ask("a", lambda puppet: puppet.name) == "a"
    assert grove.log.take(1) == [("begin", "b")]


def test_a_child_that_says_that_it_will_not_be_ready_could_not_begin(grove: Grove) -> None:
    ready = Deferred()
    top = Supervisor(grove.system, "top", [ChildSpec("a", lambda: Slow(grove.system, "a", grove.log, ready))], AT_ONCE)
    top.launch(0, grove.hears)
    ready.set_exception(OSError("no disk"))
    assert grove.exited().exit.text == "StartFailed: a: OSError: no disk"


@pytest.mark.parametrize("how", ["restarted", "added"])
def test_a_child_that_takes_too_long_to_begin_is_started_again(grove: Grove, how: str) -> None:
    answers = {"restarted": [True, None, True], "added": [None, True]}[how]
    readies = [Deferred() for _ in answers]
    for ready, answer in zip(readies, answers, strict=True):
        ready.set(None) if answer else None
    turns = iter(readies)
    spec = ChildSpec("a", lambda: Slow(grove.system, "a", grove.log, next(turns)), start_timeout_s=1.0)
    top = grove.plant(*([spec] if how == "restarted" else []), kind=Dynamic)
    if how == "restarted":
        grove.system.tell("a", badly)
    else:
        top.mailbox(spec)
    assert [event[0] for event in grove.log.take(5 if how == "restarted" else 3)][-3:] == ["begin", "end", "begin"]
    assert grove.ask("a", lambda puppet: puppet.name) == "a"
    assert top.children["a"].restarts == len(answers) - 1


# --- hung ---


def test_a_child_that_makes_no_progress_is_dumped_left_behind_and_replaced(
    grove: Grove, logged: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    entered, go, hung = threading.Event(), threading.Event(), Log()
    grove.system.left_behind = hung
    top = grove.plant(spec := ChildSpec("a", lambda: Puppet(grove.system, "a", grove.log), progress_s=1.0))
    first = grove.ask("a", incarnation)[1]
    late = Log()

    def hang(puppet: Puppet) -> Any:
        hold(entered, go)(puppet)
        try:
            puppet.request("a", "hello")
        except LeftBehind as error:
            late(str(error))
        return "the first one's word"

    asked = Log()
    grove.system.request("a", lambda puppet: hang(puppet) if puppet is first else "the second one's", asked)
    assert entered.wait(TIMEOUT_S)
    (answer,) = asked.next()  # which waited for its successor
    assert answer.value == "the second one's"
    assert hung.next() == ("a",)
    assert logged[-2:] == [
        f"a makes no progress for {spec.progress_s:g} s; it is left behind",
        f"a has ended (makes no progress for {spec.progress_s:g} s); it is started again in 0 s",
    ]
    assert "in hang" in capfd.readouterr().err
    go.set()
    assert late.next() == (f"a of generation {first.generation} was left behind",)
    assert first.gone.wait(TIMEOUT_S)
    assert asked.silent
    assert grove.ask("a", incarnation)[1] is not first
    assert top.children["a"].restarts == 1


def test_a_child_whose_thread_has_died_is_found_and_replaced(
    grove: Grove, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside of any handler, where Pykka catches nothing: the actor would be alive for ever, and silent."""
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    grove.plant(ChildSpec("a", lambda: Puppet(grove.system, "a", grove.log), progress_s=0.4))
    first, thread = grove.ask("a", lambda puppet: (puppet, threading.current_thread()))
    wait_for_message(thread)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemError))
    first.mailbox(lambda puppet: None)  # at which it wakes, and dies
    thread.join(TIMEOUT_S)
    assert grove.ask("a", incarnation)[1] is not first
    assert logged[0] == "a makes no progress for 0.4 s; it is left behind"


def wait_for_message(thread: threading.Thread) -> None:
    """Until an actor's thread waits for one: its answer to the last is given before it has done with that."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        frame = sys._current_frames()[thread.ident or 0]
        if "actor_inbox.get()" in linecache.getline(frame.f_code.co_filename, frame.f_lineno):
            return
        assert time.monotonic() < deadline


def test_a_child_that_is_busy_with_many_messages_does_not_hang(grove: Grove) -> None:
    top = grove.plant(ChildSpec("a", lambda: Puppet(grove.system, "a", grove.log), progress_s=1.0))
    puppet = grove.ask("a", incarnation)[1]
    for _ in range(300):
        puppet.mailbox(lambda puppet: time.sleep(0.005))
    assert grove.ask("a", incarnation)[1] is puppet
    assert top.children["a"].restarts == 0


def test_a_child_that_is_killed_outright_ends_with_the_message_in_hand(grove: Grove, logged: list[str]) -> None:
    entered, go = threading.Event(), threading.Event()
    grove.plant(grove.spec("a", shutdown_s=0))
    puppet = grove.ask("a", incarnation)[1]
    puppet.mailbox(hold(entered, go))
    assert entered.wait(TIMEOUT_S)
    assert grove.system.ask("top", TerminateChild("a"), TIMEOUT_S) is None  # it was not waited for
    go.set()
    assert puppet.gone.wait(TIMEOUT_S)
    assert logged == []


# --- what is written down ---


def test_what_happens_is_written_down(grove: Grove, tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events")
    grove.system.events = log.append
    grove.plant(grove.spec("a"), flags=Flags(intensity=1, backoff_s=(0.0,)))
    for _ in range(2):
        puppet = grove.ask("a", incarnation)[1]
        puppet.mailbox(badly)
        assert puppet.gone.wait(TIMEOUT_S)
    grove.exited()
    events = list(read_events(tmp_path / "events"))
    log.close()
    assert [(event.what, event.cause, event.text, event.pause_s) for event in events] == [
        ("started", "normal", "normal", None),
        ("ended", "crash", "ValueError: no", 0.0),
        ("started", "normal", "normal", None),
        ("too many restarts", "crash", "ValueError: no", None),
    ]
    assert {(event.supervisor, event.child) for event in events} == {("top", "a")}
    assert events[0].generation == events[1].generation < events[2].generation
    assert all(abs(event.at_s - time.time()) < 60 for event in events)


@pytest.mark.parametrize("where", ["handler", "begin"])
def test_otp_69_format_log_1(grove: Grove, logged: list[str], where: str) -> None:
    """An error that holds a megabyte is said shortly."""
    huge = crash(ValueError("x" * (1 << 20)))
    texts = Log()
    grove.system.events = texts
    begins = [lambda puppet: None, huge if where == "begin" else lambda puppet: None, lambda puppet: None]
    grove.plant(grove.spec("a", begin=one_after_another(begins)))
    puppet = grove.ask("a", incarnation)[1]
    puppet.mailbox(huge if where == "handler" else badly)
    assert puppet.gone.wait(TIMEOUT_S)
    grove.ask("a", incarnation)
    ended = [event for (event,) in texts.take(3 if where == "handler" else 4) if event.pause_s is not None]
    assert max(len(event.text) for event in ended) <= TEXT_CHARS_MAX + 3
    assert max(len(text) for text in logged if "has ended" in text) < TEXT_CHARS_MAX + 100


def test_otp_70_format_log_2(grove: Grove, tmp_path: Path) -> None:
    """And so is one that no encoding can say."""
    log = EventLog(tmp_path / "events")
    grove.system.events = log.append
    grove.plant(grove.spec("a"))
    puppet = grove.ask("a", incarnation)[1]
    puppet.mailbox(crash(ValueError("\udce4 is half a character")))
    assert puppet.gone.wait(TIMEOUT_S)
    grove.ask("a", incarnation)
    grove.system.ask("top", WhichChildren(), TIMEOUT_S)  # answered after it has noted that the second one has begun
    log.close()
    assert [event.what for event in read_events(tmp_path / "events")] == ["started", "ended", "started"]


# --- the tree as data ---


def row(name: str, kind: str, state: str, restarts: int, *children: Any) -> dict[str, Any]:
    return {"name": name, "kind": kind, "pid": None, "state": state, "restarts": restarts, "children": list(children)}


def plant_two_levels(grove: Grove, backoff_s: float, begin: Callable[[Puppet], Any]) -> tuple[Supervisor, Callable[..., Any]]:
    """→ the top, and what its snapshot should be when the child below its child is in that state."""
    inner = lambda: Supervisor(grove.system, "inner", [grove.spec("b", begin=begin)], Flags(backoff_s=(backoff_s,)))
    top = grove.plant(grove.spec("a"), ChildSpec("inner", inner, type=Type.SUPERVISOR))

    def tree(state: str, restarts: int) -> dict[str, Any]:
        b = row("b", "actor", state, restarts)
        return row(
            "top", "supervisor", "running", 0, row("a", "actor", "running", 0), row("inner", "supervisor", "running", 0, b)
        )

    return top, tree


def test_a_snapshot_shows_what_is_to_be_started_again(grove: Grove) -> None:
    top, tree = plant_two_levels(grove, 3600, lambda puppet: None)
    assert top.snapshot() == tree("running", 0)
    thread = grove.ask("b", lambda puppet: threading.current_thread())
    grove.system.tell("b", badly)
    thread.join(TIMEOUT_S)
    grove.system.ask("inner", "a message it does not know", TIMEOUT_S)  # answered after it has heard of the end
    assert top.snapshot() == tree("restarting", 0)


def test_a_snapshot_shows_what_is_being_started(grove: Grove) -> None:
    entered, go = threading.Event(), threading.Event()
    top, tree = plant_two_levels(grove, 0, one_after_another([lambda puppet: None, hold(entered, go)]))
    grove.system.tell("b", badly)
    assert entered.wait(TIMEOUT_S)
    grove.system.ask("inner", "a message it does not know", TIMEOUT_S)  # answered after it has noted what it started
    assert top.snapshot() == tree("starting", 1)
    go.set()
    grove.ask("b", lambda puppet: None)
    assert top.snapshot() == tree("running", 1)


# --- 1,000 restarts ---


@pytest.fixture
def quiet() -> Iterator[None]:
    logger.disable("supervisor")  # a thousand tracebacks take longer than what is tested
    yield
    logger.enable("supervisor")


def test_a_thousand_restarts_leave_threads_descriptors_and_memory_as_they_were(grove: Grove, quiet: None) -> None:
    top = grove.plant(grove.spec("a"), flags=Flags(intensity=None, backoff_s=(0.0,)))
    drawn: set[int] = set()
    done = threading.Event()

    def draw() -> None:
        while not done.wait(0.002):
            drawn.add(len(top.snapshot()["children"]))

    def restart(count: int) -> None:
        for number in range(count):
            grove.system.tell("a", normally if number % 2 else badly) or pytest.fail("it has its name again")
            assert [what for what, *_ in grove.log.take(2)] == ["end", "begin"]
            assert grove.ask("a", lambda puppet: True)

    def settled() -> tuple[set[threading.Thread], int]:
        current = grove.ask("a", lambda puppet: threading.current_thread())
        for thread in threading.enumerate():
            if thread.name.startswith("Puppet") and thread is not current:
                thread.join(TIMEOUT_S)
        gc.collect()
        return {*threading.enumerate()} - {current}, len(os.listdir("/proc/self/fd"))

    grove.log.take(1)
    restart(50)  # what is made once is made
    threads, descriptors = settled()
    tracemalloc.start()
    drawer = threading.Thread(target=draw)
    drawer.start()
    restart(1000)
    done.set()
    drawer.join(TIMEOUT_S)
    (threads_now, descriptors_now), (held_bytes, _) = settled(), tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # None is new; one of an earlier test's may have ended, and with it what it had open.
    assert threads_now <= threads
    assert descriptors_now <= descriptors
    assert held_bytes < 1 << 20
    assert drawn == {1}
