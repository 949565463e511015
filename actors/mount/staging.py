"""A staging directory, read as the tree that the task sees: what overlayfs would show of upper over META, without mounting it.

An overlay's upper directory, made with redirect_dir=on, metacopy=on, index=off, says in its own way what changed:

    character device 0:0               the name below is hidden.  Several may be links of one inode.  Overlayfs also knows an
      or trusted.overlay.whiteout      empty file with this attribute
    trusted.overlay.opaque=y           a directory that hides all of the one below
    trusted.overlay.redirect           below this name is what META has at that path: absolute in META, or a name beside the one
                                       that would be below.  On a directory: it was renamed.  On a file: see the next
    trusted.overlay.metacopy           a file of which only the metadata was copied; its content is META's (at redirect, if
                                       there is one: renamed or linked).  Without this attribute a redirect on a file means
                                       nothing any more
    origin, impure, uuid, nlink        nothing to us

(Documentation/filesystems/overlayfs.rst, fs/overlayfs/namei.c.)  A task cannot write trusted attributes, nor see them.  It can
give a file any name, and while it runs it can change everything under this walk: so each name is opened once, without following
links and without waiting for a FIFO, and everything is asked of that descriptor.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from actors.mount.listing import PATH_BYTES_MAX, RESERVED, Bounds, Entry, TreeTooLarge

UPPER = "upper"  # in the task's directory
_PREFIX = "trusted.overlay."
_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass
class Staging:
    """What a staging directory says.

    `tree`: the workspace by path, without the root: META's own entries where the task changed nothing.  `renamed`: directories
    that have, below this path, what META has at that one.  `skipped`: what is there and is not synced, with the reason.
    """

    tree: dict[bytes, Entry]
    renamed: dict[bytes, bytes] = field(default_factory=dict)
    skipped: list[tuple[bytes, str]] = field(default_factory=list)


def read(upper: int, listing: Mapping[bytes, Entry], bounds: Bounds) -> Staging:
    """Read the staging directory open at `upper` over META's `listing`.  Raises OSError, TreeTooLarge."""
    walk = _Walk(listing, bounds, Staging(dict(listing)))
    walk.directory(upper, b"", b"", 1)
    return walk.staging


