"""How a task ended, and how one is made to end: decisions as tables, with no I/O in them.

The words are INTERFACE's.  `reason` is the first that applies:

    cancelled, timeout   it was asked to end before it had; of two askers the first counts
    oom                  the OOM killer struck in its control group, and it did not end with exit code 0
    signalled            a signal ended it; `signal` is set and `exit_code` is not
    exited               it ended by itself, `exit 139` included
    lost                 nobody can know
    None                 it never ran, which is no way to end; `error` says why
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, Literal

Cause = Literal["cancelled", "timeout"]
Reason = Literal["cancelled", "timeout", "oom", "signalled", "exited", "lost"]

NEVER_RAN: Final = "it was stopped before it had begun"
LOST: Final = "nobody can know how it ended: its process and everybody who watched it are gone. Run it again if that is safe"
STATUS_UNKNOWN: Final = "its exit code is not known: everybody who watched it is gone"
TIMED_OUT: Final = "it ran longer than its time-out, and was stopped: give it a longer one with --timeout"
OUT_OF_MEMORY: Final = "it needed more memory than its limit, and the OOM killer ended {}: give it a higher limit with --memory"
FORBIDDEN_CALL: Final = "it made a system call that no task may make, or is a program for another architecture"


@dataclass(frozen=True)
class Ending:
    """The fields of a result that say how it ended; `error`: what went wrong, and what to do."""

    state: Literal["stopped", "failed"]
    reason: Reason | None
    exit_code: int | None = None
    signal: int | None = None
    error: str | None = None


def conclude(*, ran: bool, status: int | None, stop_cause: Cause | None, oom_kills: int, error: str | None = None) -> Ending:
    """How a task ended.

    `ran`: its command was started.  `status`: the container's wait status, as waitpid(2) gives it, or None when nobody knows it.
    `stop_cause`: what asked it to end while it had not, the first if several did.  `oom_kills`: of its control group.
    `error`: what is known to have gone wrong besides.
    """
    if not ran:
        return Ending("failed", None, error=error or (None if stop_cause is None else NEVER_RAN))
    if status is None:
        if stop_cause is None:
            return Ending("failed", "lost", error=error or LOST)
        return Ending(
            "stopped", stop_cause, error=_joined([TIMED_OUT if stop_cause == "timeout" else None, STATUS_UNKNOWN, error])
        )
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    reason, text = _reason(code, number, stop_cause, oom_kills)
    return Ending("stopped", reason, code, number, _joined([text, error]))


def _reason(code: int | None, number: int | None, stop_cause: Cause | None, oom_kills: int) -> tuple[Reason, str | None]:
    if stop_cause is not None:
        return stop_cause, TIMED_OUT if stop_cause == "timeout" else None
    if oom_kills and code != 0:
        return "oom", OUT_OF_MEMORY.format("it" if number == signal.SIGKILL else "a process of its")
    if number is not None:
        return "signalled", FORBIDDEN_CALL if number == signal.SIGSYS else None
    return "exited", None


def _joined(texts: list[str | None]) -> str | None:
    return "; ".join(text for text in texts if text) or None


class Step(Enum):
    """One step of making a task end; each is taken when the one before it did not end it."""

    TERMINATE = auto()  # SIGTERM to all its processes
    WAIT = auto()  # the grace period
    KILL = auto()  # SIGKILL to all


# (force, SIGTERM would be heard by somebody) → what to do
LADDER: Final[dict[tuple[bool, bool], tuple[Step, ...]]] = {
    (True, True): (Step.KILL,),
    (True, False): (Step.KILL,),
    (False, True): (Step.TERMINATE, Step.WAIT, Step.KILL),
    (False, False): (Step.KILL,),  # to wait would be in vain
}


def ladder(force: bool, first_process_status: str, others: bool) -> tuple[Step, ...]:
    """How to make a task end.

    `first_process_status`: the text of /proc/PID/status (proc_pid_status(5)) of the container's first process.
    `others`: whether the container has other processes.
    """
    return LADDER[force, others or not may_ignore_sigterm(first_process_status)]


def may_ignore_sigterm(status: str) -> bool:
    """Whether the kernel drops a SIGTERM for the first process of a PID namespace.

    For such a process it drops every signal whose handler is the default one, as if it was ignored; unless it is blocked, for
    then it is kept and waited for: sigwait(3), signalfd(2), as tini and dumb-init do.
    """
    masks = {
        name: int(value, 16)
        for name, _, value in (line.partition(":") for line in status.splitlines())
        if name in ("SigCgt", "SigBlk")
    }
    return not (masks.get("SigCgt", 0) | masks.get("SigBlk", 0)) & 1 << signal.SIGTERM - 1
