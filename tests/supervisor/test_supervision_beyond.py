"""What the rule book has and OTP has not: pauses, time-outs, budgets, hung children, and children that must be."""

from __future__ import annotations

import math

import pytest

from supervisor.exits import Begun, Cause, Exit, Exited
from supervisor.rules import EnsureChild, Hung, RestartChild, StartChild, State, TerminateChild, What
from supervisor.spec import AutoShutdown, Budget, Restart
from supervisor.strategy import Strategy
from tests.supervisor.rulebook import CRASH, KILLED, LATER, NORMAL, STOPPED, World, child, flags, supervisor

FAILS = Exit(Cause.CRASH, "OSError: no")


# --- pauses ---


def test_a_child_is_started_again_when_its_pause_is_over_and_not_before() -> None:
    world = World(child("a"), flags=flags(backoff_s=(0.0, 1.0, 4.0)))
    world.take()
    world.exits("a")
    assert world.take() == ["down a", "start a"]
    for pause_s in (1.0, 4.0, 4.0):
        world.exits("a")
        world.passes(pause_s - 0.001)
        assert world.take() == ["down a"]
        world.passes(0.002)
        assert world.take() == ["start a"]


def test_a_long_life_begins_the_pauses_anew() -> None:
    world = World(child("a"), flags=flags(intensity=None, backoff_s=(0.0, 1.0), reset_s=10.0))
    world.exits("a")
    world.exits("a")
    world.passes(1.0)
    world.passes(10.5)
    world.take()
    world.exits("a")
    assert world.take() == ["down a", "start a"]


def test_a_pause_is_longer_by_its_jitter() -> None:
    """The world's chance is always 1, the greatest."""
    world = World(child("a"), flags=flags(backoff_s=(1.0,), jitter=0.5))
    world.take()
    world.exits("a")
    world.passes(1.49)
    assert world.take() == ["down a"]
    world.passes(0.02)
    assert world.take() == ["start a"]


def test_one_s_pause_holds_nobody_up() -> None:
    world = World(child("a"), child("b"), flags=flags(backoff_s=(0.0, 5.0)))
    for name in "aab":
        world.exits(name)
    assert world.states() == {"a": State.RESTARTING, "b": State.RUNNING}
    world.passes(5.0)
    assert world.states() == {"a": State.RUNNING, "b": State.RUNNING}


def test_a_slow_start_holds_nobody_up() -> None:
    world = World(child("a"), child("b"))
    world.begins["b"] = [LATER]
    world.exits("b")
    world.take()
    assert world.call(StartChild(child("c"))).state is State.RUNNING
    world.exits("a")
    assert world.take() == ["start c", "down a", "start a"]


def test_a_group_waits_for_the_pause_when_it_is_down() -> None:
    world = World(child("a"), child("b"), flags=flags(Strategy.ONE_FOR_ALL, backoff_s=(2.0,)))
    world.take()
    world.exits("a")
    world.passes(1.9)
    assert world.take() == ["down a", "tell b", "down b"]
    world.passes(0.2)
    assert world.take() == ["start a", "start b"]


def test_a_pause_is_no_obstacle_to_the_end() -> None:
    world = World(child("a"), child("b"), flags=flags(Strategy.ONE_FOR_ALL, backoff_s=(1000.0,)))
    world.exits("a")
    world.end()
    assert world.down == STOPPED
    world.take()
    world.passes(2000.0)
    assert world.take() == []


# --- a start takes its time ---


def test_a_start_that_takes_too_long_at_the_first_start_is_a_failed_start() -> None:
    world = World(child("a"), child("b", start_timeout_s=3.0, shutdown_s=1.0), begin=False)
    world.begins["b"], world.ends["b"] = [LATER], LATER
    world.begin()
    world.passes(2.9)
    assert world.take() == ["start a", "start b"]
    world.passes(0.2)
    assert world.take() == ["tell b"]
    world.passes(1.0)
    assert world.take() == ["kill b", "down b", "tell a", "down a"]
    assert world.down == Exit(Cause.START, "b: not begun after 3 s")


def test_a_restart_that_takes_too_long_is_tried_again() -> None:
    world = World(child("a"), flags=flags(start_timeout_s=3.0))
    world.begins["a"] = [LATER, LATER]
    world.exits("a")
    world.take()
    world.passes(3.0)
    assert world.take() == ["tell a", "down a", "start a"]
    world.passes(3.0)
    assert world.take() == ["tell a", "down a", "start a"]
    assert world.states() == {"a": State.RUNNING}
    assert world.rows()["a"].restarts == 3


