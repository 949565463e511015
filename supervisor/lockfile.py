"""One process of a kind to a directory: a locked file that names its holder.

The lock is flock(2)'s, so the kernel gives it back however the holder ends; the pid inside is only for those who ask who it is.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
from pathlib import Path

from supervisor.pidfd import open_pidfd, signal_process


class LockFile:
    """The lock at `path`, made when it is missing.  Held from a successful `acquire` until this process ends."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def acquire(self, wait: bool = False) -> bool:
        """Take the lock; with `wait`, as soon as its holder has ended.  False when somebody holds it."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, str(os.getpid()).encode(), 0)
        return True

    def holder(self) -> int:
        """The pid of who holds it; 0 when nobody does."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(os.pread(self._descriptor, 32, 0) or b"0")
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        return 0

    def close(self) -> None:
        os.close(self._descriptor)


def holder_of(path: Path) -> int:
    """The pid of who holds the lock at `path`; 0 when nobody does."""
    lock = LockFile(path)
    try:
        return lock.holder()
    finally:
        lock.close()


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
                waiting = select.poll()
                waiting.register(pidfd, select.POLLIN)
                if not waiting.poll(timeout_s * 1000):
                    raise TimeoutError(f"process {pid}, which holds {path}, cannot be killed")
        finally:
            os.close(pidfd)
    finally:
        lock.close()
