"""Whether, and after which pause, a child is started again: pure, the time is an argument."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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


@dataclass(frozen=True)
class Backoff:
    """The pauses between the restarts of one child.  A child that lived longer than `reset_s` begins anew."""

    pauses_s: Sequence[float]
    reset_s: float
    failures: int = 0
    started_s: float = 0.0

    def started(self, now_s: float) -> Backoff:
        return Backoff(self.pauses_s, self.reset_s, self.failures, now_s)

    def ended(self, now_s: float) -> tuple[Backoff, float]:
        """→ the backoff after this end, and the pause before the next start, in seconds."""
        failures = 0 if now_s - self.started_s > self.reset_s else self.failures
        pause_s = self.pauses_s[min(failures, len(self.pauses_s) - 1)]
        return Backoff(self.pauses_s, self.reset_s, failures + 1, self.started_s), pause_s
