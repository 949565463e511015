"""What a merge speaks of: what was known, the store as it is seen, and the steps that are decided on.  No I/O."""

from __future__ import annotations

import enum
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from actors.mount.listing import Entry, Version
from actors.mount.staging import parent

NAME_BYTES_MAX = 255


class Action(enum.Enum):
    """What a step does to the store."""

    REMOVE = "remove"
    MKDIR = "mkdir"
    PUT = "put"  # the staged file at `of`
    LINK = "link"  # the content of the store's file at `source`, if that still is `version`
    SYMLINK = "symlink"
    DESCRIBE = "describe"  # set mode and time


@dataclass(frozen=True, slots=True)
class Step:
    """One change of the store, at `where`, allowed while the store has `expected` there (None: nothing).

    `of`: the workspace's path that it is done for; another one than `where` when the task's version goes beside.  `wanted`:
    what the workspace has there; None for a removal.  `mode`: what is to be set, for the store may keep its own.
    """

    action: Action
    where: bytes
    of: bytes
    wanted: Entry | None
    expected: Entry | None
    mode: int = 0
    source: bytes = b""
    version: Version | None = None


@dataclass(frozen=True, slots=True)
class Conflict:
    """The task's change of `path` was not applied: its version is at `beside`, or, when that is empty, nowhere.

    Without a reason it is none any more: what an earlier sync found has resolved itself.
    """

    path: bytes
    beside: bytes
    reason: str


@dataclass
class Known:
    """What was.  `conflicts` by path.  `moves`: the directories renamed so far, (old, new), in that order."""

    ours: dict[bytes, Entry]
    theirs: dict[bytes, Entry]
    conflicts: dict[bytes, Conflict] = field(default_factory=dict)
    moves: list[tuple[bytes, bytes]] = field(default_factory=list)

    _below: dict[bytes, list[bytes]] | None = None  # what is in a directory, for `move`; None when that has to be found out

    @classmethod
    def listed(cls, listing: Mapping[bytes, Entry]) -> Known:
        return cls(dict(listing), dict(listing))

    def settle(self, path: bytes, where: bytes, ours: Entry | None, theirs: Entry | None) -> None:
        """The workspace's `path`, being `ours`, is dealt with, and the store has `theirs` at `where`."""
        self._below = None
        for view, place, entry in ((self.ours, path, ours), (self.theirs, where, theirs)):
            if entry is None:
                view.pop(place, None)
            else:
                view[place] = entry

    def move(self, old: bytes, new: bytes) -> None:
        """The store's directory `old` was renamed to `new`."""
        self.moves.append((old, new))
        if self._below is None:
            self._below = {}
            for path in self.ours.keys() | self.theirs.keys():
                self._below.setdefault(parent(path), []).append(path)
        waiting = [old]
        while waiting:
            path = waiting.pop()
            to = new + path[len(old) :]
            for view in (self.ours, self.theirs):
                if path in view:
                    view[to] = view.pop(path)
            below = self._below.pop(path, [])
            self._below[to] = [to + place[len(path) :] for place in below]
            waiting += below
        self._below.setdefault(parent(new), []).append(new)
        self._below[parent(old)].remove(old)

    def present_path(self, listed: bytes) -> bytes:
        """Where META's directory `listed` is after the moves."""
        for old, new in self.moves:
            if listed == old or listed.startswith(old + b"/"):
                listed = new + listed[len(old) :]
        return listed


class View(Protocol):
    """The store as it is now."""

    def get(self, path: bytes) -> Entry | None:
        """What is at `path`; None also when its directory is no directory."""

    def children(self, path: bytes) -> Iterable[bytes]:
        """The paths of all that is in the directory `path`; nothing when it is none."""

    def same_content(self, path: bytes, of: bytes) -> bool:
        """Whether the store's file at `path` has the bytes of the staged file at `of`."""


@dataclass
class Plan:
    """`removals` go first, in their order; then `steps`, in theirs.  `settled`: the workspace's path and the store's, of what
    needs nothing done but to be known as dealt with.
    """

    removals: list[Step] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    settled: list[tuple[bytes, bytes]] = field(default_factory=list)
    conflicts: list[Conflict] = field(default_factory=list)


def same_version(one: Entry | None, other: Entry | None) -> bool:
    """Whether two entries of a store stand for the same; modes, and the times of directories and links, are not asked."""
    if one is None or other is None:
        return one is other
    return stat.S_IFMT(one.mode) == stat.S_IFMT(other.mode) and (one.content, one.target) == (other.content, other.target)


def described(entry: Entry, like: Entry) -> Entry:
    """What the store's `entry` is when it has been given mode and time of `like`."""
    if entry.content is None:
        return Entry(like.mode, target=entry.target)
    inode, size, _ = entry.content
    return Entry(like.mode, like.mtime_ns, (inode, size, like.mtime_ns))


def is_directory(entry: Entry | None) -> bool:
    return entry is not None and stat.S_ISDIR(entry.mode)


def conflict_name(path: bytes, task: str, number: int) -> bytes:
    """`path` with `.aerie-conflict-TASK` behind it, and a number from the second on; the name is shortened where it must be."""
    directory, slash, name = path.rpartition(b"/")
    suffix = f".aerie-conflict-{task}{f'.{number}' if number > 1 else ''}".encode()
    return directory + slash + name[: NAME_BYTES_MAX - len(suffix)] + suffix
