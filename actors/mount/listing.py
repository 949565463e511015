"""The store's listing: a directory walked once and written down as META, an object table, and what a sync will compare with.

A *path* is bytes, relative to the store, without a leading slash; the store itself is `b""`.  No symbolic link is followed and every
name is used through a descriptor of its directory, so a store that changes during the walk yields a mixture of then and now, at
worst, and never something outside of it.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import BinaryIO

import msgspec

from actors.lazytree import erofs
from actors.lazytree.objects import Objects
from actors.lazytree.table import Row, write_table
from actors.mount.source import StoredFile

META, TABLE, LISTING = "meta.erofs", "table", "listing"  # in the task's directory
RESERVED = b".aerie-sync"  # in a store's root: the syncer's own, in no listing
TASK_UID = TASK_GID = 1000
PATH_BYTES_MAX = 4000  # the kernel takes 4095, and a conflict copy's name is longer
SMALL_BYTES_MAX = 64 << 10

_libc = ctypes.CDLL(None, use_errno=True)
_OPENAT2 = 437
_RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 0x02, 0x04, 0x08


Version = tuple[int, int, int]  # of a file in a store: inode, size in bytes, mtime in ns


class Bounds(msgspec.Struct, frozen=True):
    """What a tree may have at most; one that has more is refused as a whole."""

    entries_max: int = 1_000_000
    depth_max: int = 200
    staged_bytes_max: int = 1 << 40  # on disk, holes not counted


class TreeTooLarge(Exception):
    """A store or a staging directory is over a bound; the text says which."""


class Entry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a name stands for, in a listing, in a store, or in a workspace.

    `mode` has the type bits, and never setuid or setgid.  `mtime_ns` and `content` are a regular file's, `target` a symbolic link's.
    `content` names the bytes: (inode, size, mtime in ns) of the store's file that has them, its *version*; or, with `staged`,
    (inode, size, ctime in ns) of the staged file.  Directories have no times here: whoever changes an entry changes them.
    """

    mode: int
    mtime_ns: int = 0
    content: Version | None = None
    target: bytes | None = None
    staged: bool = False


@dataclass(frozen=True)
class Listed:
    """What `index` made: entries listed; regular files that are not empty, the bytes of them, and how many are not in OBJECTS; and what
    is not in the snapshot, with the reasons.
    """

    entries: int
    objects: int
    content_bytes: int
    missing: int
    skipped: list[tuple[bytes, str]]


def entry_of(status: os.stat_result) -> Entry | None:
    """A store's file, directory or symbolic link (its target left out); None for anything else."""
    mode = status.st_mode
    kind = stat.S_IFMT(mode)
    if kind == stat.S_IFREG:
        return Entry(mode & ~0o6000, status.st_mtime_ns, (status.st_ino, status.st_size, status.st_mtime_ns))
    if kind == stat.S_IFDIR:
        return Entry(mode & ~0o6000)
    if kind == stat.S_IFLNK:
        return Entry(mode)
    return None


class _OpenHow(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


def open_beneath(directory: int, path: bytes, flags: int) -> int:
    """openat2(2): open `path` below a directory's descriptor, through no symbolic link and not out of it.

    Raises OSError (ELOOP: a component, or the last, is a symbolic link).
    """
    how = _OpenHow(flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0, _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS)
    descriptor = int(_libc.syscall(_OPENAT2, directory, path or b".", ctypes.byref(how), ctypes.sizeof(how)))
    if descriptor < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fsdecode(path))
    return descriptor


