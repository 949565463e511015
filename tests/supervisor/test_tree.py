"""Supervisors with real actors: what starts when, what is started again, what ends what."""

from __future__ import annotations

import gc
import os
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from loguru import logger

from supervisor.actor import Actor, Exited, Stop
from supervisor.answers import Refused
from supervisor.spec import ChildSpec, Flags, Restart
from supervisor.system import System
from supervisor.tree import Supervisor
from tests.supervisor.actors_under_test import TIMEOUT_S, Alone, Log, Puppet, crash, hold

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
        top.launch(0, self.exits.put)
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
        return self.start_child(message).restarts if isinstance(message, ChildSpec) else super().on_message(message)


@pytest.fixture
def grove(system: System, logged: list[str]) -> Iterator[Grove]:
    grove = Grove(system)
    yield grove
    grove.end()


def incarnation(puppet: Puppet) -> tuple[int, Puppet]:
    return puppet.generation, puppet


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
    assert grove.exited() == Exited("top", 0, "StartFailed: c: OSError: no disk")
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
    assert top.failed_to_begin == "StartFailed: b: it could not be made"
    assert grove.log.take(2) == [("begin", "a"), ("end", "a", "stopped")]
    assert grove.log.silent


def test_a_child_that_takes_too_long_to_begin_has_failed(grove: Grove) -> None:
    entered, go = threading.Event(), threading.Event()
    slow = grove.spec("b", begin=hold(entered, go), shutdown_s=0.01)
    top = grove.plant(grove.spec("a"), slow, flags=Flags(start_timeout_s=0.05))
    assert top.failed_to_begin == "StartFailed: b: not begun after 0.05 s"
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
        assert answer.value == 1
        assert grove.ask("a", incarnation)[1] is not first[1]
        assert [child["restarts"] for child in top.snapshot()["children"]] == [0, 1]
    else:
        assert isinstance(answer, Refused) and answer.error in ("a has ended", "there is no a")
        assert [child["name"] for child in top.snapshot()["children"]] == ["sibling"]
    assert grove.ask("sibling", incarnation) == sibling


def test_a_child_that_fails_to_begin_again_is_tried_again(grove: Grove) -> None:
    tries = iter([None, OSError("not yet"), OSError("not yet"), None])

    def begin(puppet: Puppet) -> None:
        if error := next(tries):
            raise error

    grove.plant(grove.spec("a", begin=begin))
    grove.system.tell("a", badly)
    assert grove.ask("a", lambda puppet: puppet.generation) in (0, 3)  # 0: asked before it had crashed
    assert grove.ask("a", lambda puppet: puppet.generation) == 3


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
    assert grove.ask("a", lambda puppet: puppet.generation) == 2
    assert not top.gone.is_set()
    assert grove.log.silent


# --- backoff and intensity ---


def test_pauses_grow_and_begin_anew_after_a_long_life(grove: Grove) -> None:
    """The pauses are what `restarts` says, and are kept: measured from an end to the next beginning."""
    moments: list[tuple[str, float]] = []
    note: Callable[[str], Callable[[Puppet], None]] = lambda what: lambda puppet: moments.append((what, time.monotonic()))
    flags = Flags(intensity=None, period_s=0.4, backoff_s=(0.0, 0.05, 0.3))
    grove.plant(grove.spec("a", begin=note("begin"), end=note("end")), flags=flags)
    for _ in range(4):
        assert grove.log.next() == ("begin", "a")
        grove.system.tell("a", badly) or pytest.fail("it has its name as soon as it has begun")
        grove.log.next()
    assert grove.log.next() == ("begin", "a")
    time.sleep(0.41)  # longer than period_s: a life that counts
    grove.system.tell("a", badly)
    assert grove.log.take(2)[1] == ("begin", "a")
    pauses_s = [begin - end for (_, end), (_, begin) in zip(moments[1::2], moments[2::2], strict=True)]
    for pause_s, least_s in zip(pauses_s, [0.0, 0.05, 0.3, 0.3, 0.0], strict=True):
        assert least_s <= pause_s < least_s + 0.25


def test_too_many_restarts_end_the_supervisor_and_its_children_in_reverse(grove: Grove) -> None:
    top = grove.plant(grove.spec("a"), grove.spec("b"), grove.spec("c"), flags=Flags(intensity=2, backoff_s=(0.0,)))
    grove.log.take(3)
    for _ in range(2):
        grove.system.tell("b", badly)
        assert grove.log.take(2) == [("end", "b", "ValueError: no"), ("begin", "b")]
        grove.ask("b", lambda puppet: None)
    grove.system.tell("b", badly)
    assert grove.exited() == Exited("top", 0, "TooManyRestarts: more than 2 in 30 s; the last is b (ValueError: no)")
    assert grove.log.take(3) == [("end", "b", "ValueError: no"), ("end", "c", "stopped"), ("end", "a", "stopped")]
    assert top.gone.is_set()


