"""A task's record while it runs, and the result that is made of it: pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from actors.gateway.ledger import rfc3339
from actors.gateway.messages import Failure, State, Sync, TaskResult
from actors.sandbox import ending

NOTES_MAX = 20
CONFLICTS_MAX = SKIPPED_MAX = 100


@dataclass
class Record:
    """Moments are seconds since 1970, but `started_boot_s`, which is on CLOCK_BOOTTIME.

    `error` is why it never ran, or is lost; `notes` are what went wrong besides.
    """

    task: str
    accepted_at: float
    started_at: float | None = None
    started_boot_s: float | None = None
    ended_at: float | None = None
    status: int | None = None  # the wait status, where it is known from elsewhere than a held pidfd
    stop_cause: ending.Cause | None = None
    error: str | None = None
    failure: Failure | None = None
    sync: Sync = "none"
    sync_error: str | None = None
    conflicts: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    gaps: int = 0
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Remember something that went wrong; each text once."""
        if text not in self.notes and len(self.notes) < NOTES_MAX:
            self.notes.append(text)

    def fail(self, error: str, failure: Failure) -> None:
        """Remember why it never ran; the first reason counts."""
        if self.error is None:
            self.error, self.failure = error, failure

    def present(self, state: State) -> TaskResult:
        """The result as it stands before the end."""
        started_at = self.started_at if state == "running" else None
        return self._result(state, started_at, None, ending.Ending("failed", None))

    def conclude(self, ran: bool, status: int | None, oom_kills: int, now: float) -> TaskResult:
        """The result.  `status`: the container's wait status, None when nobody knows it."""
        end = ending.conclude(ran=ran, status=status, stop_cause=self.stop_cause, oom_kills=oom_kills, error=self.error)
        return self._result(end.state, self.started_at if ran else None, self.ended_at or now, end)

    def _result(self, state: State, started_at: float | None, finished_at: float | None, end: ending.Ending) -> TaskResult:
        over = finished_at is not None
        duration_s = max(0.0, finished_at - started_at) if finished_at is not None and started_at is not None else None
        return TaskResult(
            task=self.task,
            state=state,
            reason=end.reason,
            exit_code=end.exit_code,
            signal=end.signal,
            error="; ".join(filter(None, [end.error, *self.notes, self.sync_error])) or None if over else None,
            sync=self.sync if over else "none",
            created_at=rfc3339(self.accepted_at),
            started_at=None if started_at is None else rfc3339(started_at),
            finished_at=None if finished_at is None else rfc3339(finished_at),
            duration_s=duration_s,
            failure=self.failure if over and state == "failed" and end.reason is None else None,
            conflicts=self.conflicts[:CONFLICTS_MAX] if over else [],
            gaps=self.gaps if over else 0,
            skipped=self.skipped[:SKIPPED_MAX] if over else [],
        )
