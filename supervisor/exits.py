"""How an incarnation of a child ends, and the two words of it that its supervisor waits for: `Begun` and `Exited`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from supervisor.answers import Vital


class Cause(Enum):
    """Why it has ended.  The first two are good ends; the others are what budgets are kept for."""

    NORMAL = "normal"  # it had nothing more to do
    SHUTDOWN = "shutdown"  # it was told to, or ended in order all the same
    CRASH = "crash"  # it raised
    KILLED = "killed"  # it was not asked
    HUNG = "hung"  # it made no progress, and was killed for it
    START = "start"  # it could not begin
    START_TIMEOUT = "start time-out"  # it took too long to begin


@dataclass(frozen=True)
class Exit:
    """`text` is for a human."""

    cause: Cause
    text: str = ""

    @property
    def good(self) -> bool:
        """Whether a transient child that ends like this stays ended (OTP: normal, shutdown and {shutdown, _})."""
        return self.cause in (Cause.NORMAL, Cause.SHUTDOWN)

    def __str__(self) -> str:
        return self.text or self.cause.value


NORMAL = Exit(Cause.NORMAL)
STOPPED = Exit(Cause.SHUTDOWN, "stopped")


def of_code(code: int | None) -> Exit:
    """The end of a process: its exit code, negative after a signal, as `subprocess` has it; None when nobody can know it."""
    if code is None:
        return Exit(Cause.KILLED, "how is not known")
    if code < 0:
        return Exit(Cause.KILLED, f"killed by signal {-code}")
    return Exit(Cause.CRASH if code else Cause.NORMAL, f"exit code {code}")


@dataclass(frozen=True)
class Begun(Vital):
    """To a supervisor: an incarnation of its child is ready."""

    id: str
    generation: int


@dataclass(frozen=True)
class Exited(Vital):
    """To a supervisor: an incarnation of its child has ended.  When it had not begun, it could not be started."""

    id: str
    generation: int
    exit: Exit
