"""A workspace's store, a directory, as the Source of its LAZY layer: exactly the version that was listed when the task began.

Others may change the store meanwhile, and so may a sync of this very task, which puts the version that was listed aside: somebody in
the task may have opened the file before it was written to.  Nothing about the store can be believed: links where directories were,
FIFOs where files were.  Each component is opened by the descriptor of the one before, without following links and without waiting,
and a file's content is given out only when its inode, size and modification time are the listed ones before the read *and* after it.
(What a writer changes through a shared memory mapping without moving the time cannot be seen by anybody.)
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import OrderedDict

import msgspec
import trio

from actors.lazytree.server import SourceError
from actors.lazytree.table import Row
from actors.mount.listing import aside_name

KEPT_OPEN_MAX = 64
THREADS_MAX = 24  # each may hold one read's bytes (1 MiB)

_CHANGED = "changed in the store since the task began"
# Missing; no directory on the way; a link; a socket, or a device that is not there.
_NOT_THE_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO)


class StoredFile(msgspec.Struct, frozen=True):
    """A version of a file, as it was listed; as msgpack it is the `source` of a row.  `path` is relative to the store."""

    path: bytes
    inode: int
    size: int
    mtime_ns: int


class _Open:
    """A descriptor that is closed when the last reader lets go: one may be reading while the file is dropped from those kept."""

    __slots__ = ("descriptor",)

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class DirectorySource:
    """The store at `path`, opened once: nothing but descriptors is used afterwards.  `aside`: the task's private directory in it, if
    it has one.  Raises OSError.
    """

    def __init__(self, path: str, aside: bytes = b"") -> None:
        self._aside = aside
        self._store = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._decoder = msgspec.msgpack.Decoder(StoredFile)
        self._limiter = trio.CapacityLimiter(THREADS_MAX)
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, _Open] = OrderedDict()  # by index, the longest unused first

    async def read(self, index: int, row: Row, offset: int, size: int) -> bytes:
        """`size` bytes at `offset` of the file in `row`.  Raises SourceError when they are not the listed version's."""
        stored = self._decoder.decode(row.source)
        try:
            return await trio.to_thread.run_sync(
                self._read, index, stored, offset, size, abandon_on_cancel=True, limiter=self._limiter
            )
        except OSError as error:
            raise SourceError(f"{_readable(stored.path)}: cannot be read in the store: {error.strerror}") from None

    def _read(self, index: int, stored: StoredFile, offset: int, size: int) -> bytes:
        file = self._opened(index, stored)
        _check(file, stored)
        data = os.pread(file.descriptor, size, offset)
        _check(file, stored)
        if len(data) != size:
            raise SourceError(f"{_readable(stored.path)}: {_CHANGED}")
        return data

    def _opened(self, index: int, stored: StoredFile) -> _Open:
        with self._lock:
            if index in self._kept:
                self._kept.move_to_end(index)
                return self._kept[index]
        file = self._found(stored)  # without the lock: a store may be slow, others need not wait for it
        with self._lock:
            self._kept[index] = file
            if len(self._kept) > KEPT_OPEN_MAX:
                self._kept.popitem(last=False)
        return file

    def _found(self, stored: StoredFile) -> _Open:
        """The version listed: where it was, or put aside."""
        file = self._open_if_there(stored.path, _NOT_THE_FILE)
        if self._aside and (file is None or not _is(file, stored)):
            file = self._open_if_there(self._aside + b"/" + aside_name(stored.inode), (*_NOT_THE_FILE, errno.EACCES))
        if file is None:
            raise SourceError(f"{_readable(stored.path)}: {_CHANGED}")
        return file

    def _open_if_there(self, path: bytes, absent: tuple[int, ...]) -> _Open | None:
        try:
            return _Open(self._open(path))
        except OSError as error:
            if error.errno not in absent:
                raise
            return None

    def _open(self, path: bytes) -> int:
        directory = self._store
        *parents, name = path.split(b"/")
        try:
            for parent in parents:
                below = os.open(parent, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
                if directory != self._store:
                    os.close(directory)
                directory = below
            return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, dir_fd=directory)
        finally:
            if directory != self._store:
                os.close(directory)


def _is(file: _Open, stored: StoredFile) -> bool:
    """Whether the open file is the version listed."""
    status = os.fstat(file.descriptor)
    seen = (stat.S_ISREG(status.st_mode), status.st_ino, status.st_size, status.st_mtime_ns)
    return seen == (True, stored.inode, stored.size, stored.mtime_ns)


def _check(file: _Open, stored: StoredFile) -> None:
    if not _is(file, stored):
        raise SourceError(f"{_readable(stored.path)}: {_CHANGED}")


def _readable(path: bytes) -> str:
    return path.decode("utf-8", "backslashreplace")
