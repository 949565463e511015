"""What may be said to the CacheActor, and what it answers; the gateway hands the answers on as they are."""

from __future__ import annotations

import msgspec

from supervisor.frames import Message


class CacheUsage(Message, frozen=True):
    """→ Usage"""


class Usage(msgspec.Struct, frozen=True):
    """What images and workspaces take of this node's disk, in bytes, and what they may take.

    `unlinked_bytes`, in `cache_bytes`, are of files that were removed, and that somebody still holds open.  `short`: why the last
    eviction could not make all the room that it should; "" when it could.
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
    """Look at all content of images, and repair what is damaged → Checked, or an error when the checker has ended first"""


class Checked(Message, frozen=True):
    """Of `damaged` objects so many were `repaired`, and the others removed; `texts` has a line for each, of the first ones."""

    objects: int
    damaged: int
    repaired: int
    texts: list[str]


class Pruned(Message, frozen=True):
    """So many objects are gone.  `kept`: why not all could go that was asked for."""

    objects: int
    freed_bytes: int
    kept: str = ""
