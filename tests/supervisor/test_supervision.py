"""The rule book against Erlang/OTP's own test suite: a test to each case of supervisor_SUITE (2021), by its number and name.

Cases that are about actors and threads are in `test_tree`.  `MEANINGLESS` lists those that have no test, and why.  What OTP has not
(pauses, time-outs, budgets) is in `test_supervision_beyond`, and every order of events in `test_supervision_model`.
"""

from __future__ import annotations

import gc
import inspect
import re
import sys
import time
import weakref
from types import ModuleType
from typing import Any

import pytest

from supervisor import administration, supervision
from supervisor.exits import Cause, Exit
from supervisor.rules import (
    CountChildren,
    Counts,
    DeleteChild,
    GetChildSpec,
    RestartChild,
    StartChild,
    State,
    TerminateChild,
    What,
    WhichChildren,
)
from supervisor.spec import AutoShutdown, Budget, ChildSpec, Flags, Restart, SpecError, Type
from supervisor.strategy import Strategy
from supervisor.supervision import Supervision
from tests.supervisor.rulebook import (
    AT_ONCE,
    CRASH,
    KILLED,
    LATER,
    NORMAL,
    SHUTDOWN,
    STOPPED,
    World,
    child,
    flags,
    never_called,
    supervisor,
)

UPGRADE = "a running supervisor's code is not replaced: the process is, and what lives is adopted"
MEANINGLESS = {
    2: "a supervisor has no init that could return ignore: its children are its constructor's arguments",
    8: "nor one that could return nonsense",
    25: "a start has no extra value to return",
    59: "there are no callback modules",
    71: UPGRADE,
    72: UPGRADE,
    73: UPGRADE,
    74: UPGRADE,
    82: UPGRADE,
    83: UPGRADE,
    84: UPGRADE,
    85: UPGRADE,
    86: UPGRADE,
    87: UPGRADE,
    88: UPGRADE,
}

DYNAMIC = flags(Strategy.DYNAMIC)
FAILS = Exit(Cause.CRASH, "OSError: no")


def test_every_case_has_a_test_or_a_reason() -> None:
    from tests.supervisor import test_tree

    tests = [*vars(sys.modules[__name__]), *vars(test_tree)]
    numbers = {int(found[1]) for name in tests if (found := re.match(r"test_otp_(\d+)_", name))}
    assert numbers | set(MEANINGLESS) == set(range(1, 89))
    assert not numbers & set(MEANINGLESS)


# --- start ---


def test_otp_01_sup_start_normal() -> None:
    world = World(child("a"), child("b"))
    assert world.up
    assert world.take() == ["start a", "start b"]
    world.end()
    assert world.down == STOPPED


def test_otp_03_sup_start_ignore_child() -> None:
    world = World(child("a"), child("b"), begin=False)
    world.begins["a"] = [NORMAL]
    world.begin()
    assert world.up
    assert world.states() == {"a": State.DOWN, "b": State.RUNNING}
    assert world.call(CountChildren()) == Counts(specs=2, active=1, supervisors=0, workers=2)
    assert world.forgotten == {"a"}


def test_otp_04_sup_start_ignore_temporary_child() -> None:
    world = World(child("a", Restart.TEMPORARY), child("b"), begin=False)
    world.begins["a"] = [NORMAL]
    world.begin()
    assert world.states() == {"b": State.RUNNING}
    assert world.call(CountChildren()) == Counts(1, 1, 0, 1)


def test_otp_05_sup_start_ignore_temporary_child_start_child() -> None:
    world = World()
    world.begins["a"] = [NORMAL]
    assert world.call(StartChild(child("a", Restart.TEMPORARY))).state is State.DOWN
    assert world.rows() == {}


def test_otp_06_sup_start_ignore_temporary_child_start_child_simple() -> None:
    world = World(flags=DYNAMIC)
    world.begins["a"] = [NORMAL]
    assert world.call(StartChild(child("a", Restart.TEMPORARY))).state is State.DOWN
    assert world.rows() == {}


def test_otp_07_sup_start_ignore_permanent_child_start_child_simple() -> None:
    world = World(flags=DYNAMIC)
    world.begins["a"] = [NORMAL]
    assert world.call(StartChild(child("a"))).state is State.DOWN
    assert world.rows() == {}
    world.end()
    assert world.down == STOPPED


