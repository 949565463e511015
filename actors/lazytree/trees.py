"""Which trees OBJECTS are kept for: what each consists of, when it was used last, and which of them are mounted.

    OBJECTS/trees/TREE           the keys of a tree's objects, and what it is a tree of; its modification time is its last use
    OBJECTS/whole/TREE           all of its objects are here: whoever looked held the tree
    OBJECTS/holds/DAEMON.NAME    a tree that is mounted, or about to be: a hard link to what was trees/TREE then
    OBJECTS/daemons/DAEMON       where that daemon runs and mounts; a hold counts while one of these is so
    OBJECTS/evicting             locked while objects are removed; its modification time is that of the last removal

Nothing here is asked of a file's access time, which most file systems do not keep.

**Holding.**  A hold is placed before anybody looks which objects are here, and is given back after the tree is unmounted.  Who evicts
reads the holds with `evicting` locked, removes some objects, and unlocks; so who has placed a hold and then waited for that lock
once (`settled`) knows that what it sees from now on stays.  It waits for no longer than PATIENCE_S: whoever evicts may have been
stopped.

A hold belongs to its daemon, not to a process of it: a killed daemon's tasks run on, and so do their mounts.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import msgspec

from actors.lazytree import mounts
from supervisor.lockfile import holder_of

TREES, WHOLE, HOLDS, DAEMONS, EVICTING = "trees", "whole", "holds", "daemons", "evicting"
LOCKS = ("keeper.lock", "root.lock")  # in a daemon's run directory: somebody of it lives
PATIENCE_S = 0.3
ABANDONED_S = 3600.0  # nobody writes a file for so long
_LOOK_S = 0.005  # flock(2) knows no time-out, and to close an inotify takes the kernel longer than this
_MAGIC = b"AERIETR1"
_HEADER = struct.Struct("<8sI")
KEY_BYTES = 32


class TreeSource(msgspec.Struct, frozen=True):
    """Where a tree's objects can be had again: the layers of an image, by its reference, or a store, a directory on this node.

    `private`: some task brought a login for it.
    """

    reference: str = ""
    layers: list[str] = []
    store: str = ""
    private: bool = False


class Tree(msgspec.Struct, frozen=True):
    """A tree as it was recorded: `keys` are 32 bytes each; `used_ns` when it was used last, since 1970."""

    name: str
    source: TreeSource
    keys: bytes
    used_ns: int


class Trees:
    """The records of the OBJECTS that this descriptor is of, as one daemon makes them.  Raises OSError everywhere."""

    def __init__(self, directory: int, run_dir: str) -> None:
        self._directory = directory
        self._daemon = daemon_name(run_dir)

    def announce(self, run_dir: str, mount_dir: str) -> None:
        """This daemon is about to place holds."""
        prepare(self._directory)
        place, body = f"{DAEMONS}/{self._daemon}", os.fsencode(run_dir) + b"\0" + os.fsencode(mount_dir)
        with contextlib.suppress(FileNotFoundError), _open(self._directory, place) as file:
            if file.read() == body:
                return  # also on a full disk
        _write(self._directory, place, body)

    def hold(self, name: str, tree: str, source: TreeSource, keys: bytes) -> int:
        """The tree is used now, and its objects are to stay until `release(name)` → the record's inode, for `hold_again`."""
        prepare(self._directory)
        while True:
            inode = record(self._directory, tree, source, keys)
            if self.hold_again(name, tree, inode):
                return inode

    def hold_again(self, name: str, tree: str, inode: int) -> bool:
        """Hold a tree if its record is still the one with that inode, and so the same keys."""
        place = f"{HOLDS}/{self._daemon}.{name}"
        try:
            os.utime(f"{TREES}/{tree}", dir_fd=self._directory)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(place, dir_fd=self._directory)  # an earlier attempt's
            os.link(f"{TREES}/{tree}", place, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            return os.stat(place, dir_fd=self._directory).st_ino == inode
        except (FileExistsError, FileNotFoundError):
            return False  # it was evicted, or is being recorded anew

    def release(self, name: str, tree: str = "") -> None:
        """The tree is unmounted; `tree`: which it was, to note that it was in use until now."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{HOLDS}/{self._daemon}.{name}", dir_fd=self._directory)
        if tree:
            with contextlib.suppress(FileNotFoundError):
                os.utime(f"{TREES}/{tree}", dir_fd=self._directory)

    def holds(self) -> list[str]:
        """The names under which this daemon holds trees."""
        prefix = f"{self._daemon}."
        return [name.removeprefix(prefix) for name in _names(self._directory, HOLDS) if name.startswith(prefix)]


def daemon_name(run_dir: str) -> str:
    return hashlib.sha256(os.fsencode(run_dir)).hexdigest()[:16]


def prepare(directory: int) -> None:
    """Make what is missing.  Cheap when nothing is."""
    if os.access(DAEMONS, os.F_OK, dir_fd=directory):
        return
    for name in (TREES, WHOLE, HOLDS, DAEMONS):  # the last one last
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=directory)


def is_recorded(directory: int, tree: str) -> bool:
    return os.access(f"{TREES}/{tree}", os.F_OK, dir_fd=directory)


def record(directory: int, tree: str, source: TreeSource, keys: bytes, used_s: float | None = None) -> int:
    """Record a tree, unless it is recorded like that → its record's inode.  `used_s`: when it was used, since 1970; None: now."""
    head = msgspec.msgpack.encode(source)
    body = _HEADER.pack(_MAGIC, len(head)) + head + keys
    try:
        with _open(directory, f"{TREES}/{tree}") as file:
            if file.read() == body:
                return os.fstat(file.fileno()).st_ino
    except FileNotFoundError:
        pass
    prepare(directory)
    no_longer_whole(directory, tree)  # other objects, perhaps
    return _write(directory, f"{TREES}/{tree}", body, used_s)


def is_whole(directory: int, tree: str) -> bool:
    """Whether nothing of the tree was evicted since somebody found all of it here."""
    return os.access(f"{WHOLE}/{tree}", os.F_OK, dir_fd=directory)


def note_whole(directory: int, tree: str) -> None:
    """All of the tree is here.  For who holds it."""
    prepare(directory)
    os.close(os.open(f"{WHOLE}/{tree}", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=directory))


def settled(directory: int, patience_s: float = PATIENCE_S) -> bool:
    """Wait until whoever evicts has seen the holds that are there → False when it does not come to that."""
    lock = _lock(directory)
    try:
        until_s = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() >= until_s:
                    return False
                time.sleep(_LOOK_S)
    finally:
        os.close(lock)


def last_eviction_ns(directory: int) -> int:
    """When something was evicted last; 0: never."""
    try:
        return os.stat(EVICTING, dir_fd=directory).st_mtime_ns
    except FileNotFoundError:
        return 0


# --- for whoever evicts


@contextlib.contextmanager
def evicting(directory: int, patience_s: float) -> Iterator[bool]:
    """Within this nobody else evicts, and nobody begins to count on what is here → False: somebody else is at it."""
    prepare(directory)
    lock = _lock(directory)
    try:
        until_s = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until_s:
                    yield False
                    return
                time.sleep(_LOOK_S)
        yield True
    finally:
        os.close(lock)


def note_eviction(directory: int) -> None:
    """Objects are about to be removed.  For who has the lock."""
    os.utime(EVICTING, dir_fd=directory)


def no_longer_whole(directory: int, tree: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{WHOLE}/{tree}", dir_fd=directory)


def trees(directory: int, other_than: Mapping[str, int] = MappingProxyType({})) -> list[Tree]:
    """All that are recorded, but those that were not used since these times."""
    found = []
    for name in _names(directory, TREES):
        path = f"{TREES}/{name}"
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path, dir_fd=directory).st_mtime_ns == other_than.get(name):
                continue
        if (tree := _read_tree(directory, path, name)) is not None:
            found.append(tree)
    return found


def remove_abandoned(directory: int) -> None:
    """Remove the files that writers who were killed have left half written."""
    for parent in (".", TREES, DAEMONS):
        for name in _names(directory, parent, hidden=True):
            with contextlib.suppress(FileNotFoundError):
                path = f"{parent}/{name}"
                if time.time() - os.stat(path, dir_fd=directory).st_mtime > ABANDONED_S:
                    os.unlink(path, dir_fd=directory)


def forget(directory: int, tree: Tree) -> None:
    """Nothing of the tree is left."""
    no_longer_whole(directory, tree.name)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{TREES}/{tree.name}", dir_fd=directory)


def held(directory: int) -> list[Tree]:
    """The trees that are mounted or about to be; each once, however many hold it.  Holds of daemons that are no more are removed."""
    alive: dict[str, bool] = {}
    found: dict[int, Tree] = {}
    for name in _names(directory, HOLDS):
        daemon = name.partition(".")[0]
        if daemon not in alive:
            alive[daemon] = _is_alive(directory, daemon)
        if not alive[daemon]:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{HOLDS}/{name}", dir_fd=directory)
            continue
        try:
            inode = os.stat(f"{HOLDS}/{name}", dir_fd=directory).st_ino
        except FileNotFoundError:
            continue  # given back just now
        if inode not in found and (tree := _read_tree(directory, f"{HOLDS}/{name}", name)) is not None:
            found[inode] = tree
    return list(found.values())


def _is_alive(directory: int, daemon: str) -> bool:
    """Whether somebody of the daemon lives, or something that it mounted is still there."""
    try:
        with _open(directory, f"{DAEMONS}/{daemon}") as file:
            run, _, mount_dir = file.read().partition(b"\0")
    except FileNotFoundError:
        return False
    run_dir = Path(os.fsdecode(run))
    if any((run_dir / lock).exists() and holder_of(run_dir / lock) for lock in LOCKS):
        return True
    return bool(mounts.mounts_below(str(run_dir)) or mounts.mounts_below(os.fsdecode(mount_dir)))


def _read_tree(directory: int, path: str, name: str) -> Tree | None:
    """None: it is gone, or not one that this version understands."""
    try:
        with _open(directory, path) as file:
            status = os.fstat(file.fileno())
            body = file.read()
    except FileNotFoundError:
        return None
    if len(body) < _HEADER.size:
        return None
    magic, length = _HEADER.unpack_from(body)
    if magic != _MAGIC:
        return None
    try:
        source = msgspec.msgpack.decode(body[_HEADER.size : _HEADER.size + length], type=TreeSource)
    except msgspec.MsgspecError:
        return None
    return Tree(name, source, body[_HEADER.size + length :], status.st_mtime_ns)


def _lock(directory: int) -> int:
    return os.open(EVICTING, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=directory)


def _names(directory: int, name: str, hidden: bool = False) -> list[str]:
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return []
    try:
        return [found for found in os.listdir(descriptor) if found.startswith(".") == hidden]
    finally:
        os.close(descriptor)


def _open(directory: int, path: str) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory), "rb")


def _write(directory: int, path: str, body: bytes, changed_s: float | None = None) -> int:
    """Write a file, whole or not at all → its inode."""
    parent, _, name = path.rpartition("/")
    unnamed = f"{parent}/.{name[:100]}.{os.getpid()}.{time.monotonic_ns()}"
    with os.fdopen(
        os.open(unnamed, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory), "wb"
    ) as file:
        file.write(body)
        file.flush()
        if changed_s is not None:
            os.utime(file.fileno(), (changed_s, changed_s))
        inode = os.fstat(file.fileno()).st_ino
    os.rename(unnamed, path, src_dir_fd=directory, dst_dir_fd=directory)
    return inode
