"""Where everything of a task lies, below the state directory (durable) and the run directory (gone after a reboot)."""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

# linux/fs.h
_FS_IOC_GETFLAGS, _FS_IOC_SETFLAGS, _FS_TOPDIR_FL = 0x80086601, 0x40086602, 0x00020000


@dataclass(frozen=True)
class Layout:
    """The daemon's own directories."""

    state: Path
    run: Path

    @property
    def database(self) -> Path:
        return self.state / "aerie.db"

    @property
    def reserve(self) -> Path:
        """Space for the database when the disk is full."""
        return self.state / "reserve"

    @property
    def events(self) -> Path:
        """What has happened to the daemon's actors."""
        return self.state / "events"

    @property
    def workspaces(self) -> Path:
        """The stores: one directory to each NAME."""
        return self.state / "workspaces"

    @property
    def leases(self) -> Path:
        """Who holds a lease on which image, for as long as the machine is up."""
        return self.run / "leases"

    @property
    def served(self) -> Path:
        """Of each LAZY mount, the lock of its server, and the kernel's INIT request."""
        return self.run / "served"

    @property
    def processes(self) -> Path:
        """The locks of those isolated processes that are of use to nobody but the root supervisor that started them."""
        return self.run / "processes"

    @property
    def runtimes(self) -> Path:
        """What the OCI runtimes keep of their containers."""
        return self.run / "runtimes"

    def task(self, task: str) -> TaskLayout:
        return _of_task(self, task)

    def known_tasks(self) -> set[str]:
        """The tasks that have a directory, here or there."""
        homes = (self.state / "tasks", self.run / "tasks")
        return {entry.name for home in homes if home.is_dir() for entry in home.iterdir()}


@lru_cache(1024)
def _of_task(layout: Layout, task: str) -> TaskLayout:
    # Kept, for its paths are many, and each actor of the task asks for them.
    return TaskLayout(task, layout.state / "tasks" / task, layout.run / "tasks" / task)


@dataclass(frozen=True)
class TaskLayout:
    """A task's two homes: `durable` on the state disk, `volatile` for mount points, bundle and what its monitor tells."""

    task: str
    durable: Path
    volatile: Path

    # durable

    @cached_property
    def attempt_lock(self) -> Path:
        """Locked by conmon, the keeper and the root supervisor for as long as the attempt may live."""
        return self.durable / "attempt"

    @cached_property
    def output(self) -> Path:
        return self.durable / "output"

    @cached_property
    def journal(self) -> Path:
        return self.output / "journal"

    @cached_property
    def root_upper(self) -> Path:
        return self.durable / "root" / "upper"

    @cached_property
    def root_work(self) -> Path:
        return self.durable / "root" / "work"

    @cached_property
    def workspace_home(self) -> Path:
        """META and object table of the workspace, its staging directories, and the syncer's journal."""
        return self.durable / "workspace"

    @cached_property
    def staging(self) -> Path:
        return self.workspace_home / "upper"

    @cached_property
    def staging_work(self) -> Path:
        return self.workspace_home / "work"

    # volatile

    @cached_property
    def root(self) -> Path:
        return self.volatile / "root"

    @cached_property
    def workspace(self) -> Path:
        return self.volatile / "workspace"

    @cached_property
    def workspace_meta(self) -> Path:
        return self.volatile / "meta"

    @cached_property
    def workspace_lazy(self) -> Path:
        return self.volatile / "lazy"

    @cached_property
    def bundle(self) -> Path:
        return self.volatile / "bundle"

    @cached_property
    def monitor(self) -> Path:
        """conmon's own files: pid files, exit files, sockets."""
        return self.volatile / "monitor"

    def remove_mount_points(self, *points: Path) -> None:
        """Remove mount points on which nothing is mounted any more, and the volatile home with the last of them.

        With rmdir(2) alone, which cannot remove what somebody mounted: a file of the task's, in the worst case.
        """
        for directory in (*points, self.volatile):
            try:
                directory.rmdir()
            except FileNotFoundError:
                pass
            except OSError as error:
                if directory is not self.volatile or error.errno != errno.ENOTEMPTY:
                    raise


def spread(directory: Path) -> None:
    """Tell the file system that the directories in this one have nothing to do with each other (`chattr +T`); where that means nothing,
    nothing happens.

    ext4 then puts each into a block group of its own.  All in one, a hundred thousand inodes come and go in it, and each new one is
    looked for among those that went lately: without a journal that was a quarter of the root supervisor's time at fifty tasks at once.
    """
    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        flags = int.from_bytes(fcntl.ioctl(opened, _FS_IOC_GETFLAGS, bytes(8)), "little")
        fcntl.ioctl(opened, _FS_IOC_SETFLAGS, (flags | _FS_TOPDIR_FL).to_bytes(8, "little"))
    except OSError:  # a file system without such flags, or without this one
        pass
    finally:
        os.close(opened)