def test_a_new_child_that_takes_too_long_is_refused() -> None:
    world = World(flags=flags(Strategy.DYNAMIC, start_timeout_s=3.0))
    world.begins["a"] = [LATER]
    asked = world.ask(StartChild(child("a")))
    world.passes(3.0)
    assert str(world.answers[asked]) == "not begun after 3 s"
    assert world.rows() == {}


def test_a_supervisor_may_take_as_long_as_its_children_do() -> None:
    world = World(supervisor("a"), begin=False)
    world.begins["a"] = [LATER]
    world.begin()
    world.passes(1e6)
    assert world.take() == ["start a"]
    world.begun("a")
    assert world.up


def test_a_child_that_begins_while_it_is_told_to_end_has_ended_all_the_same() -> None:
    world = World(child("a", start_timeout_s=3.0), child("b"))
    world.begins["a"], world.ends["a"] = [LATER], LATER
    world.exits("a")
    world.passes(3.0)
    world.begun("a")
    assert world.states()["a"] is State.STOPPING
    world.exits("a", STOPPED)
    assert world.states()["a"] is State.RUNNING


# --- children that must be ---


def test_a_child_that_must_be_is_tried_until_it_begins() -> None:
    world = World(flags=flags(Strategy.DYNAMIC, intensity=None, backoff_s=(1.0,)))
    world.begins["a"] = [FAILS, FAILS]
    assert world.call(EnsureChild(child("a"))).state is State.STARTING
    world.passes(2.0)
    assert world.states() == {"a": State.RUNNING}
    assert world.rows()["a"].restarts == 2


def test_to_ask_again_for_a_child_that_must_be_changes_nothing() -> None:
    world = World()
    first = world.call(EnsureChild(child("a")))
    assert world.call(EnsureChild(child("a", Restart.TEMPORARY))).generation == first.generation
    assert world.take() == ["start a"]


def test_a_child_that_must_be_is_started_when_it_is_down() -> None:
    world = World(child("a", Restart.TRANSIENT))
    world.exits("a", NORMAL)
    assert world.call(EnsureChild(child("a"))).state is State.STARTING
    assert world.states() == {"a": State.RUNNING}


# --- budgets ---


def test_a_child_whose_budget_is_used_up_is_given_up_alone() -> None:
    world = World(child("a", budgets={Cause.CRASH: Budget(2, 60.0)}), child("b"), flags=flags(intensity=None))
    for _ in range(2):
        world.exits("a", CRASH)
    world.take()
    world.exits("a", CRASH)
    assert world.take() == ["down a"]
    assert world.states() == {"a": State.FAILED, "b": State.RUNNING}
    assert world.whats("a")[-1] is What.GIVEN_UP
    assert world.forgotten == {"a"}  # who asks it is refused, and does not wait
    assert world.down is None


def test_each_cause_has_a_budget_of_its_own() -> None:
    budgets = {Cause.CRASH: Budget(1, 60.0), Cause.HUNG: Budget(1, 60.0)}
    world = World(child("a", budgets=budgets), flags=flags(intensity=None))
    world.exits("a", CRASH)
    world.hangs("a")
    for _ in range(9):
        world.exits("a", KILLED)  # for which there is none: it may go on for ever
    assert world.states() == {"a": State.RUNNING}
    world.hangs("a")
    assert world.states() == {"a": State.FAILED}


def test_a_budget_is_for_a_time() -> None:
    world = World(child("a", budgets={Cause.CRASH: Budget(1, 10.0)}), flags=flags(intensity=None))
    for _ in range(20):
        world.exits("a", CRASH)
        world.passes(10.1)
    assert world.states() == {"a": State.RUNNING}


@pytest.mark.parametrize("cause", [Cause.START, Cause.START_TIMEOUT])
def test_starts_that_fail_have_budgets_too(cause: Cause) -> None:
    world = World(child("a", budgets={cause: Budget(3, 60.0)}, start_timeout_s=1.0), flags=flags(intensity=None))
    world.begins["a"] = [FAILS if cause is Cause.START else LATER] * 99
    world.exits("a")
    world.passes(59.0)
    assert world.states() == {"a": State.FAILED}
    assert world.rows()["a"].restarts == 4


def test_a_child_that_was_given_up_is_started_by_hand_with_a_new_budget() -> None:
    world = World(child("a", budgets={Cause.CRASH: Budget(1, 60.0)}), flags=flags(intensity=None))
    for _ in range(2):
        world.exits("a", CRASH)
    assert world.call(RestartChild("a")).state is State.RUNNING
    world.exits("a", CRASH)
    assert world.states() == {"a": State.RUNNING}


