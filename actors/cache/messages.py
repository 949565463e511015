"""What may be said to the CacheActor, and what it answers."""

from __future__ import annotations

from supervisor.frames import Message


class CacheUsage(Message, frozen=True):
    """→ Usage"""


class Usage(Message, frozen=True):
    """What is taken of the disk, in bytes, and of what bounds.

    `unlinked_bytes`, in `cache_bytes`, are of files that were removed, and that somebody still holds open.  `short`: for what
    reason the last eviction, if it did, made less room than it should have.
    """

    cache_bytes: int
    cache_bytes_max: int
    unlinked_bytes: int
    archives: int
    archive_bytes: int
    archive_bytes_max: int
    free_bytes: int
    free_bytes_min: int
    short: str = ""


class Prune(Message, frozen=True):
    """Evict until objects of so many bytes are gone, or all that may go → Pruned"""

    object_bytes: int


class Check(Message, frozen=True):
    """Look at all content of images, and repair what is damaged → Checked"""


class Checked(Message, frozen=True):
    """Of `damaged` objects so many were `repaired`, and the others removed; `texts` has a line for each, of the first ones."""

    objects: int
    damaged: int
    repaired: int
    texts: list[str]
    error: str = ""


class Pruned(Message, frozen=True):
    objects: int
    freed_bytes: int
    why: str = ""
