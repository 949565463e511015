"""The store's listing: a directory walked once, and written down for the sync that will compare with it.

A *path* is bytes, relative to the store, without a leading slash; the store itself is `b""`.  No symbolic link is followed and
every name is used through a descriptor of its directory, so a store that changes during the walk yields a mixture of then and
now, at worst, and never something outside of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from dataclasses import dataclass, field

import msgspec

LISTING = "listing"  # in the task's directory
RESERVED = b".aerie-sync"  # in a store's root: the syncer's own, in no listing
ASIDE = b"was-"  # what the names begin with of what a sync has put aside
TASK_UID = TASK_GID = 1000
PATH_BYTES_MAX = 4000  # the kernel takes 4095, and a conflict copy's name is longer

_LISTED_KINDS = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK)

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

    `mode` has the type bits, and never setuid or setgid.  `mtime_ns` and `content` are a regular file's, `target` a symbolic
    link's.  `content` names the bytes: (inode, size, mtime in ns) of the store's file that has them, its *version*; or, with
    `staged`, (inode, size, ctime in ns) of the staged file.  Directories have no times here: whoever changes an entry changes
    them.
    """

    mode: int
    mtime_ns: int = 0
    content: Version | None = None
    target: bytes | None = None
    staged: bool = False


class Found(msgspec.Struct, array_like=True, gc=False):
    """A name as it was met; the mode is without setuid and setgid."""

    path: bytes
    mode: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    target: bytes | None = None


@dataclass
class Listing:
    """A store's root, all that is in it (a directory comes before what it has), and what is not listed, with the reasons."""

    root: Found
    entries: list[Found] = field(default_factory=list)
    skipped: list[tuple[bytes, str]] = field(default_factory=list)

    def encode(self) -> bytes:
        """The entries as msgpack."""
        return msgspec.msgpack.encode(self.entries)


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


def private_directory(task: str) -> bytes:
    """The path of the task's own directory in a store: what its syncs have not published yet, or have put aside."""
    return RESERVED + b"/" + os.fsencode(task)


def aside_name(inode: int) -> bytes:
    """What the store's file with that inode is called in its task's private directory, when a sync has put another in its place."""
    return ASIDE + b"%d" % inode


def open_store(path: str) -> int:
    """A descriptor of the store's directory, which is made at first use.  Raises OSError."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0)
    store = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Made just now, or by one who was killed before it was the tasks': the mode comes last, and says that it is.
        if stat.S_IMODE(os.fstat(store).st_mode) == 0:
            os.fchown(store, TASK_UID, TASK_GID)
            os.fchmod(store, 0o755)
    except BaseException:
        os.close(store)
        raise
    return store


def list_store(descriptor: int, bounds: Bounds) -> Listing:
    """List the store whose directory is open at `descriptor`.  Raises OSError, TreeTooLarge."""
    listing = Listing(_found(b"", os.fstat(descriptor)))
    _list_directory(descriptor, b"", 1, listing, bounds)
    return listing


def _list_directory(descriptor: int, path: bytes, depth: int, listing: Listing, bounds: Bounds) -> None:
    if depth > bounds.depth_max:
        raise TreeTooLarge(f"{os.fsdecode(path)!r} lies deeper than {bounds.depth_max} directories")
    prefix = path + b"/" if path else b""
    with os.scandir(descriptor) as items:
        for item in items:
            name = os.fsencode(item.name)
            if name == RESERVED and not path:
                continue
            try:
                found = _found(prefix + name, item.stat(follow_symlinks=False))
                kind = stat.S_IFMT(found.mode)
                if kind not in _LISTED_KINDS:
                    listing.skipped.append((found.path, "not a file, directory or symbolic link"))
                    continue
                if len(found.path) > PATH_BYTES_MAX:
                    listing.skipped.append((found.path, "its path is too long"))
                    continue
                if kind == stat.S_IFLNK:
                    found.target = os.readlink(name, dir_fd=descriptor)
                if len(listing.entries) >= bounds.entries_max:
                    raise TreeTooLarge(f"the store has more than {bounds.entries_max} entries")
                listing.entries.append(found)
                if kind == stat.S_IFDIR:
                    _list_below(descriptor, name, found.path, depth, listing, bounds)
            except OSError as error:
                # It was replaced by something of another kind, or went, since it was looked at.
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EINVAL):
                    raise


def _list_below(descriptor: int, name: bytes, path: bytes, depth: int, listing: Listing, bounds: Bounds) -> None:
    below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=descriptor)
    try:
        _list_directory(below, path, depth + 1, listing, bounds)
    finally:
        os.close(below)


def _found(path: bytes, status: os.stat_result) -> Found:
    return Found(path, status.st_mode & ~0o6000, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def read_listing(directory: str) -> dict[bytes, Entry]:
    """The listing in a task's directory, by path.  Raises OSError; msgspec.MsgspecError for a file that is not whole."""
    with open(os.path.join(directory, LISTING), "rb") as file:
        entries = msgspec.msgpack.decode(file.read(), type=list[Found])
    listing = {}
    for found in entries:
        if stat.S_ISREG(found.mode):
            version = (found.inode, found.size, found.mtime_ns)
            listing[found.path] = Entry(found.mode, found.mtime_ns, version)
        else:
            listing[found.path] = Entry(found.mode, target=found.target)
    return listing


def write_listing(directory: str, entries: bytes) -> None:
    """Put an encoded listing (`Listing.encode`) into a task's directory, whole or not at all.  Raises OSError."""
    temporary = os.path.join(directory, f".{LISTING}.new")
    with open(temporary, "wb") as file:
        file.write(entries)
    os.rename(temporary, os.path.join(directory, LISTING))


def make_listing_durable(directory: str) -> None:
    """Without its listing a staging directory that outlived the machine's power could not be merged.  Raises OSError."""
    for name in (LISTING, "."):
        descriptor = os.open(os.path.join(directory, name), os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
