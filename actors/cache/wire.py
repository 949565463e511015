"""What the CacheActor and its evictor say to each other."""

from __future__ import annotations

from supervisor.frames import Message


class Evict(Message, frozen=True):
    """The arguments of an evictor: make room, and end.

    `objects`, `archives`: directories.  `object_bytes`: of objects, so many are to go; `archive_bytes_max`: what all archives may
    take.  `mirrors`: the setting.  `pruning`: it is not for lack of room.
    """

    objects: str
    archives: str
    object_bytes: int
    archive_bytes_max: int
    mirrors: str = ""
    pruning: bool = False


class Evicted(Message, frozen=True):
    """It has ended.  `freed_bytes` of `objects` are free again.  `unlinked_bytes` will be, when those who hold them have let go.

    `short`: not all that was asked for could go, and `why` not.
    """

    objects: int
    freed_bytes: int
    unlinked_bytes: int
    archives: int = 0
    archive_bytes: int = 0
    short: bool = False
    why: str = ""


class CheckObjects(Message, frozen=True):
    """The arguments of a checker: look at the objects whose names begin with one of `prefixes`, repair what is damaged, say
    `messages.Checked`, and end.
    """

    objects: str
    archives: str
    prefixes: list[str]
    mirrors: str = ""


class Progress(Message, frozen=True):
    """Heartbeat."""