@dataclass
class _Walk:
    listing: Mapping[bytes, Entry]
    bounds: Bounds
    staging: Staging
    entries: int = 0
    staged_bytes: int = 0
    _children: dict[bytes, list[bytes]] | None = None

    def directory(self, descriptor: int, path: bytes, lower: bytes | None, depth: int) -> None:
        """Read an upper directory: it is the task's `path`, with META's directory `lower` below it, or nothing."""
        if depth > self.bounds.depth_max:
            raise TreeTooLarge(f"{os.fsdecode(path)!r} lies deeper than {self.bounds.depth_max} directories")
        with os.scandir(descriptor) as names:
            for item in names:
                name = os.fsencode(item.name)
                self.entries += 1
                if self.entries > self.bounds.entries_max:
                    raise TreeTooLarge(f"more than {self.bounds.entries_max} entries are staged")
                if len(path) + 1 + len(name) > PATH_BYTES_MAX:
                    raise TreeTooLarge(f"a staged path is longer than {PATH_BYTES_MAX} bytes")
                if name == RESERVED and not path:
                    self.staging.skipped.append((name, "the name is reserved"))
                    continue
                try:
                    opened = os.open(name, _PATH, dir_fd=descriptor)
                except FileNotFoundError:
                    continue  # removed by the task after it was listed here
                try:
                    self.name(opened, _join(path, name), None if lower is None else _join(lower, name), depth)
                finally:
                    os.close(opened)

    def name(self, opened: int, path: bytes, lower: bytes | None, depth: int) -> None:
        """Read one name, open at `opened` (O_PATH): the task's `path`, over META's `lower` if that exists."""
        status = os.fstat(opened)
        mode = status.st_mode & ~0o6000
        match stat.S_IFMT(mode):
            case stat.S_IFDIR:
                self.merged_directory(opened, path, lower, mode, depth)
            case stat.S_IFREG:
                entry = self.file(opened, path, lower, status)
                self.hide(path, lower)
                if entry is not None:
                    self.staging.tree[path] = entry
            case stat.S_IFLNK:
                self.hide(path, lower)
                self.staging.tree[path] = Entry(mode, target=os.readlink(b"", dir_fd=opened))
            case stat.S_IFCHR if status.st_rdev == 0:
                self.hide(path, lower)
            case _:
                self.hide(path, lower)
                self.staging.skipped.append((path, "not a file, directory or symbolic link"))

    def merged_directory(self, opened: int, path: bytes, lower: bytes | None, mode: int, depth: int) -> None:
        attributes = _attributes(opened)
        below = lower
        if attributes.get("opaque") == b"y":  # "x" only says that there are whiteouts of the attribute's form in it
            below = None
        elif "redirect" in attributes:
            below = _follow(attributes["redirect"], lower)
        if below is not None and not self.is_directory(below):
            below = None
        if below is None or below != lower:
            self.hide(path, lower)
        if below is not None and below != lower:
            self.show(below, path)
        if below is not None and below != path:
            self.staging.renamed[path] = below
        self.staging.tree[path] = Entry(mode)
        readable = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=opened)
        try:
            self.directory(readable, path, below, depth + 1)
        finally:
            os.close(readable)

    def file(self, opened: int, path: bytes, lower: bytes | None, status: os.stat_result) -> Entry | None:
        """The entry of a regular file; None when it is a whiteout or cannot be synced."""
        attributes = _attributes(opened)
        if "whiteout" in attributes and not status.st_size:
            return None
        mode = status.st_mode & ~0o6000
        if "metacopy" not in attributes:
            self.staged_bytes += status.st_blocks * 512
            if self.staged_bytes > self.bounds.staged_bytes_max:
                raise TreeTooLarge(f"more than {self.bounds.staged_bytes_max} bytes are staged")
            return staged_entry(status)
        origin = _follow(attributes["redirect"], lower) if "redirect" in attributes else lower
        listed = self.listing.get(origin) if origin is not None else None
        if listed is None or listed.content is None:
            self.staging.skipped.append((path, "its content is that of a file which the snapshot does not have"))
            return None
        return Entry(mode, status.st_mtime_ns, listed.content)

    def is_directory(self, lower: bytes) -> bool:
        if not lower:
            return True
        listed = self.listing.get(lower)
        return listed is not None and stat.S_ISDIR(listed.mode)

    def hide(self, path: bytes, lower: bytes | None) -> None:
        """Take META's `lower`, with all below it, off the tree, where it showed at `path`."""
        if lower is not None and lower in self.listing:
            for place in self.subtree(lower):
                self.staging.tree.pop(path + place[len(lower) :], None)

    def show(self, lower: bytes, path: bytes) -> None:
        """Make what META has below `lower` show below `path`."""
        for place in self.subtree(lower):
            self.staging.tree[path + place[len(lower) :]] = self.listing[place]
        if len(self.staging.tree) > 2 * self.bounds.entries_max:
            raise TreeTooLarge(f"the workspace has more than {2 * self.bounds.entries_max} entries")

    def subtree(self, lower: bytes) -> Iterator[bytes]:
        """`lower` and all that META has below it."""
        if self._children is None:
            self._children = {}
            for place in self.listing:
                self._children.setdefault(parent(place), []).append(place)
        waiting = [lower]
        while waiting:
            place = waiting.pop()
            yield place
            waiting += self._children.get(place, ())


def staged_entry(status: os.stat_result) -> Entry:
    """The entry of a staged file whose content is in it."""
    # By change time, since a task may set the modification time back.
    stamp = (status.st_ino, status.st_size, status.st_ctime_ns)
    return Entry(status.st_mode & ~0o6000, status.st_mtime_ns, stamp, staged=True)


def parent(path: bytes) -> bytes:
    """The directory that `path` is in; `b""` is the root."""
    return path.rpartition(b"/")[0]


def _join(directory: bytes, name: bytes) -> bytes:
    return directory + b"/" + name if directory else name


def _follow(redirect: bytes, lower: bytes | None) -> bytes | None:
    """The path in META that a redirect names, for what would be over `lower`; None when there cannot be one."""
    if redirect.startswith(b"/"):
        return redirect.strip(b"/") or None
    if lower is None or b"/" in redirect:
        return None
    return _join(parent(lower), redirect)


def _attributes(opened: int) -> dict[str, bytes]:
    """The overlay's attributes of what is open, by O_PATH, at `opened`."""
    # fgetxattr(2) does not take O_PATH; this link leads to what is open, whatever its name is by now.
    path = f"/proc/self/fd/{opened}"
    found = {}
    for name in os.listxattr(path):
        if name.startswith(_PREFIX):
            try:
                found[name[len(_PREFIX) :]] = os.getxattr(path, name)
            except OSError as error:
                if error.errno != errno.ENODATA:  # it went since it was listed: the file has its own content by now
                    raise
    return found
