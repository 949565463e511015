"""Space on a disk that nothing else can take, so that what was acknowledged can still be recorded when the disk is full."""

from __future__ import annotations

import os
import threading
from pathlib import Path


class Reserve:
    """A file of `size_bytes` at `path` that has its blocks and no content.  Thread-safe."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path = path
        self._size_bytes = size_bytes
        self._lock = threading.Lock()
        self._held = False

    def hold(self) -> bool:
        """Take the space, unless it is held → whether it is now.  When it is not, the disk has nearly none left."""
        with self._lock:
            if not self._held:
                try:
                    file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
                    try:
                        os.posix_fallocate(file, 0, self._size_bytes)
                    finally:
                        os.close(file)
                except OSError:
                    self._path.unlink(missing_ok=True)  # a part of it is of more use to whom it was held for
                else:
                    self._held = True
            return self._held

    def is_spare(self) -> bool:
        """Whether the space is held, and as much again is free for what is new."""
        found = os.statvfs(self._path.parent)
        return found.f_bfree * found.f_frsize >= (1 if self._held else 2) * self._size_bytes and self.hold()

    def release(self) -> bool:
        """Give the space to whom it was held for → whether there was any."""
        with self._lock:
            held, self._held = self._held, False
            self._path.unlink(missing_ok=True)
            return held
