"""A sandbox's life as one table, with no I/O in it.

A phase is entered with *effects* to carry out and left when the *facts* it awaits are known; facts only ever accumulate, and
may become known in any order (a command may have ended before the runtime's `start` has answered).  That is the whole
machine: `step` adds a fact to a `Life` and says what to do next.  A daemon that finds a sandbox alive builds a `Life` from
what it sees and goes on: recovery is a start with more facts.

    phase       effects on entry                  awaits                                then
    PREPARING   lease the image, mount the        image, workspace                      CREATING
                workspace
    CREATING    create the container, record      created, intended                     CREATED
                that it may start from now on
    CREATED                                       start asked                           STARTING
    STARTING    start it                          started                               RUNNING
    RUNNING     watch its clock                   ended                                 DRAINING
    DRAINING    wait for its last output          output whole                          SYNCING
    SYNCING     bring the workspace back          synced                                REPORTING
    REPORTING   record the result, report it      recorded, delete asked                RELEASING
    RELEASING   delete the container, give        deleted, workspace released,          GONE
                everything back, let the sinks    image released, output drained
                have all of the output
    GONE

What may go wrong before the command runs leads straight to REPORTING; whatever was there already is undone in RELEASING, whose
effects do nothing where there is nothing.  A stop asked for before the command runs is such a failure; later it is a ladder:
SIGTERM, the grace period, SIGKILL.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, auto


class Phase(Enum):
    PREPARING = auto()
    CREATING = auto()
    CREATED = auto()
    STARTING = auto()
    RUNNING = auto()
    DRAINING = auto()
    SYNCING = auto()
    REPORTING = auto()
    RELEASING = auto()
    GONE = auto()


class Fact(Enum):
    """What can become known of a sandbox."""

    IMAGE = auto()
    WORKSPACE = auto()
    CREATED = auto()
    INTENDED = auto()
    START_ASKED = auto()
    STARTED = auto()
    ENDED = auto()
    OUTPUT_WHOLE = auto()
    SYNCED = auto()
    RECORDED = auto()
    DELETE_ASKED = auto()
    DELETED = auto()
    WORKSPACE_RELEASED = auto()
    IMAGE_RELEASED = auto()
    OUTPUT_DRAINED = auto()
    FAILED = auto()  # something went wrong before the command ran
    STOP_ASKED = auto()
    KILL_ASKED = auto()  # a stop with force, or the grace period is over


class Effect(Enum):
    """What the actor is to do."""

    LEASE_IMAGE = auto()
    MOUNT_WORKSPACE = auto()
    CREATE = auto()
    RECORD_INTENT = auto()
    START = auto()
    WATCH_CLOCK = auto()
    DRAIN_OUTPUT = auto()
    SYNC = auto()
    RECORD_RESULT = auto()
    DELETE = auto()
    RELEASE_WORKSPACE = auto()
    RELEASE_IMAGE = auto()
    FINISH_OUTPUT = auto()
    TERMINATE = auto()
    KILL = auto()


@dataclass(frozen=True)
class Row:
    effects: tuple[Effect, ...]
    awaits: frozenset[Fact]
    then: Phase | None


def row(effects: tuple[Effect, ...], awaits: set[Fact], then: Phase | None) -> Row:
    return Row(effects, frozenset(awaits), then)


E, F, P = Effect, Fact, Phase
TABLE: dict[Phase, Row] = {
    P.PREPARING: row((E.LEASE_IMAGE, E.MOUNT_WORKSPACE), {F.IMAGE, F.WORKSPACE}, P.CREATING),
    P.CREATING: row((E.CREATE, E.RECORD_INTENT), {F.CREATED, F.INTENDED}, P.CREATED),
    P.CREATED: row((), {F.START_ASKED}, P.STARTING),
    P.STARTING: row((E.START,), {F.STARTED}, P.RUNNING),
    P.RUNNING: row((E.WATCH_CLOCK,), {F.ENDED}, P.DRAINING),
    P.DRAINING: row((E.DRAIN_OUTPUT,), {F.OUTPUT_WHOLE}, P.SYNCING),
    P.SYNCING: row((E.SYNC,), {F.SYNCED}, P.REPORTING),
    P.REPORTING: row((E.RECORD_RESULT,), {F.RECORDED, F.DELETE_ASKED}, P.RELEASING),
    P.RELEASING: row(
        (E.DELETE, E.RELEASE_WORKSPACE, E.RELEASE_IMAGE, E.FINISH_OUTPUT),
        {F.DELETED, F.WORKSPACE_RELEASED, F.IMAGE_RELEASED, F.OUTPUT_DRAINED},
        P.GONE,
    ),
    P.GONE: row((), set(), None),
}

BEFORE_THE_COMMAND = (P.PREPARING, P.CREATING, P.CREATED)
# From STARTING on the command may run, so a stop is a signal, and nothing but the container's end ends it.
WHILE_THE_COMMAND_MAY_RUN = (P.STARTING, P.RUNNING)


@dataclass(frozen=True)
class Life:
    """Where a sandbox stands."""

    phase: Phase
    facts: frozenset[Fact]

    @property
    def never_ran(self) -> bool:
        return F.STARTED not in self.facts and F.ENDED not in self.facts


def begin(facts: frozenset[Fact] = frozenset(), phase: Phase = Phase.PREPARING) -> tuple[Life, list[Effect]]:
    """A life in `phase`, in which `facts` are known already → the life, and what to do first."""
    return _advance(Life(phase, facts), list(TABLE[phase].effects))


def step(life: Life, fact: Fact) -> tuple[Life, list[Effect]]:
    """`fact` has become known → the life after it, and what to do now.  A fact known already changes nothing."""
    if fact in life.facts:
        return life, []
    life = replace(life, facts=life.facts | {fact})
    if life.phase in WHILE_THE_COMMAND_MAY_RUN:
        if fact is F.STOP_ASKED:
            return life, [E.TERMINATE]
        if fact is F.KILL_ASKED:
            return life, [E.KILL]
        if fact is F.FAILED:  # the runtime could not start the command
            return _enter(life, P.REPORTING)
    return _advance(life, [])


def _enter(life: Life, phase: Phase) -> tuple[Life, list[Effect]]:
    return _advance(replace(life, phase=phase), list(TABLE[phase].effects))


def _advance(life: Life, effects: list[Effect]) -> tuple[Life, list[Effect]]:
    """Leave phases as long as all they await is known."""
    if life.phase in BEFORE_THE_COMMAND and life.facts & {F.FAILED, F.STOP_ASKED, F.KILL_ASKED}:
        if life.phase is P.CREATING and not life.facts & {F.CREATED, F.FAILED}:
            return life, effects  # what is being made must be there, or have failed, before it can be undone
        return _enter(life, P.REPORTING)
    found = TABLE[life.phase]
    if found.then is None or not found.awaits <= life.facts:
        return life, effects
    life, more = _enter(life, found.then)
    return life, effects + more
