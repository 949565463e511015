"""What the rule book (`supervision`) knows of one child."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

from supervisor.exits import Cause, Exit
from supervisor.restarts import Backoff, Window
from supervisor.rules import Row, State
from supervisor.spec import ChildSpec, Restart

AT_REST: Final = (State.DOWN, State.FAILED)
BUSY: Final = (State.STARTING, State.STOPPING, State.KILLING)  # something is waited for that the child does
ALIVE: Final = (State.RUNNING, *BUSY)


class Unbegun(Enum):
    """What it means when a child cannot begin."""

    ABORT = "abort"  # the supervisor cannot either: it is one of those that it starts with
    DISCARD = "discard"  # it is forgotten: somebody tried to add it
    KEEP = "keep"  # it stays down: somebody tried to start it again
    RETRY = "retry"  # it has begun before, or must be


@dataclass
class Child:
    """A child as the rule book knows it."""

    spec: ChildSpec
    backoff: Backoff
    unbegun: Unbegun
    state: State = State.DOWN
    generation: int = -1
    launches: int = 0
    verdict: Exit | None = None  # what its end will mean, when it is ended for what it did or did not
    terminating: bool = False
    askers: list[Any] = field(default_factory=list)  # who wait until it has begun or is down
    windows: dict[Cause, Window] = field(default_factory=dict)

    @property
    def restarts(self) -> int:
        return max(0, self.launches - 1)

    def row(self) -> Row:
        return Row(self.spec.id, self.state, self.spec.type, self.generation, self.restarts)


def acceptable(child: Child, exit: Exit) -> bool:
    """Whether a child that was to end has ended as it should (OTP's monitor_return)."""
    if child.spec.patience_s == 0:
        return exit.cause is Cause.KILLED
    return exit.cause is Cause.SHUTDOWN or (exit.cause is Cause.NORMAL and child.spec.restart is not Restart.PERMANENT)