@pytest.mark.parametrize("strategy", [Strategy.ONE_FOR_ALL, Strategy.REST_FOR_ONE])
def test_a_child_that_was_given_up_is_left_alone_by_its_group(strategy: Strategy) -> None:
    world = World(
        child("a"), child("b", budgets={Cause.CRASH: Budget(0, 60.0)}), child("c"), flags=flags(strategy, intensity=None)
    )
    world.exits("b", CRASH)
    world.take()
    world.exits("a")
    assert world.take() == ["down a", "tell c", "down c", "start a", "start c"]
    assert world.states()["b"] is State.FAILED


def test_a_significant_child_that_was_given_up_has_ended_for_good() -> None:
    spec = child("a", Restart.TRANSIENT, significant=True, budgets={Cause.CRASH: Budget(0, 60.0)})
    world = World(spec, flags=flags(auto_shutdown=AutoShutdown.ANY_SIGNIFICANT))
    world.exits("a", CRASH)
    assert world.down is not None and world.down.cause is Cause.SHUTDOWN


# --- hung ---


def test_a_child_that_hangs_is_killed_and_started_again() -> None:
    world = World(child("a"), child("b"))
    world.take()
    world.hangs("a")
    assert world.take() == ["kill a", "down a", "start a"]
    assert world.whats("a")[1:] == [What.HUNG, What.ENDED, What.STARTED]
    assert world.reports[-2].exit == Exit(Cause.HUNG, "makes no progress")


def test_a_child_that_hangs_takes_its_group_with_it() -> None:
    world = World(child("a"), child("b"), flags=flags(Strategy.ONE_FOR_ALL))
    world.take()
    world.hangs("b")
    assert world.take() == ["kill b", "down b", "tell a", "down a", "start a", "start b"]


def test_a_temporary_child_that_hangs_is_not_started_again() -> None:
    world = World(child("a", Restart.TEMPORARY))
    world.hangs("a")
    assert world.rows() == {}


# --- several things at once ---


def test_words_of_an_earlier_generation_mean_nothing() -> None:
    world = World(child("a"))
    old = world.alive["a"]
    world.exits("a")
    world.take()
    for late in (Exited("a", old, CRASH), Begun("a", old), Hung("a", old, "late"), Exited("nobody", 0, CRASH)):
        world.happens(late)
    assert world.take() == []
    assert world.states() == {"a": State.RUNNING}


def test_a_sibling_that_dies_while_its_group_is_stopped_is_not_counted() -> None:
    world = World(*(child(name) for name in "abc"), flags=flags(Strategy.ONE_FOR_ALL, intensity=1))
    world.ends["c"] = LATER
    world.take()
    world.exits("a")
    world.exits("b", CRASH)  # which has not been told yet, since c takes its time
    world.exits("c", STOPPED)
    assert world.take() == ["down a", "tell c", "down b", "down c", "start a", "start b", "start c"]
    assert world.down is None


def test_a_child_that_was_started_again_and_dies_before_its_group_is_complete_starts_it_over() -> None:
    world = World(*(child(name) for name in "abc"), flags=flags(Strategy.REST_FOR_ONE))
    world.begins["b"] = [LATER]
    world.take()
    world.exits("a")
    assert world.take()[-2:] == ["start a", "start b"]
    world.exits("a")
    assert world.take() == ["down a", "tell b", "down b", "start a", "start b", "start c"]


def test_a_child_that_is_added_while_its_group_is_started_again_waits_for_its_turn() -> None:
    world = World(child("a"), child("b"), flags=flags(Strategy.ONE_FOR_ALL))
    world.begins["a"] = [LATER]
    world.exits("b")
    world.take()
    asked = world.ask(StartChild(child("c")))
    assert world.take() == []
    assert asked not in world.answers
    world.begun("a")
    assert world.take() == ["start b", "start c"]
    assert world.answers[asked].state is State.RUNNING


def test_a_child_that_is_terminated_while_its_group_is_stopped_stays_down() -> None:
    world = World(child("a"), child("b"), flags=flags(Strategy.ONE_FOR_ALL))
    world.ends["b"] = LATER
    world.exits("a")
    asked = world.ask(TerminateChild("b"))
    world.exits("b", STOPPED)
    assert world.answers[asked] is None
    assert world.states() == {"a": State.RUNNING, "b": State.DOWN}


def test_the_end_is_one_however_often_it_is_said() -> None:
    world = World(child("a"))
    world.ends["a"] = LATER
    world.end()
    world.end(Exit(Cause.CRASH, "another"))
    world.exits("a", STOPPED)
    world.end()
    assert world.down == STOPPED


def test_what_never_began_ends_at_once() -> None:
    world = World(child("a"), begin=False)
    world.end()
    assert world.down == STOPPED
    assert world.take() == []


def test_who_waits_for_a_start_is_refused_when_the_supervisor_ends() -> None:
    world = World(flags=flags(start_timeout_s=math.inf))
    world.begins["a"] = [LATER]
    asked = world.ask(StartChild(child("a")))
    world.end()
    assert str(world.answers[asked]) == "the supervisor ends"
    assert world.refusal(StartChild(child("b"))) == "the supervisor has ended"


