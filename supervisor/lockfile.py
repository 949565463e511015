"""One process of a kind to a directory: a locked file that names its holder.

The lock is flock(2)'s, so the kernel gives it back however the holder ends; the pid inside is only for those who ask who it is.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


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
