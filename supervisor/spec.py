"""What a supervisor is told of its children, checked wholly before anything starts.  Terms and defaults are Erlang/OTP's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from supervisor.exits import Cause
from supervisor.restarts import exponential
from supervisor.strategy import Strategy

if TYPE_CHECKING:
    from supervisor.actor import Actor


class SpecError(ValueError):
    """A child spec or a supervisor's flags are wrong; the text names the value."""


class Restart(Enum):
    """When a child that has ended is started again."""

    PERMANENT = "permanent"  # always
    TRANSIENT = "transient"  # unless its end was a good one
    TEMPORARY = "temporary"  # never


class Type(Enum):
    WORKER = "worker"
    SUPERVISOR = "supervisor"


class AutoShutdown(Enum):
    """When the end of significant children, by themselves and for good, ends their supervisor (OTP 24)."""

    NEVER = "never"
    ANY_SIGNIFICANT = "any_significant"
    ALL_SIGNIFICANT = "all_significant"


@dataclass(frozen=True)
class Budget:
    """More than `restarts` restarts of a child within `period_s`, each for the same cause, are more than can be mended."""

    restarts: int
    period_s: float


@dataclass(frozen=True)
class ChildSpec:
    """A child: `start` makes its actor (and does not start it), under the name `id`.

    `shutdown_s`: how long it may take to end when it is told to.  0: it is not told but killed at once (OTP's brutal_kill);
    `math.inf`: as long as it takes (OTP's infinity).  None: 5 s for a worker, for ever for a supervisor.
    `start_timeout_s`: how long it may take to begin, at each of its starts.  None: its supervisor's flags say it for a worker; for
    ever for a supervisor, whose children have their own.
    `significant`: its end, by itself and for good, may end its supervisor (`Flags.auto_shutdown`).
    `progress_s`: a child that has the same message before it for longer than this hangs, and is replaced.  None: it may take its time.
    `budgets`: for each cause, how often it is started again; one that needs more is given up and left alone (`restart_child` starts
    it), while its siblings and its supervisor go on.
    """

    id: str
    start: Callable[[], Actor]
    restart: Restart = Restart.PERMANENT
    shutdown_s: float | None = None
    type: Type = Type.WORKER
    significant: bool = False
    start_timeout_s: float | None = None
    progress_s: float | None = None
    budgets: Mapping[Cause, Budget] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id:
            raise SpecError(f"a child's id is empty or no text: {self.id!r}")
        if not callable(self.start):
            raise SpecError(f"child {self.id}: start is {self.start!r}, which cannot be called")
        for name, kind in (("restart", Restart), ("type", Type), ("significant", bool)):
            if not isinstance(getattr(self, name), kind):
                raise SpecError(f"child {self.id}: {name} is {getattr(self, name)!r}; it must be a {kind.__name__}")
        if self.shutdown_s is not None and not self.shutdown_s >= 0:
            raise SpecError(f"child {self.id}: shutdown_s is {self.shutdown_s!r}; it must be 0 or more, or None")
        for name in ("start_timeout_s", "progress_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise SpecError(f"child {self.id}: {name} is {value!r}; it must be more than 0, or None")
        for cause, budget in self.budgets.items():
            if not (isinstance(cause, Cause) and isinstance(budget, Budget) and budget.restarts >= 0 and budget.period_s > 0):
                raise SpecError(
                    f"child {self.id}: {cause} has {budget!r}; it must be a Cause with a Budget of 0 or more in more than 0 s"
                )
        if self.significant and self.restart is Restart.PERMANENT:
            raise SpecError(f"child {self.id}: significant is for children that may end for good, and this one is permanent")

    @property
    def patience_s(self) -> float:
        """How long it may take to end when it is told to, whichever way that is said."""
        if self.shutdown_s is not None:
            return self.shutdown_s
        return math.inf if self.type is Type.SUPERVISOR else 5.0


@dataclass(frozen=True)
class Flags:
    """A supervisor's own rules.  More than `intensity` restarts within `period_s` are more than it can mend: it ends itself.

    None: it never gives up, and only pauses longer; for dynamic supervisors, whose children must not end each other.
    `backoff_s`: the pauses before the first, second… restart of a child in a row; the last one is repeated.  Each may be longer by
    up to `jitter` of itself.  `reset_s`: a child that lived longer than this begins anew; None: than `period_s`.
    `start_timeout_s`: how long each child may take to begin.
    """

    intensity: int | None = 5
    period_s: float = 30.0
    backoff_s: Sequence[float] = exponential(0.05, 5.0)
    start_timeout_s: float = 30.0
    strategy: Strategy = Strategy.ONE_FOR_ONE
    auto_shutdown: AutoShutdown = AutoShutdown.NEVER
    jitter: float = 0.1
    reset_s: float | None = None

    def __post_init__(self) -> None:
        for name, kind in (("strategy", Strategy), ("auto_shutdown", AutoShutdown)):
            if not isinstance(getattr(self, name), kind):
                raise SpecError(f"{name} is {getattr(self, name)!r}; it must be a {kind.__name__}")
        if self.intensity is not None and not self.intensity >= 0:
            raise SpecError(f"intensity is {self.intensity!r}; it must be 0 or more, or None")
        if not self.period_s > 0:
            raise SpecError(f"period_s is {self.period_s!r}; it must be more than 0")
        if not self.backoff_s or not min(self.backoff_s) >= 0:
            raise SpecError(f"backoff_s is {self.backoff_s!r}; it must be pauses of 0 s or more")
        if not self.start_timeout_s > 0:
            raise SpecError(f"start_timeout_s is {self.start_timeout_s!r}; it must be more than 0")
        if not 0 <= self.jitter <= 1:
            raise SpecError(f"jitter is {self.jitter!r}; it must be from 0 to 1")
        if self.reset_s is not None and not self.reset_s > 0:
            raise SpecError(f"reset_s is {self.reset_s!r}; it must be more than 0, or None")


def check_children(children: Iterable[ChildSpec], flags: Flags | None = None) -> None:
    """Raises SpecError when two children have the same id, or when one is significant and the flags give that no meaning."""
    auto_shutdown = (flags or Flags()).auto_shutdown
    seen: set[str] = set()
    for child in children:
        if child.id in seen:
            raise SpecError(f"two children have the id {child.id}")
        if child.significant and auto_shutdown is AutoShutdown.NEVER:
            raise SpecError(f"child {child.id} is significant, and its supervisor's auto_shutdown is never")
        seen.add(child.id)
