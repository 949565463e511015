"""What a supervisor is told of a child, checked wholly before anything starts.  Terms and defaults are Erlang/OTP's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from supervisor.actor import Actor


class SpecError(ValueError):
    """A child spec or a supervisor's flags are wrong; the text names the value."""


class Restart(Enum):
    """When a child that has ended is started again."""

    PERMANENT = "permanent"  # always
    TRANSIENT = "transient"  # unless it ended normally
    TEMPORARY = "temporary"  # never


@dataclass(frozen=True)
class ChildSpec:
    """A child: `start` makes its actor (and does not start it), under the name `id`.

    `shutdown_s`: how long it may take to end when it is told to; None for as long as it takes (for supervisors).
    """

    id: str
    start: Callable[[], Actor]
    restart: Restart = Restart.PERMANENT
    shutdown_s: float | None = 5.0

    def __post_init__(self) -> None:
        if not self.id:
            raise SpecError("a child's id is empty")
        if not callable(self.start):
            raise SpecError(f"child {self.id}: start is {self.start!r}, which cannot be called")
        if not isinstance(self.restart, Restart):
            raise SpecError(f"child {self.id}: restart is {self.restart!r}; it must be one of Restart's")
        if self.shutdown_s is not None and self.shutdown_s < 0:
            raise SpecError(f"child {self.id}: shutdown_s is {self.shutdown_s!r}; it must be 0 or more, or None")


@dataclass(frozen=True)
class Flags:
    """A supervisor's own rules.  More than `intensity` restarts within `period_s` are more than it can mend: it ends itself.

    None: it never gives up, and only pauses longer; for dynamic supervisors, whose children must not end each other.
    `backoff_s`: the pauses before the first, second… restart of a child in a row; the last one is repeated.
    `start_timeout_s`: how long each static child may take to begin when its supervisor does.
    """

    intensity: int | None = 5
    period_s: float = 30.0
    backoff_s: Sequence[float] = (0.0, 0.05, 0.1, 0.5, 1.0, 5.0)
    start_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if self.intensity is not None and self.intensity < 0:
            raise SpecError(f"intensity is {self.intensity!r}; it must be 0 or more, or None")
        if self.period_s <= 0:
            raise SpecError(f"period_s is {self.period_s!r}; it must be more than 0")
        if not self.backoff_s or min(self.backoff_s) < 0:
            raise SpecError(f"backoff_s is {self.backoff_s!r}; it must be pauses of 0 s or more")
        if self.start_timeout_s <= 0:
            raise SpecError(f"start_timeout_s is {self.start_timeout_s!r}; it must be more than 0")


def check_children(children: Sequence[ChildSpec]) -> None:
    """Raises SpecError when two children have the same id."""
    seen: set[str] = set()
    for child in children:
        if child.id in seen:
            raise SpecError(f"two children have the id {child.id}")
        seen.add(child.id)
