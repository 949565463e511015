"""One process of a kind to a directory: a locked file that names its holder, and in which the holder may show that it lives.

The lock is flock(2)'s, so the kernel gives it back however the holder ends; what is inside is only for those who ask: the pid,
and behind it how often the holder has beaten.  Any number of watchers can read that, and none takes it from another, as it would
from a pipe.
"""

from __future__ import annotations

import fcntl
import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

from supervisor.pidfd import open_pidfd, signal_process, wait_ended

LOOK_S = 0.001  # as long as somebody looks who holds a lock, it cannot be taken


class Sign(NamedTuple):
    """A holder's sign of life: who it is, and how often it has beaten."""

    pid: int
    beats: int


class LockFile:
    """The lock at `path`, made when it is missing.  Held from a successful `acquire` until this process ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._beats = 0

    def acquire(self, wait: bool = False) -> bool:
        """Take the lock; with `wait`, as soon as its holder has ended.  False when somebody holds it."""
        while not self._flock(fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)):
            # Held by somebody, or only looked at for this instant (`holder`)?  Who looks keeps nobody else from looking.
            if not self._flock(fcntl.LOCK_SH | fcntl.LOCK_NB):
                return False
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            time.sleep(LOOK_S)
        self._write(b"")
        return True

    def _flock(self, operation: int) -> bool:
        try:
            fcntl.flock(self._descriptor, operation)
        except BlockingIOError:
            return False
        return True

    def beat(self) -> None:
        """Show that this process, which holds the lock, lives.  Needs no path and no privilege."""
        self._beats += 1
        self._write(b"%d" % self._beats)

    def _write(self, beats: bytes) -> None:
        # One write, always as long: who reads meanwhile sees no half of it, and nothing of an earlier holder's.
        os.pwrite(self._descriptor, b"%-10d %-20s" % (os.getpid(), beats), 0)

    def holder(self) -> int:
        """The pid of who holds it; 0 when nobody does."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _parse(os.pread(self._descriptor, 64, 0)).pid
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        return 0

    def is_in_place(self) -> bool:
        """Whether its file has its name still; when somebody has deleted it, another process may hold another one there."""
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        os.close(self._descriptor)


def holder_of(path: Path) -> int:
    """The pid of who holds the lock at `path`; 0 when nobody does."""
    lock = LockFile(path)
    try:
        return lock.holder()
    finally:
        lock.close()


def sign_of(path: Path) -> Sign:
    """The last sign of life at `path`, whoever holds the lock by now; zeros when there is none."""
    try:
        return _parse(path.read_bytes())
    except FileNotFoundError:
        return Sign(0, 0)


def take_place(path: Path) -> LockFile:
    """Hold the lock at `path`, and end whoever holds it: the newest wins.

    For a process that is started only when its predecessor, as far as anybody knows, is dead: who still holds the lock is one that
    nobody looks after.  Of two that were started at once by two starters, one ends the other.  Raises TimeoutError.
    """
    lock = LockFile(path)
    while not lock.acquire():
        evict(path)
    return lock


def evict(path: Path, timeout_s: float = 5.0) -> None:
    """Kill who holds the lock at `path`, and wait for its end: a process whose parent died, and which may hang where nobody looks.

    Raises TimeoutError.
    """
    lock = LockFile(path)
    try:
        pid = lock.holder()
        try:
            pidfd = open_pidfd(pid) if pid else -1
        except ProcessLookupError:
            pidfd = -1  # it has just ended
        if pidfd < 0:
            return
        try:
            # Still the holder after its pidfd was opened: so that is what the pidfd is of, and not who got its pid next.
            if lock.holder() == pid:
                signal_process(pidfd, signal.SIGKILL)
                if not wait_ended(pidfd, timeout_s):
                    raise TimeoutError(f"process {pid}, which holds {path}, cannot be killed")
        finally:
            os.close(pidfd)
    finally:
        lock.close()


def _parse(text: bytes) -> Sign:
    pid, beats, *_ = [*map(int, text.split()), 0, 0]
    return Sign(pid, beats)
