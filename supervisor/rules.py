"""What goes into the rule book (`supervision`) and what comes out of it: data only.

Events: `Begin`, `End`, `Begun`, `Exited`, `Hung`, `Tick`, and `Call` with one of the requests.  Effects: what the shell does at
once, in their order, and reports back as events.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from supervisor.answers import Vital
from supervisor.exits import Begun, Exit, Exited
from supervisor.spec import ChildSpec, Type


class State(Enum):
    """Of a child."""

    DOWN = "down"  # it has ended for good, was terminated, or had nothing to do; its spec is kept
    RESTARTING = "restarting"  # it is started again after a pause, or when it is its turn
    STARTING = "starting"
    STOPPING = "stopping"  # it was told to end
    KILLING = "killing"
    RUNNING = "running"
    FAILED = "failed"  # its budget for a cause is used up


class Phase(Enum):
    """Of a supervisor."""

    NEW = "new"
    STARTING = "starting"
    RUNNING = "running"
    ENDING = "ending"
    ENDED = "ended"


# --- events ---


@dataclass(frozen=True)
class Begin:
    """Start the children."""


@dataclass(frozen=True)
class End:
    """Stop the children; then this is over."""

    exit: Exit


@dataclass(frozen=True)
class Hung:
    """A child makes no progress."""

    id: str
    generation: int
    text: str


@dataclass(frozen=True)
class Tick(Vital):
    """What a `Wake` asked for; harmless at any other time."""

    due_s: float


@dataclass(frozen=True)
class StartChild:
    """A new child → its Row when it has begun.  One that cannot begin is forgotten, and refused with the reason."""

    spec: ChildSpec


@dataclass(frozen=True)
class EnsureChild:
    """There is a child of that id from now on → its Row, at once.  One that cannot begin is tried again like one that has ended."""

    spec: ChildSpec


@dataclass(frozen=True)
class TerminateChild:
    """→ None when it is down; its spec is kept unless it is temporary, or the strategy dynamic."""

    id: str


@dataclass(frozen=True)
class RestartChild:
    """Start a child that is down → its Row when it has begun."""

    id: str


@dataclass(frozen=True)
class DeleteChild:
    """Forget the spec of a child that is down → None."""

    id: str


@dataclass(frozen=True)
class WhichChildren:
    """→ a tuple of Row, in the order of start."""


@dataclass(frozen=True)
class CountChildren:
    """→ Counts."""


@dataclass(frozen=True)
class GetChildSpec:
    """→ ChildSpec."""

    id: str


Request = StartChild | EnsureChild | TerminateChild | RestartChild | DeleteChild | WhichChildren | CountChildren | GetChildSpec


@dataclass(frozen=True)
class Call:
    """An administrative request; `asker` is what `Reply` or `Refuse` comes with."""

    request: Request
    asker: Any


Event = Begin | End | Begun | Exited | Hung | Tick | Call


# --- answers ---


@dataclass(frozen=True)
class Row:
    id: str
    state: State
    type: Type
    generation: int
    restarts: int


@dataclass(frozen=True)
class Counts:
    """`specs` known, `active` ones (started and not ended), and of how many types the known ones are."""

    specs: int
    active: int
    supervisors: int
    workers: int


# --- effects ---


@dataclass(frozen=True)
class Launch:
    """Start an incarnation: `Begun` or `Exited` follows, and `Exited` after `Begun`."""

    spec: ChildSpec
    generation: int


@dataclass(frozen=True)
class Tell:
    """Tell it to end: `Exited` follows, or its time is over."""

    id: str
    generation: int


@dataclass(frozen=True)
class Kill:
    """End it without its doing, which nothing can refuse: `Exited` follows, when it is proven.  `why`: None when its spec wants it so."""

    id: str
    generation: int
    why: str | None


@dataclass(frozen=True)
class Wake:
    """Send a `Tick` of this moment when it has come."""

    due_s: float


@dataclass(frozen=True)
class Expect:
    """There is, or will be, somebody of that name: who asks it waits until it has begun."""

    id: str


@dataclass(frozen=True)
class Forget:
    """There is nobody of that name any more: who waits for it waits in vain."""

    id: str


@dataclass(frozen=True)
class Reply:
    asker: Any
    value: Any


@dataclass(frozen=True)
class Refuse:
    asker: Any
    text: str


@dataclass(frozen=True)
class Up:
    """All children that were to start have begun."""


@dataclass(frozen=True)
class Down:
    """All children have ended; the supervisor's own end is this."""

    exit: Exit


class What(Enum):
    """What `Report` says of a child (OTP's errorContext, and progress)."""

    STARTED = "started"
    START_FAILED = "start failed"
    ENDED = "ended"
    HUNG = "hung"
    SHUTDOWN_ERROR = "shutdown error"  # it ended otherwise than it was told to
    GIVEN_UP = "given up"  # its budget for this cause is used up
    TOO_MANY_RESTARTS = "too many restarts"  # of all children: the supervisor ends
    AUTO_SHUTDOWN = "auto-shutdown"


@dataclass(frozen=True)
class Report:
    """For log and event log.  `pause_s`: it is started again after so long; None: it is not."""

    what: What
    id: str
    generation: int
    exit: Exit
    pause_s: float | None = None


Effect = Launch | Tell | Kill | Wake | Expect | Forget | Reply | Refuse | Up | Down | Report
