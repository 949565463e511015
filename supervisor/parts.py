"""The parts that a keeper keeps: processes that it starts, and starts again, and that outlive it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from supervisor.lockfile import holder_of, sign_of
from supervisor.pidfd import is_stopped, open_pidfd, signal_process, wait_ended, wait_status, waits_for_disk
from supervisor.pulse import Pulse
from supervisor.restarts import Backoff

BACKOFF_S = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # before the n-th restart in a row of a part that did not live for RESET_S
RESET_S = 10.0


class Part:
    """A process that the keeper starts, and starts again; or that another keeper started and this one found.

    Each holds the lock at `lock` while it lives, which is how it is found and why there are never two; and beats it.
    """

    def __init__(self, name: str, lock: Path, argv: Sequence[str]) -> None:
        self.name = name
        self.pid = 0
        self.pidfd = -1
        self.restarts = -1  # the first start is none
        self._has_signed = False
        self.due_s = 0.0  # when to start it, on the monotonic clock, while it does not run
        self._lock = lock
        self._argv = argv
        self._backoff = Backoff(BACKOFF_S, RESET_S)

    @property
    def running(self) -> bool:
        return self.pidfd >= 0

    def start(self) -> bool:
        """Find it, or start it → whether it was found.  Raises OSError when it can be neither; then it is `due_s` again later."""
        now = time.monotonic()
        self._backoff = self._backoff.started(now)
        try:
            pid, self.pidfd = self._find()
            found = self.running
            if not found:
                pid = spawn(self._argv)
                self.pidfd = open_pidfd(pid)  # not reaped by anybody but us, so the pid is still this process's
        except OSError:
            self._pause(now)
            raise
        self.pid = pid
        self.restarts += 1
        self._has_signed = False
        self._pulse = Pulse(pid, now)
        return found

    def look(self, now_s: float) -> bool:
        """See to it that it ends when it hangs; to be called every `pulse.LOOK_S` → whether it was found to."""
        if not self.running:
            return False
        sign = sign_of(self._lock)
        self._has_signed |= sign.pid == self.pid
        if self._has_signed and not sign.pid:
            return False  # somebody has deleted the lock: where it beats now, nobody sees
        stopped = not self._pulse.begun and is_stopped(self.pidfd)
        number = self._pulse.look(sign, now_s, stopped, partial(waits_for_disk, self.pidfd))
        if number is not None:
            self.signal(number)
        return number is not None

    def ended(self) -> int | None:
        """Note that it has ended, and when to start it again → its exit code (negative: a signal) if anybody can know it."""
        try:
            _, status = os.waitpid(self.pid, 0)
        except ChildProcessError:  # found, not started: its parent, or init, reaps it
            known = wait_status(self.pidfd)
            code = None if known is None else os.waitstatus_to_exitcode(known)
        else:
            code = os.waitstatus_to_exitcode(status)
        os.close(self.pidfd)
        self.pid, self.pidfd = 0, -1
        self._pause(time.monotonic())
        return code

    def signal(self, number: int) -> None:
        if self.running:
            signal_process(self.pidfd, number)

    def stop(self, timeout_s: float) -> int | None:
        """End it: by SIGTERM, and by SIGKILL when that takes too long → its exit code, as `ended` has it."""
        self.signal(signal.SIGTERM)
        wait_ended(self.pidfd, timeout_s)
        self.signal(signal.SIGKILL)
        return self.ended()

    def _find(self) -> tuple[int, int]:
        """Who holds the lock, by pid and pidfd; (0, -1) when nobody does."""
        pid = holder_of(self._lock)
        try:
            return (pid, open_pidfd(pid)) if pid else (0, -1)
        except ProcessLookupError:
            return 0, -1  # it ended just now

    def _pause(self, now_s: float) -> None:
        self._backoff, pause_s = self._backoff.ended(now_s)
        self.due_s = now_s + pause_s


def spawn(argv: Sequence[str]) -> int:
    """Start a program in a session of its own, with nothing open but 0, 1 and 2 → its pid.  Raises OSError."""
    child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, start_new_session=True)
    child.returncode = 0  # Popen must never reap it, nor warn: the keeper waits by pidfd, and its reaper is the only one
    return child.pid


def how(code: int | None) -> str:
    """An exit code, as `Part.ended` gives it, for a human."""
    if code is None:
        return "how is not known"
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