def test_otp_09_sup_start_fail() -> None:
    world = World(child("a"), child("b"), child("c"), child("d"), begin=False)
    world.begins["c"] = [FAILS]
    world.begin()
    assert not world.up
    assert world.take() == ["start a", "start b", "start c", "down c", "tell b", "down b", "tell a", "down a"]
    assert world.down == Exit(Cause.START, "c: OSError: no")
    assert world.forgotten == {"a", "b", "c", "d"}
    assert world.whats("c") == [What.START_FAILED]


def test_otp_10_sup_start_child_returns_error() -> None:
    world = World()
    world.begins["a"] = [FAILS]
    assert world.refusal(StartChild(child("a"))) == "OSError: no"
    assert world.rows() == {}
    assert world.down is None


def test_otp_11_sup_start_restart_child_returns_error() -> None:
    world = World(child("a"))
    world.call(TerminateChild("a"))
    world.begins["a"] = [FAILS]
    assert world.refusal(RestartChild("a")) == "OSError: no"
    assert world.states() == {"a": State.DOWN}
    assert world.call(RestartChild("a")).state is State.RUNNING


def test_otp_12_sup_start_child_returns_error_simple() -> None:
    world = World(flags=DYNAMIC)
    world.begins["a"] = [FAILS]
    assert world.refusal(StartChild(child("a"))) == "OSError: no"
    assert world.rows() == {}


def test_otp_13_sup_start_map() -> None:
    """What is left out has OTP's default."""
    world = World(ChildSpec("a", never_called), ChildSpec("b", never_called, type=Type.SUPERVISOR))
    a, b = world.call(GetChildSpec("a")), world.call(GetChildSpec("b"))
    assert (a.restart, a.type, a.significant, a.patience_s) == (Restart.PERMANENT, Type.WORKER, False, 5.0)
    assert b.patience_s == float("inf")
    assert world.refusal(GetChildSpec("c")) == "there is no child c"
    assert (Flags().strategy, Flags().auto_shutdown) == (Strategy.ONE_FOR_ONE, AutoShutdown.NEVER)


def test_otp_14_sup_start_map_simple() -> None:
    world = World(flags=DYNAMIC)
    world.call(StartChild(ChildSpec("a", never_called)))
    assert world.call(GetChildSpec("a")) == ChildSpec("a", never_called)


