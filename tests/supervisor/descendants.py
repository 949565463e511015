"""The processes below this one."""

from __future__ import annotations

import ctypes
import os
import select
import signal
from contextlib import suppress
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


def descendants() -> list[int]:
    """All processes below this one, zombies included."""
    found, below = [], [os.getpid()]
    while below:
        parent = below.pop()
        threads: list[str] = []
        with suppress(FileNotFoundError, ProcessLookupError):  # here and below: it has just ended
            threads = os.listdir(f"/proc/{parent}/task")
        for thread in threads:
            with suppress(FileNotFoundError, ProcessLookupError):
                below += map(int, Path(f"/proc/{parent}/task/{thread}/children").read_text().split())
        found.append(parent)
    return found[1:]


def ends(pid: int, timeout_s: float) -> bool:
    """Whether the process has ended within that time."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], timeout_s)[0])
    finally:
        os.close(pidfd)


def reap() -> None:
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return


def become_subreaper(wanted: bool) -> None:
    assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0) == 0


def kill(pid: int) -> None:
    """SIGKILL it, and wait for its end."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    assert ends(pid, 60)
