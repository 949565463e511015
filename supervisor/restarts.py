"""Whether, and after which pause, a child is started again: pure, time and chance are arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Window:
    """The restarts of the last `period_s` seconds (OTP's restart intensity).

    A restart exactly `period_s` ago still counts, as in OTP.
    """

    intensity: int
    period_s: float
    restarts: tuple[float, ...] = ()

    def add(self, now_s: float) -> tuple[Window, bool]:
        """Count a restart → the window after it, and whether it is one too many."""
        recent = (*(moment for moment in self.restarts if moment >= now_s - self.period_s), now_s)
        return Window(self.intensity, self.period_s, recent), len(recent) > self.intensity


def exponential(first_s: float, max_s: float, factor: float = 2.0) -> tuple[float, ...]:
    """Pauses for `Backoff`: none before the first restart, then `first_s`, and each `factor` times the one before, up to `max_s`."""
    pauses_s = [0.0, first_s]
    while pauses_s[-1] < max_s:
        pauses_s.append(min(pauses_s[-1] * factor, max_s))
    return tuple(pauses_s)


@dataclass(frozen=True)
class Backoff:
    """The pauses between the restarts of one child.  A child that lived longer than `reset_s` begins anew.

    `jitter`: by how much of itself a pause may be longer, so that what died together does not come back together.
    """

    pauses_s: Sequence[float]
    reset_s: float
    failures: int = 0
    started_s: float = 0.0
    jitter: float = 0.0

    def started(self, now_s: float) -> Backoff:
        return replace(self, started_s=now_s)

    def ended(self, now_s: float, chance: float = 0.0) -> tuple[Backoff, float]:
        """→ the backoff after this end, and the pause before the next start, in seconds.  `chance`: from 0 to 1."""
        failures = 0 if now_s - self.started_s > self.reset_s else self.failures
        pause_s = self.pauses_s[min(failures, len(self.pauses_s) - 1)] * (1 + self.jitter * chance)
        return replace(self, failures=failures + 1), pause_s
