"""The table of a sandbox's life, exhaustively: whatever becomes known in whichever order, it ends, and undoes what it made."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.sandbox.states import TABLE, Effect, Fact, Life, Phase, begin, step

E, F, P = Effect, Fact, Phase
ASKED = frozenset({F.START_ASKED, F.DELETE_ASKED})
ORDER = list(Phase)

# What carrying out an effect makes known in the end, when all goes well.
LEADS_TO = {
    E.LEASE_IMAGE: F.IMAGE,
    E.MOUNT_WORKSPACE: F.WORKSPACE,
    E.CREATE: F.CREATED,
    E.RECORD_INTENT: F.INTENDED,
    E.START: F.STARTED,
    E.WATCH_CLOCK: F.ENDED,
    E.DRAIN_OUTPUT: F.OUTPUT_WHOLE,
    E.SYNC: F.SYNCED,
    E.RECORD_RESULT: F.RECORDED,
    E.DELETE: F.DELETED,
    E.RELEASE_WORKSPACE: F.WORKSPACE_RELEASED,
    E.RELEASE_IMAGE: F.IMAGE_RELEASED,
    E.FINISH_OUTPUT: F.OUTPUT_DRAINED,
    E.TERMINATE: F.ENDED,
    E.KILL: F.ENDED,
}
GIVEN_BACK = {E.DELETE, E.RELEASE_WORKSPACE, E.RELEASE_IMAGE}


def test_every_phase_has_a_row_and_leads_to_a_later_one() -> None:
    assert set(TABLE) == set(Phase)
    for phase, row in TABLE.items():
        assert row.then is None if phase is P.GONE else row.then is not None and row.then.value > phase.value


def test_every_effect_is_carried_out_somewhere_and_every_fact_is_awaited_or_is_an_event() -> None:
    in_table = {effect for row in TABLE.values() for effect in row.effects}
    assert in_table | {E.TERMINATE, E.KILL} == set(Effect)
    awaited = set().union(*(row.awaits for row in TABLE.values()))
    assert awaited | {F.FAILED, F.STOP_ASKED, F.KILL_ASKED} == set(Fact)


def test_a_task_that_goes_well_does_everything_once_and_in_order() -> None:
    life, todo = begin(ASKED)
    done: list[Effect] = []
    while todo:
        effect = todo.pop(0)
        done.append(effect)
        life, more = step(life, LEADS_TO[effect])
        todo += more
    assert life.phase is P.GONE
    assert done == [effect for phase in ORDER for effect in TABLE[phase].effects]


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("fact", list(Fact))
def test_a_fact_known_already_changes_nothing(phase: Phase, fact: Fact) -> None:
    life = Life(phase, frozenset({fact}))
    assert step(life, fact) == (life, [])


@pytest.mark.parametrize("bad", [F.FAILED, F.STOP_ASKED, F.KILL_ASKED])
@pytest.mark.parametrize("phase", [P.PREPARING, P.CREATED])
def test_what_goes_wrong_before_the_command_runs_is_reported_and_undone(phase: Phase, bad: Fact) -> None:
    life, effects = step(Life(phase, frozenset()), bad)
    assert life.phase is P.REPORTING and effects == [E.RECORD_RESULT] and life.never_ran


@pytest.mark.parametrize("bad", [F.STOP_ASKED, F.KILL_ASKED])
def test_a_creation_that_was_begun_is_over_before_it_is_undone(bad: Fact) -> None:
    life, effects = step(Life(P.CREATING, ASKED), bad)
    assert (life.phase, effects) == (P.CREATING, [])
    for over in (F.CREATED, F.FAILED):
        reported, effects = step(life, over)
        assert (reported.phase, effects) == (P.REPORTING, [E.RECORD_RESULT])


@pytest.mark.parametrize("phase", [P.STARTING, P.RUNNING])
def test_once_the_command_may_run_a_stop_is_a_signal(phase: Phase) -> None:
    life, effects = step(Life(phase, ASKED), F.STOP_ASKED)
    assert (life.phase, effects) == (phase, [E.TERMINATE])
    life, effects = step(life, F.KILL_ASKED)
    assert (life.phase, effects) == (phase, [E.KILL])


@pytest.mark.parametrize("phase", [P.DRAINING, P.SYNCING, P.REPORTING, P.RELEASING, P.GONE])
@pytest.mark.parametrize("late", [F.STOP_ASKED, F.KILL_ASKED, F.FAILED])
def test_what_comes_after_the_end_changes_nothing(phase: Phase, late: Fact) -> None:
    life, effects = step(Life(phase, ASKED), late)
    assert (life.phase, effects) == (phase, [])


def test_a_command_may_have_ended_before_its_start_is_answered() -> None:
    life, _ = step(Life(P.STARTING, ASKED), F.ENDED)
    assert life.phase is P.STARTING
    life, effects = step(life, F.STARTED)
    assert life.phase is P.DRAINING and effects == [E.WATCH_CLOCK, E.DRAIN_OUTPUT]


def test_a_created_sandbox_waits_until_it_is_asked_to_start_and_an_ended_one_until_it_is_asked_to_go() -> None:
    life, effects = begin(frozenset({F.IMAGE, F.WORKSPACE, F.CREATED, F.INTENDED}), P.CREATED)
    assert (life.phase, effects) == (P.CREATED, [])
    life, effects = step(life, F.START_ASKED)
    assert (life.phase, effects) == (P.STARTING, [E.START])
    life, effects = step(Life(P.REPORTING, frozenset()), F.RECORDED)
    assert (life.phase, effects) == (P.REPORTING, [])
    assert step(life, F.DELETE_ASKED)[0].phase is P.RELEASING


@given(st.permutations(list(Fact)))
def test_in_whichever_order_things_become_known_it_ends_and_gives_back_what_it_had(order: list[Fact]) -> None:
    life, effects = begin(ASKED)
    done = list(effects)
    for fact in order:
        before = life.phase
        life, effects = step(life, fact)
        assert life.phase.value >= before.value, "never back"
        done += effects
    assert life.phase is P.GONE
    in_order = [effect for effect in done if effect not in (E.TERMINATE, E.KILL)]
    assert len(in_order) == len(set(in_order)), "nothing twice"
    assert set(done) >= GIVEN_BACK | {E.RECORD_RESULT}
    assert done.index(E.RECORD_RESULT) < min(done.index(effect) for effect in GIVEN_BACK), "recorded before it is given back"