def test_a_child_that_could_not_be_started_by_hand_is_tried_again_when_its_group_is() -> None:
    world = World(child("a"), child("b"), flags=flags(Strategy.REST_FOR_ONE))
    world.call(TerminateChild("b"))
    world.begins["b"] = [FAILS, FAILS]
    world.refusal(RestartChild("b"))
    assert world.states()["b"] is State.DOWN
    world.exits("a")
    assert world.states() == {"a": State.RUNNING, "b": State.RUNNING}


def test_an_end_for_good_is_reported_too() -> None:
    for restart in (Restart.TRANSIENT, Restart.TEMPORARY):
        world = World(child("a", restart))
        world.exits("a", NORMAL)
        assert world.whats("a") == [What.STARTED, What.ENDED]
        assert world.reports[-1].pause_s is None


def test_a_child_that_must_be_is_checked_as_well() -> None:
    world = World()
    assert "auto_shutdown is never" in world.refusal(EnsureChild(child("a", Restart.TRANSIENT, significant=True)))
    assert world.rows() == {}


def test_a_child_that_had_nothing_to_do_at_first_is_tried_again_when_its_group_is() -> None:
    world = World(child("a"), child("b"), flags=flags(Strategy.ONE_FOR_ALL), begin=False)
    world.begins["b"] = [NORMAL, FAILS]
    world.begin()
    world.exits("a")
    assert world.states() == {"a": State.RUNNING, "b": State.RUNNING}


@pytest.mark.parametrize("strategy", [Strategy.ONE_FOR_ALL, Strategy.REST_FOR_ONE])
def test_a_child_that_is_down_comes_back_with_its_group(strategy: Strategy) -> None:
    """As in OTP, where a group's restart starts every spec."""
    world = World(child("a"), child("b"), child("c", Restart.TRANSIENT), flags=flags(strategy))
    world.call(TerminateChild("b"))
    world.exits("c", NORMAL)
    assert world.forgotten == {"b", "c"}
    world.take()
    world.exits("a")
    assert world.take() == ["down a", "start a", "start b", "start c"]
    assert world.forgotten == set()


def test_a_temporary_child_that_waits_for_its_turn_is_not_forgotten_when_its_group_starts_over() -> None:
    world = World(child("a"), child("b"), flags=flags(Strategy.ONE_FOR_ALL))
    world.begins["a"] = [LATER, LATER]
    world.exits("b")
    asked = world.ask(StartChild(child("c", Restart.TEMPORARY)))
    world.exits("a", FAILS)  # and so the group starts over, while c waits
    world.take()
    world.begun("a")
    assert world.take() == ["start b", "start c"]
    assert world.answers[asked].state is State.RUNNING


def test_who_adds_a_temporary_child_that_is_stopped_with_its_group_is_refused() -> None:
    world = World(child("a"), flags=flags(Strategy.ONE_FOR_ALL))
    world.begins["b"] = [LATER]
    asked = world.ask(StartChild(child("b", Restart.TEMPORARY)))
    world.exits("a")
    assert str(world.answers[asked]) == "b ended with its siblings"
    assert world.states() == {"a": State.RUNNING}


def test_a_child_that_is_down_and_before_the_group_stays_down() -> None:
    world = World(child("a"), child("b"), flags=flags(Strategy.REST_FOR_ONE))
    world.call(TerminateChild("a"))
    world.exits("b")
    assert world.states() == {"a": State.DOWN, "b": State.RUNNING}


def test_a_child_that_was_terminated_and_started_again_is_a_child_like_any_other() -> None:
    world = World(child("a"), child("b"), flags=flags(Strategy.ONE_FOR_ALL))
    world.call(TerminateChild("b"))
    world.call(RestartChild("b"))
    world.exits("a")
    assert world.states() == {"a": State.RUNNING, "b": State.RUNNING}


def test_while_the_supervisor_ends_nothing_is_started_by_hand() -> None:
    world = World(child("a"), child("b"))
    world.call(TerminateChild("b"))
    world.ends["a"] = LATER
    world.end()
    for request in (StartChild(child("c")), EnsureChild(child("c")), RestartChild("b")):
        assert world.refusal(request) == "the supervisor ends"


def test_a_child_that_fails_to_begin_while_the_supervisor_ends_has_ended() -> None:
    world = World(child("a"), child("b"))
    world.begins["a"], world.ends["b"] = [LATER], LATER
    world.exits("a")
    world.end()
    world.exits("a", FAILS)
    world.exits("b", STOPPED)
    assert world.down == STOPPED
