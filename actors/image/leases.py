"""Who holds a lease on which image: a symbolic link to a lease, in a directory that outlives the daemon's processes.

It need not outlive the machine's boot, at whose end no task runs and nothing is mounted; so taking a lease, which every task waits
for, costs no fsync.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote, unquote

TASK = "task/"  # what the name of a task's lease begins with


class Leases:
    """The leases in `directory`, which is made if it is missing.  Raises OSError everywhere."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def all(self) -> dict[str, str]:
        """The digest of each lease's image."""
        return {unquote(name): os.readlink(self._directory / name) for name in os.listdir(self._directory)}

    def take(self, lease: str, digest: str) -> None:
        """Take a lease, or move the one of that name to another image."""
        try:
            self._path(lease).symlink_to(digest)
        except FileExistsError:
            if os.readlink(self._path(lease)) != digest:
                self._path(lease).unlink()
                self._path(lease).symlink_to(digest)

    def give_back(self, lease: str) -> None:
        """No error when it is not held."""
        self._path(lease).unlink(missing_ok=True)

    def _path(self, lease: str) -> Path:
        name = quote(lease, safe="")
        return self._directory / (f"%2E{name[1:]}" if name.startswith(".") else name)


def task_of(lease: str) -> str | None:
    """The task whose lease it is; None for one of `image mount`."""
    return lease.removeprefix(TASK) if lease.startswith(TASK) else None