@pytest.mark.parametrize(
    ("specs", "text"),
    [
        ([child("a"), child("a")], "two children have the id a"),
        ([child("a", Restart.TRANSIENT, significant=True)], "a is significant, and its supervisor's auto_shutdown is never"),
    ],
)
def test_otp_15_sup_start_map_faulty_specs(specs: list[ChildSpec], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        Supervision(specs)


# --- stop ---


@pytest.mark.parametrize("spec", [child("a", shutdown_s=float("inf")), supervisor("a")], ids=["worker", "supervisor"])
def test_otp_16_sup_stop_infinity(spec: ChildSpec) -> None:
    world = World(spec)
    world.ends["a"] = LATER
    world.end()
    world.passes(1e9)
    assert world.take() == ["start a", "tell a"]
    world.exits("a", STOPPED)
    assert world.down == STOPPED


def test_otp_17_sup_stop_timeout() -> None:
    world = World(child("a"), child("b", shutdown_s=1.0))
    world.ends["b"] = LATER
    world.take()
    world.end()
    world.passes(0.99)
    assert world.take() == ["tell b"]
    world.passes(0.01)
    assert world.take() == ["kill b", "down b", "tell a", "down a"]
    assert world.whats("b") == [What.STARTED, What.SHUTDOWN_ERROR]
    assert world.whats("a") == [What.STARTED]


def test_otp_18_sup_stop_timeout_dynamic() -> None:
    """All are told at once, and all have the same time."""
    world = World(*(child(name, Restart.TEMPORARY, shutdown_s=1.0) for name in "abc"), flags=DYNAMIC)
    world.ends["a"] = world.ends["b"] = world.ends["c"] = LATER
    world.take()
    world.end()
    assert world.take() == ["tell c", "tell b", "tell a"]
    world.passes(0.5)
    world.exits("b", STOPPED)
    world.passes(0.5)
    assert sorted(world.take()) == ["down a", "down b", "down c", "kill a", "kill c"]
    assert world.down == STOPPED


def test_otp_19_sup_stop_brutal_kill() -> None:
    world = World(child("a"), child("b", shutdown_s=0))
    world.take()
    world.end()
    assert world.take() == ["kill b", "down b", "tell a", "down a"]
    assert What.SHUTDOWN_ERROR not in world.whats()


def test_otp_20_sup_stop_brutal_kill_dynamic() -> None:
    names = [f"c{number}" for number in range(10)]
    world = World(*(child(name, Restart.TEMPORARY, shutdown_s=0) for name in names), flags=DYNAMIC)
    world.take()
    world.end()
    assert sorted(world.take()) == sorted([f"kill {name}" for name in names] + [f"down {name}" for name in names])


def test_otp_21_sup_stop_race() -> None:
    """Twelve children end by themselves, each in its way, while their supervisor stops them."""
    ends = {f"{restart.value} {exit}": (restart, exit) for restart in Restart for exit in (NORMAL, SHUTDOWN, CRASH, KILLED)}
    assert len(ends) == 12
    world = World(*(child(name, restart) for name, (restart, _) in ends.items()), child("last"))
    world.ends["last"] = LATER
    world.end()
    for name, (_, exit) in ends.items():
        world.exits(name, exit)
    world.exits("last", STOPPED)
    assert world.down == STOPPED
    errors = {report.id: report.exit for report in world.reports if report.what is What.SHUTDOWN_ERROR}
    good = {name for name, (restart, exit) in ends.items() if exit == SHUTDOWN or (exit == NORMAL and restart is not PERMANENT)}
    assert errors == {name: exit for name, (_, exit) in ends.items() if name not in good}


def test_otp_22_sup_stop_non_shutdown_exit_dynamic() -> None:
    world = World(child("a"), child("b", Restart.TRANSIENT), flags=DYNAMIC)
    world.ends["a"] = world.ends["b"] = NORMAL
    world.end()
    assert world.down == STOPPED
    assert world.whats("a") == [What.STARTED, What.SHUTDOWN_ERROR]
    assert world.whats("b") == [What.STARTED]


# --- administration ---


def test_otp_23_child_adm() -> None:
    world = World(child("a"))
    assert world.refusal(StartChild(child("a"))) == "a has been started already"
    assert world.refusal(RestartChild("a")) == world.refusal(DeleteChild("a")) == "a is running"
    assert world.call(TerminateChild("a")) is None
    assert world.call(TerminateChild("a")) is None
    assert world.take() == ["start a", "tell a", "down a"]
    assert world.refusal(StartChild(child("a"))) == "a is present already"
    assert world.call(CountChildren()) == Counts(1, 0, 0, 1)
    assert world.call(RestartChild("a")).state is State.RUNNING
    assert world.refusal(RestartChild("a")) == "a is running"
    world.call(TerminateChild("a"))
    assert world.call(DeleteChild("a")) is None
    for request in (DeleteChild("a"), RestartChild("a"), TerminateChild("a"), GetChildSpec("a")):
        assert world.refusal(request) == "there is no child a"
    assert world.call(WhichChildren()) == ()
    world.end()
    assert world.refusal(WhichChildren()) == "the supervisor has ended"


def test_otp_24_child_adm_simple() -> None:
    world = World(flags=DYNAMIC)
    for name in "ab":
        assert world.call(StartChild(child(name))).state is State.RUNNING
    assert world.refusal(RestartChild("a")) == world.refusal(DeleteChild("a")) == "a is running"
    assert world.call(TerminateChild("a")) is None
    assert world.refusal(TerminateChild("a")) == "there is no child a"
    assert world.states() == {"b": State.RUNNING}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"id": ""}, "id is empty"),
        ({"id": 1}, "id is empty or no text: 1"),
        ({"start": None}, "start is None"),
        ({"restart": "always"}, "restart is 'always'"),
        ({"shutdown_s": -1}, "shutdown_s is -1"),
        ({"shutdown_s": float("nan")}, "shutdown_s is nan"),
        ({"type": "wrker"}, "type is 'wrker'"),
        ({"significant": "maybe"}, "significant is 'maybe'"),
        ({"significant": True}, "this one is permanent"),
        ({"start_timeout_s": 0}, "start_timeout_s is 0"),
        ({"progress_s": -1}, "progress_s is -1"),
        ({"budgets": {Cause.CRASH: 3}}, "Cause.CRASH has 3"),
        ({"budgets": {"crash": Budget(1, 1.0)}}, "crash has Budget"),
        ({"budgets": {Cause.CRASH: Budget(-1, 1.0)}}, "restarts=-1"),
    ],
)
def test_otp_26_child_specs(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        ChildSpec(**{"id": "a", "start": never_called, **fields})


def test_otp_27_child_specs_map() -> None:
    """What is wrong only for this supervisor is refused when it is added."""
    world = World()
    spec = child("a", Restart.TRANSIENT, significant=True)
    assert "auto_shutdown is never" in world.refusal(StartChild(spec))
    assert World(flags=flags(auto_shutdown=AutoShutdown.ANY_SIGNIFICANT)).call(StartChild(spec)).state is State.RUNNING


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"strategy": "none_for_one"}, "strategy is 'none_for_one'"),
        ({"intensity": -1}, "intensity is -1"),
        ({"period_s": 0}, "period_s is 0"),
        ({"auto_shutdown": "perhaps"}, "auto_shutdown is 'perhaps'"),
        ({"jitter": 1.1}, "jitter is 1.1"),
        ({"reset_s": 0}, "reset_s is 0"),
    ],
)
def test_otp_28_sup_flags(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        Flags(**fields)


# --- restart type × how it ended ---

PERMANENT, TRANSIENT, TEMPORARY = Restart.PERMANENT, Restart.TRANSIENT, Restart.TEMPORARY


def ends_alone(restart: Restart, exit: Exit) -> World:
    """Its sibling is not concerned, whatever comes."""
    world = World(child("sibling"), child("a", restart))
    world.take()
    world.exits("a", exit)
    assert world.rows()["sibling"].restarts == 0
    assert world.down is None
    return world


def is_restarted(world: World) -> bool:
    return world.take() == ["down a", "start a"] and world.states()["a"] is State.RUNNING


def test_otp_29_permanent_normal() -> None:
    assert is_restarted(ends_alone(PERMANENT, NORMAL))


def test_otp_30_transient_normal() -> None:
    world = ends_alone(TRANSIENT, NORMAL)
    assert world.take() == ["down a"]
    assert world.states()["a"] is State.DOWN
    assert world.call(CountChildren()) == Counts(2, 1, 0, 2)


def test_otp_31_temporary_normal() -> None:
    world = ends_alone(TEMPORARY, NORMAL)
    assert world.take() == ["down a"]
    assert "a" not in world.states()


def test_otp_32_permanent_shutdown() -> None:
    assert is_restarted(ends_alone(PERMANENT, SHUTDOWN))
    assert is_restarted(ends_alone(PERMANENT, Exit(Cause.SHUTDOWN, "and a word")))


def test_otp_33_transient_shutdown() -> None:
    world = ends_alone(TRANSIENT, SHUTDOWN)
    assert world.states()["a"] is State.DOWN
    assert world.forgotten == {"a"}


def test_otp_34_temporary_shutdown() -> None:
    assert "a" not in ends_alone(TEMPORARY, SHUTDOWN).states()


def test_otp_35_faulty_application_shutdown() -> None:
    """What went wrong at the bottom is in what the top says."""
    inner = World(child("a"), flags=flags(intensity=0))
    inner.exits("a", CRASH)
    assert inner.down is not None
    top = World(supervisor("inner"), flags=flags(intensity=0))
    top.exits("inner", inner.down)
    assert top.down == Exit(
        Cause.SHUTDOWN,
        "TooManyRestarts: more than 0 in 30 s; the last is inner "
        "(TooManyRestarts: more than 0 in 30 s; the last is a (ValueError: no))",
    )


def test_otp_36_permanent_abnormal() -> None:
    assert is_restarted(ends_alone(PERMANENT, CRASH))


def test_otp_37_transient_abnormal() -> None:
    assert is_restarted(ends_alone(TRANSIENT, CRASH))
    assert is_restarted(ends_alone(TRANSIENT, KILLED))


def test_otp_38_temporary_abnormal() -> None:
    world = ends_alone(TEMPORARY, CRASH)
    assert world.take() == ["down a"]
    assert "a" not in world.states()


@pytest.mark.parametrize("strategy", [Strategy.ONE_FOR_ALL, Strategy.REST_FOR_ONE])
def test_otp_39_temporary_bystander(strategy: Strategy) -> None:
    world = World(child("a"), child("b", TEMPORARY), flags=flags(strategy))
    world.take()
    world.exits("a")
    assert world.take() == ["down a", "tell b", "down b", "start a"]
    assert world.states() == {"a": State.RUNNING}
    assert world.down is None


# --- strategies ---


def test_otp_40_multiple_restarts() -> None:
    """A supervisor can restart for ever, below its intensity."""
    world = World(child("a"), flags=flags(intensity=1, period_s=1.0))
    for _ in range(1000):
        world.exits("a")
        world.passes(1.01)
    assert world.down is None
    assert world.rows()["a"].restarts == 1000


def test_otp_41_one_for_one() -> None:
    world = World(child("a"), child("b"), flags=flags(intensity=2, period_s=3600.0))
    before = world.rows()
    world.exits("a")
    after = world.rows()
    assert after["b"] == before["b"]
    assert after["a"].generation > before["a"].generation
    world.exits("a")
    world.take()
    world.exits("a")
    assert world.take() == ["down a", "tell b", "down b"]
    assert world.down == Exit(Cause.SHUTDOWN, "TooManyRestarts: more than 2 in 3600 s; the last is a (ValueError: no)")
    assert world.whats("a")[-1] is What.TOO_MANY_RESTARTS


def test_otp_42_one_for_one_escalation() -> None:
    world = World(child("a"), child("b"), flags=flags(intensity=4))
    world.begins["a"] = [FAILS] * 9
    world.take()
    world.exits("a")
    assert world.take() == ["down a", *["start a", "down a"] * 4, "tell b", "down b"]
    assert world.down is not None


def test_otp_43_one_for_all() -> None:
    world = World(child("a"), child("b"), child("c"), flags=flags(Strategy.ONE_FOR_ALL, intensity=2))
    before = world.rows()
    world.take()
    world.exits("b")
    assert world.take() == ["down b", "tell c", "down c", "tell a", "down a", "start a", "start b", "start c"]
    assert all(row.generation > before[id].generation for id, row in world.rows().items())
    world.exits("c")
    assert world.down is None  # each was one restart, however many were started
    world.exits("c")
    assert world.down is not None


def test_otp_44_one_for_all_escalation() -> None:
    world = World(child("a"), child("b"), flags=flags(Strategy.ONE_FOR_ALL, intensity=4))
    world.begins["a"] = [FAILS] * 9
    world.take()
    world.exits("a")
    assert world.take() == ["down a", "tell b", "down b", *["start a", "down a"] * 4]
    assert world.down is not None


def test_otp_45_one_for_all_other_child_fails_restart() -> None:
    world = World(child("a"), child("b"), flags=flags(Strategy.ONE_FOR_ALL))
    world.begins["b"] = [FAILS]
    world.take()
    world.exits("a")
    assert world.take()[6:] == ["tell a", "down a", "start a", "start b"]  # a had been started already


def test_otp_46_simple_one_for_one() -> None:
    world = World(flags=flags(Strategy.DYNAMIC, intensity=2, period_s=3600.0))
    for name in "abc":
        world.call(StartChild(child(name)))
    before = world.rows()
    world.exits("a")
    assert {id for id, row in world.rows().items() if row != before[id]} == {"a"}
    world.exits("a")
    world.exits("b")
    assert world.down is not None


def test_otp_47_simple_one_for_one_shutdown() -> None:
    """Those that take long to end take it together."""
    world = World(*(child(name, shutdown_s=10.0) for name in "abcde"), flags=DYNAMIC)
    for name in "abcde":
        world.ends[name] = LATER
    world.end()
    world.passes(3.0)
    for name in "abcde":
        world.exits(name, STOPPED)
    assert world.down == STOPPED


def test_otp_48_simple_one_for_one_extra() -> None:
    """Each child is started again as itself."""
    world = World(flags=DYNAMIC)
    for seconds in (1.0, 2.0):
        world.call(StartChild(child(f"for {seconds}", shutdown_s=seconds)))
    world.exits("for 2.0")
    assert world.call(GetChildSpec("for 2.0")).shutdown_s == 2.0


def test_otp_49_simple_one_for_one_escalation() -> None:
    world = World(flags=flags(Strategy.DYNAMIC, intensity=4))
    for name in "ab":
        world.call(StartChild(child(name)))
    world.begins["a"] = [FAILS] * 9
    world.take()
    world.exits("a")
    assert world.take() == ["down a", *["start a", "down a"] * 4, "tell b", "down b"]


class Argument:
    """What a child is started with."""

    def __call__(self) -> Any:
        return never_called()


def start_with_argument(world: World, restart: Restart) -> weakref.ref[Argument]:
    argument = Argument()
    world.call(StartChild(ChildSpec("a", argument, restart)))
    world.answers.clear()
    return weakref.ref(argument)


def test_otp_50_simple_one_for_one_corruption() -> None:
    """Nothing is kept of a temporary child that has ended."""
    world = World(flags=DYNAMIC)
    argument = start_with_argument(world, TEMPORARY)
    world.exits("a")
    gc.collect()
    assert argument() is None


def test_otp_51_rest_for_one() -> None:
    world = World(child("a"), child("b"), child("c"), child("d"), flags=flags(Strategy.REST_FOR_ONE, intensity=2))
    before = world.rows()
    world.take()
    world.exits("b")
    assert world.take() == ["down b", "tell d", "down d", "tell c", "down c", "start b", "start c", "start d"]
    assert {id for id, row in world.rows().items() if row != before[id]} == {"b", "c", "d"}


def test_otp_52_rest_for_one_escalation() -> None:
    world = World(child("a"), child("b"), flags=flags(Strategy.REST_FOR_ONE, intensity=4))
    world.begins["a"] = [FAILS] * 9
    world.take()
    world.exits("a")
    assert world.take() == ["down a", "tell b", "down b", *["start a", "down a"] * 4]
    assert world.down is not None


def test_otp_53_rest_for_one_other_child_fails_restart() -> None:
    world = World(child("a"), child("b"), child("c"), flags=flags(Strategy.REST_FOR_ONE))
    world.begins["b"] = [FAILS]
    world.take()
    world.exits("a")
    assert world.take()[8:] == ["start b", "start c"]  # and a goes on


# --- what else there is ---


def test_otp_54_child_unlink() -> None:
    """A child that does not listen cannot hang who terminates it."""
    world = World(child("a", shutdown_s=2.0))
    world.ends["a"] = LATER
    asked = world.ask(TerminateChild("a"))
    assert asked not in world.answers
    world.passes(2.0)
    assert world.answers[asked] is None
    assert world.states() == {"a": State.DOWN}


def test_otp_56_count_children() -> None:
    world = World(*(child(f"c{number}", TEMPORARY) for number in range(2000)), flags=DYNAMIC)
    assert world.call(CountChildren()) == Counts(2000, 2000, 0, 2000)
    for number in range(2000):
        world.exits(f"c{number}", KILLED)
    assert world.call(CountChildren()) == Counts(0, 0, 0, 0)


def test_otp_57_count_children_supervisor() -> None:
    world = World(child("a"), supervisor("b"), supervisor("c", TRANSIENT), child("d"))
    assert world.call(CountChildren()) == Counts(4, 4, 2, 2)
    world.exits("c", NORMAL)
    assert world.call(CountChildren()) == Counts(4, 3, 2, 2)


def test_otp_58_count_restarting_children() -> None:
    world = World(child("a"), child("b"), flags=flags(backoff_s=(1.0,)))
    world.exits("a")
    assert world.states() == {"a": State.RESTARTING, "b": State.RUNNING}
    assert world.call(CountChildren()) == Counts(2, 1, 0, 2)
    world.passes(1.0)
    assert world.call(CountChildren()) == Counts(2, 2, 0, 2)


def test_otp_60_do_not_save_start_parameters_for_temporary_children() -> None:
    for strategy in Strategy:
        world = World(flags=flags(strategy))
        argument = start_with_argument(world, TEMPORARY)
        world.call(TerminateChild("a"))
        world.answers.clear()
        gc.collect()
        assert argument() is None


@pytest.mark.parametrize("how", ["normally", "crashed", "killed", "terminated"])
def test_otp_61_do_not_save_child_specs_for_temporary_children(how: str) -> None:
    world = World(child("a", TEMPORARY))
    if how == "terminated":
        world.call(TerminateChild("a"))
    else:
        world.exits("a", {"normally": NORMAL, "crashed": CRASH, "killed": KILLED}[how])
    assert world.refusal(RestartChild("a")) == world.refusal(DeleteChild("a")) == "there is no child a"
    assert world.rows() == {}


def measured_s(count: int, dynamic: bool) -> float:
    specs = [child(f"c{number}", TEMPORARY) for number in range(count)]
    gc.collect()
    gc.disable()  # what it goes through is all that other tests have left, too
    try:
        began = time.thread_time()
        world = World(*([] if dynamic else specs), flags=DYNAMIC if dynamic else AT_ONCE)
        for spec in specs if dynamic else []:
            world.call(StartChild(spec))
        world.end()
        assert world.down == STOPPED
        return time.thread_time() - began
    finally:
        gc.enable()


def costs_less_than(times: float, few: int, many: int, dynamic: bool) -> bool:
    """Whether `many` children cost less than so many times what `few` do: once in three, for a machine may have much else to do."""
    measured_s(1000, dynamic)
    return any(measured_s(many, dynamic) < times * min(measured_s(few, dynamic) for _ in range(3)) for _ in range(3))


@pytest.mark.alone
def test_otp_62_simple_one_for_one_scale_many_temporary_children() -> None:
    assert costs_less_than(50, 500, 5000, dynamic=True)


def test_otp_64_hanging_restart_loop() -> None:
    """It answers and can be stopped while a child cannot be started again."""
    world = World(child("a"), flags=flags(intensity=None, backoff_s=(0.001,)))
    world.begins["a"] = [FAILS] * 10_000
    world.exits("a")
    world.passes(1.0)
    assert world.refusal(RestartChild("a")) == world.refusal(DeleteChild("a")) == "a is being restarted"
    assert world.refusal(StartChild(child("a"))) == "a is present already"
    assert world.call(CountChildren()) == Counts(1, 0, 0, 1)
    assert world.call(TerminateChild("a")) is None
    world.take()
    world.passes(1.0)
    assert world.take() == []
    assert world.refusal(RestartChild("a")) == "OSError: no"
    world.end()
    assert world.down == STOPPED


@pytest.mark.parametrize("asked", ["terminated", "ended"])
def test_otp_65_hanging_restart_loop_rest_for_one(asked: str) -> None:
    world = World(child("a"), child("b"), child("c"), flags=flags(Strategy.REST_FOR_ONE, intensity=None, backoff_s=(0.001,)))
    world.begins["b"] = [FAILS] * 10_000
    world.exits("b")
    world.passes(1.0)
    assert world.states() == {"a": State.RUNNING, "b": State.RESTARTING, "c": State.RESTARTING}
    assert world.refusal(RestartChild("b")) == world.refusal(DeleteChild("b")) == "b is being restarted"
    if asked == "terminated":
        world.call(TerminateChild("b"))
        world.passes(1.0)
        assert world.states() == {"a": State.RUNNING, "b": State.DOWN, "c": State.RUNNING}
    world.take()
    world.end()
    assert world.take() == (["tell c", "down c"] if asked == "terminated" else []) + ["tell a", "down a"]


def test_otp_66_hanging_restart_loop_simple() -> None:
    world = World(child("a"), flags=flags(Strategy.DYNAMIC, intensity=None, backoff_s=(0.001,)))
    world.begins["a"] = [FAILS] * 10_000
    world.exits("a")
    world.passes(1.0)
    assert world.refusal(RestartChild("a")) == "a is being restarted"
    assert world.call(TerminateChild("a")) is None
    assert world.rows() == {}


@pytest.mark.parametrize("strategy", [Strategy.ONE_FOR_ALL, Strategy.REST_FOR_ONE])
def test_otp_67_order_of_children(strategy: Strategy) -> None:
    world = World(*(child(name) for name in "abcde"), flags=flags(strategy))
    assert world.take() == [f"start {name}" for name in "abcde"]
    world.exits("c")
    stopped = "ed" if strategy is Strategy.REST_FOR_ONE else "edba"
    assert [line for line in world.log if line.startswith("tell")] == [f"tell {name}" for name in stopped]
    started = "cde" if strategy is Strategy.REST_FOR_ONE else "abcde"
    assert [line for line in world.take() if line.startswith("start")] == [f"start {name}" for name in started]
    world.end()
    assert [line for line in world.take() if line.startswith("tell")] == [f"tell {name}" for name in "edcba"]


@pytest.mark.alone
def test_otp_68_scale_start_stop_many_children() -> None:
    assert costs_less_than(30 * 3, 1000, 30_000, dynamic=False)


# --- significant children and auto-shutdown ---

ANY, ALL = AutoShutdown.ANY_SIGNIFICANT, AutoShutdown.ALL_SIGNIFICANT


def significant(id: str, restart: Restart) -> ChildSpec:
    return child(id, restart, significant=True)


@pytest.fixture(params=[ANY, ALL], ids=["any", "all"])
def mode(request: pytest.FixtureRequest) -> AutoShutdown:
    return request.param


def test_otp_75_nonsignificant_temporary(mode: AutoShutdown) -> None:
    for exit in (NORMAL, SHUTDOWN, CRASH, KILLED):
        world = World(child("a", TEMPORARY), child("b", TEMPORARY), flags=flags(auto_shutdown=mode))
        world.exits("a", exit)
        world.exits("b", exit)
        assert world.down is None


def test_otp_76_nonsignificant_transient(mode: AutoShutdown) -> None:
    world = World(child("a", TRANSIENT), child("b", TRANSIENT), flags=flags(auto_shutdown=mode))
    world.exits("a", NORMAL)
    world.exits("b", SHUTDOWN)
    assert world.down is None


def test_otp_77_significant_temporary(mode: AutoShutdown) -> None:
    for exit in (NORMAL, SHUTDOWN, CRASH, KILLED):
        world = World(significant("a", TEMPORARY), significant("b", TEMPORARY), child("c"), flags=flags(auto_shutdown=mode))
        world.exits("a", exit)
        assert (world.down is not None) == (mode is ANY)
        if mode is ALL:
            world.exits("b", exit)
        assert world.down is not None and world.down.cause is Cause.SHUTDOWN
        assert world.whats()[-1] is What.AUTO_SHUTDOWN
    world = World(significant("a", TEMPORARY), flags=flags(auto_shutdown=mode))
    world.call(TerminateChild("a"))
    assert world.down is None


def test_otp_78_significant_transient(mode: AutoShutdown) -> None:
    world = World(significant("a", TRANSIENT), significant("b", TRANSIENT), flags=flags(auto_shutdown=mode))
    world.exits("a", CRASH)
    world.exits("a", KILLED)
    assert world.rows()["a"].restarts == 2
    world.call(TerminateChild("b"))
    assert world.down is None
    world.exits("a", NORMAL)  # b is down, and is not waited for
    assert world.down is not None and world.down.cause is Cause.SHUTDOWN


def test_otp_79_significant_simple(mode: AutoShutdown) -> None:
    world = World(flags=flags(Strategy.DYNAMIC, auto_shutdown=mode))
    for name in "ab":
        world.call(StartChild(significant(name, TRANSIENT)))
    world.call(TerminateChild("a"))
    assert world.down is None
    world.exits("b", CRASH)
    assert world.down is None
    world.exits("b", NORMAL)
    assert world.down is not None


@pytest.mark.parametrize("strategy", [Strategy.ONE_FOR_ONE, Strategy.ONE_FOR_ALL, Strategy.REST_FOR_ONE])
def test_otp_80_significant_bystander(mode: AutoShutdown, strategy: Strategy) -> None:
    """The end that a sibling's end brings with it is not an end by itself."""
    world = World(
        child("a"), significant("b", TRANSIENT), significant("c", TEMPORARY), flags=flags(strategy, auto_shutdown=mode)
    )
    world.exits("a", CRASH)
    assert world.down is None
    expected = {"a", "b", "c"} if strategy is Strategy.ONE_FOR_ONE else {"a", "b"}
    assert set(world.states()) == expected


def test_otp_81_significant_escalation(mode: AutoShutdown) -> None:
    """A nested supervisor that shuts down by itself is a significant child that has ended in order."""
    inner = World(significant("a", TRANSIENT), flags=flags(auto_shutdown=mode))
    inner.exits("a", NORMAL)
    assert inner.down is not None
    top = World(supervisor("inner", TRANSIENT, significant=True), child("other"), flags=flags(auto_shutdown=mode))
    top.exits("inner", inner.down)
    assert top.down is not None
    assert top.down.cause is Cause.SHUTDOWN


# --- and of the core itself ---


@pytest.mark.parametrize("module", [supervision, administration])
def test_it_is_pure(module: ModuleType) -> None:
    """It imports nothing that could do something, and reads no clock."""
    source = inspect.getsource(module)
    imported = set(re.findall(r"^(?:from|import) (\S+)", source, re.MULTILINE))
    pure = {"__future__", "itertools", "math", "random", "collections", "collections.abc", "dataclasses", "enum", "typing"}
    others = ("administration", "children", "deadlines", "exits", "restarts", "rules", "spec", "strategy")
    ours = {f"supervisor.{name}" for name in others}
    assert imported <= pure | ours
