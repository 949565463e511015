"""Who holds a lease on which image: a symbolic link to a lease, in a directory that outlives the daemon's processes.

It need not outlive the machine's boot, at whose end no task runs and nothing is mounted; so taking a lease, which every task waits
for, costs no fsync.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote, unquote

import msgspec

from actors.gateway.messages import TaskSpec
from actors.image.registry.login import Login
from supervisor.store import Store

TASK = "task/"  # what the name of a task's lease begins with


class Leases:
    """The leases in `directory`, which is made if it is missing.  Raises OSError everywhere."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def all(self) -> dict[str, str]:
        """The digest of each lease's image; none when somebody has deleted the directory."""
        names = os.listdir(self._directory) if self._directory.exists() else []
        return {unquote(name): os.readlink(self._directory / name) for name in names}

    def has(self, lease: str) -> bool:
        return os.path.lexists(self._path(lease))

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


def held_still(leases: Leases, store: Store) -> dict[str, str]:
    """The digest of each lease's image, when a daemon starts; those of tasks that have given everything back are given back."""
    # Earlier versions kept those of `image mount` in the store.
    for lease, digest in store.read("SELECT lease, digest FROM leases"):
        leases.take(lease, digest)
        store.write(("DELETE FROM leases WHERE lease = ?", (lease,)))
    unreleased = {task for (task,) in store.read("SELECT task FROM tasks WHERE released = 0")}
    held = leases.all()
    for lease in [lease for lease in held if (task := task_of(lease)) is not None and task not in unreleased]:
        leases.give_back(lease)
        del held[lease]
    return held


def login_of(lease: str, store: Store) -> Login | None:
    """What a task brought for its image's registry: a server that takes another one's place needs it again."""
    if (task := task_of(lease)) is None:
        return None
    [[spec]] = store.read("SELECT spec FROM tasks WHERE task = ?", task)
    return msgspec.msgpack.decode(spec, type=TaskSpec).login