def open_store(path: str) -> int:
    """A descriptor of the store's directory, which is made at first use.  Raises OSError."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        os.mkdir(path, 0o755)
        os.chown(path, TASK_UID, TASK_GID)
    except FileExistsError:
        pass
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def index(store: str, directory: str, objects: Objects, bounds: Bounds, small_bytes_max: int, small_s: float) -> Listed:
    """List `store` and write META, table and listing into the task's `directory`.

    Files of at most 64 KiB are copied to OBJECTS on the way, for overlayfs binds an inode to the layer that has its object at first
    open; at most `small_bytes_max` in all, and for no longer than `small_s`: what remains is read when it is wanted.
    Raises OSError, TreeTooLarge.
    """
    root = open_store(store)
    try:
        status = os.fstat(root)
        identity = f"{status.st_dev}:{status.st_ino}:{store}".encode()
        walk = _Walk(identity, objects, bounds, small_bytes_max, time.monotonic() + small_s)
        tree = walk.node(status)
        walk.directory(root, b"", tree, 1)
    finally:
        os.close(root)
    # META last: whoever finds it finds the others too.
    _replace(directory, LISTING, lambda file: file.write(msgspec.msgpack.encode(walk.listing)))
    _replace(directory, TABLE, lambda file: write_table(file, walk.rows))
    _replace(directory, META, lambda file: erofs.write(tree, file))
    return Listed(len(walk.listing), len(walk.rows), walk.content_bytes, walk.missing, walk.skipped)


def make_listing_durable(directory: str) -> None:
    """Without its listing a staging directory that outlived the machine's power could not be merged.  Raises OSError."""
    for name in (LISTING, "."):
        descriptor = os.open(os.path.join(directory, name), os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_listing(directory: str) -> dict[bytes, Entry]:
    """What `index` listed, by path; without the root.  Raises OSError; msgspec.MsgspecError for a file that is not whole."""
    with open(os.path.join(directory, LISTING), "rb") as file:
        return msgspec.msgpack.decode(file.read(), type=dict[bytes, Entry])


def _replace(directory: str, name: str, write: Callable[[BinaryIO], object]) -> None:
    temporary = os.path.join(directory, f".{name}.new")
    with open(temporary, "wb") as file:
        write(file)
    os.rename(temporary, os.path.join(directory, name))


@dataclass
class _Walk:
    identity: bytes
    objects: Objects
    bounds: Bounds
    small_bytes_left: int
    small_until_s: float
    listing: dict[bytes, Entry] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    skipped: list[tuple[bytes, str]] = field(default_factory=list)
    content_bytes: int = 0
    missing: int = 0

    def node(self, status: os.stat_result) -> erofs.Node:
        directory = stat.S_ISDIR(status.st_mode)
        node = erofs.Node(status.st_mode & ~0o6000, TASK_UID, TASK_GID, status.st_mtime_ns)
        if directory:
            node.children = {}
        return node

    def directory(self, descriptor: int, path: bytes, parent: erofs.Node, depth: int) -> None:
        """List the directory open at `descriptor` into `parent`."""
        if depth > self.bounds.depth_max:
            raise TreeTooLarge(f"{os.fsdecode(path)!r} lies deeper than {self.bounds.depth_max} directories")
        assert parent.children is not None
        prefix = path + b"/" if path else b""
        with os.scandir(descriptor) as found:
            for item in found:
                name = os.fsencode(item.name)
                if name == RESERVED and not path:
                    continue
                try:
                    status = item.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue  # it went away during the walk, and is not in the snapshot
                entry = entry_of(status)
                if entry is None or len(prefix) + len(name) > PATH_BYTES_MAX:
                    self.skipped.append(
                        (prefix + name, "its path is too long" if entry else "not a file, directory or symbolic link")
                    )
                    continue
                if len(self.listing) >= self.bounds.entries_max:
                    raise TreeTooLarge(f"the store has more than {self.bounds.entries_max} entries")
                node = self.node(status)
                try:
                    if entry.content is not None:
                        self.file(descriptor, name, prefix + name, status, node)
                    elif node.children is None:
                        node.target = os.readlink(name, dir_fd=descriptor)
                        entry = Entry(entry.mode, target=node.target)
                    self.listing[prefix + name] = entry
                    parent.children[name] = node
                    if node.children is not None:
                        self.below(descriptor, name, prefix + name, node, depth)
                except OSError as error:
                    # It was replaced by something of another kind, or went, since it was looked at.
                    if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EINVAL):
                        raise

    def below(self, descriptor: int, name: bytes, path: bytes, node: erofs.Node, depth: int) -> None:
        below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=descriptor)
        try:
            self.directory(below, path, node, depth + 1)
        finally:
            os.close(below)

    def file(self, descriptor: int, name: bytes, path: bytes, status: os.stat_result, node: erofs.Node) -> None:
        size = node.size = status.st_size
        if not size:
            return
        # The change time too: the object of a file that was rewritten and given its old time again is another one.
        version = f"{status.st_ino}:{size}:{status.st_mtime_ns}:{status.st_ctime_ns}".encode()
        key = node.key = hashlib.sha256(b"%s\0%s\0%s" % (self.identity, version, path)).hexdigest()
        self.rows.append(Row(key, size, _encode_source(StoredFile(path, status.st_ino, size, status.st_mtime_ns))))
        self.content_bytes += size
        if not self.objects.has(key):
            self.missing += 1
            if size <= min(SMALL_BYTES_MAX, self.small_bytes_left) and time.monotonic() < self.small_until_s:
                self.small_bytes_left -= size
                self.missing -= self.fill(descriptor, name, status, key)

    def fill(self, descriptor: int, name: bytes, status: os.stat_result, key: str) -> bool:
        """Copy a small file to OBJECTS, if it is and stays the version that was listed."""
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=descriptor)
        try:
            content = os.read(file, status.st_size + 1)
            now = os.fstat(file)
        finally:
            os.close(file)
        # One look after the read is enough: what was read was this version if the file still is.
        if _version(now) != _version(status) or len(content) != status.st_size:
            return False
        with self.objects.create() as copy:
            copy.write(content)
            self.objects.publish(copy, key)
        return True


_encode_source = msgspec.msgpack.Encoder().encode


def _version(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
