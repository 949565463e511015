"""What may be said to the mounts and to one mount (the seed's MountManager), and what they answer."""

from __future__ import annotations

from supervisor.frames import Message


class MountWorkspace(Message, frozen=True):
    """Mount the workspace NAME for a task → WorkspaceMounted, once a read through the mount has been answered; or Refused.

    Asked again for a mounted task: the same path.
    """

    task: str
    workspace: str


class WorkspaceMounted(Message, frozen=True):
    path: str


class SyncWorkspace(Message, frozen=True):
    """Bring back to the store what the task changed → WorkspaceSynced."""

    task: str


class WorkspaceSynced(Message, frozen=True):
    """`outcome`: synced, conflict or sync_failed.  `conflicts`: paths kept beside the store's own.  `error`: why it failed.
    `skipped`: what is never brought back (devices, pipes, sockets), and why.
    """

    outcome: str
    conflicts: list[str]
    error: str | None
    skipped: list[str] = []


class UnmountWorkspace(Message, frozen=True):
    """Stop, unmount and remove a task's mount → Unmounted; an unknown task is no error.

    `keep_staging`: what the task changed has not reached the store and must stay.
    """

    task: str
    keep_staging: bool = False


class Unmounted(Message, frozen=True):
    pass


class MountPath(Message, frozen=True):
    """→ Path: where a task's workspace is mounted; empty when it is not."""

    task: str


class Path(Message, frozen=True):
    path: str


class ActiveMounts(Message, frozen=True):
    """→ Count"""


class CleanupStale(Message, frozen=True):
    """Unmount what belongs to no task of `active`, an earlier run's leavings included → Count of what was removed."""

    active: list[str]


class CleanupAll(Message, frozen=True):
    """Unmount everything → Count."""


class Count(Message, frozen=True):
    count: int