def test_restarts_that_lie_far_apart_never_end_the_supervisor(grove: Grove) -> None:
    top = grove.plant(grove.spec("a"), flags=Flags(intensity=1, period_s=0.02, backoff_s=(0.0,)))
    for generation in range(4):
        assert grove.ask("a", lambda puppet: puppet.generation) == generation
        grove.system.tell("a", badly)
        assert grove.ask("a", lambda puppet: puppet.generation) == generation + 1
        time.sleep(0.03)  # what is tested is that this time counts
    assert not top.gone.is_set()


def test_a_supervisor_that_gives_up_is_its_supervisors_to_mend(grove: Grove) -> None:
    inner = ChildSpec(
        "inner",
        lambda: Supervisor(grove.system, "inner", [grove.spec("a"), grove.spec("b")], Flags(intensity=0)),
        shutdown_s=None,
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
    grove.plant(ChildSpec("inner", inner, shutdown_s=None), flags=Flags(intensity=0))
    grove.system.tell("a", badly)
    error = grove.exited().error
    assert error is not None and error.endswith(
        "the last is inner (TooManyRestarts: more than 0 in 30 s; the last is a (ValueError: no))"
    )


# --- shutdown ---


def test_children_are_stopped_in_the_reverse_of_their_start(grove: Grove) -> None:
    top = grove.plant(*(grove.spec(name) for name in "abcd"))
    grove.log.take(4)
    top.mailbox(Stop())
    assert grove.exited() == Exited("top", 0, "stopped")
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
    top = grove.plant(ChildSpec("inner", inner, shutdown_s=None))
    top.mailbox(Stop())
    assert entered.wait(TIMEOUT_S)
    assert not top.gone.is_set()
    go.set()
    assert top.gone.wait(TIMEOUT_S)


def test_a_child_that_is_to_be_started_again_is_not_when_its_supervisor_stops(grove: Grove) -> None:
    top = grove.plant(grove.spec("a"), flags=Flags(backoff_s=(0.03,)))
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
    assert grove.ask("b", lambda puppet: puppet.generation) == 1
    assert not top.gone.is_set()


def test_a_name_is_free_again_when_its_child_has_ended_for_good(grove: Grove) -> None:
    grove.plant(kind=Dynamic)
    for _ in range(3):
        grove.system.ask("top", grove.spec("a", Restart.TEMPORARY), TIMEOUT_S)
        assert grove.ask("a", lambda puppet: puppet.generation) == 0
        grove.log.take(1)
        grove.system.tell("a", normally)
        grove.log.take(1)
        with pytest.raises(RuntimeError, match="a has ended|there is no a"):
            grove.ask("a", lambda puppet: None)


# --- the tree as data ---


def row(name: str, kind: str, state: str, restarts: int, *children: Any) -> dict[str, Any]:
    return {"name": name, "kind": kind, "pid": None, "state": state, "restarts": restarts, "children": list(children)}


def plant_two_levels(grove: Grove, backoff_s: float, begin: Callable[[Puppet], Any]) -> tuple[Supervisor, Callable[..., Any]]:
    """→ the top, and what its snapshot should be when the child below its child is in that state."""
    inner = lambda: Supervisor(grove.system, "inner", [grove.spec("b", begin=begin)], Flags(backoff_s=(backoff_s,)))
    top = grove.plant(grove.spec("a"), ChildSpec("inner", inner, shutdown_s=None))

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
    begins: list[Callable[[Puppet], Any]] = [lambda puppet: None, hold(entered, go)]
    top, tree = plant_two_levels(grove, 0, lambda puppet: begins[puppet.generation](puppet))
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
    drawn: list[int] = []
    done = threading.Event()

    def draw() -> None:
        while not done.wait(0.002):
            drawn.append(len(top.snapshot()["children"]))

    def restart(count: int) -> None:
        for number in range(count):
            grove.system.tell("a", normally if number % 2 else badly) or pytest.fail("it has its name again")
            assert [what for what, *_ in grove.log.take(2)] == ["end", "begin"]
            assert grove.ask("a", lambda puppet: True)

    def settled() -> tuple[int, int]:
        current = grove.ask("a", lambda puppet: threading.current_thread())
        for thread in threading.enumerate():
            if thread.name.startswith("Puppet") and thread is not current:
                thread.join(TIMEOUT_S)
        gc.collect()
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    grove.log.take(1)
    restart(50)  # what is made once is made
    before = settled()
    tracemalloc.start()
    drawer = threading.Thread(target=draw)
    drawer.start()
    restart(1000)
    done.set()
    drawer.join(TIMEOUT_S)
    after, (held_bytes, _) = settled(), tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after == before
    assert held_bytes < 1 << 20
    assert set(drawn) == {1}
