"""A workspace's store, a directory, as the Source of its LAZY layer: exactly the version that was listed when the task began.

Others may change the store meanwhile, and so may a sync of this very task, which puts the version that was listed aside: somebody in
the task may have opened the file before it was written to.  Nothing about the store can be believed: links where directories were,
FIFOs where files were.  Each component is opened by the descriptor of the one before, without following links and without waiting,
and a file's content is given out only when its inode, size and modification time are the listed ones before the read *and* after it.
(What a writer changes through a shared memory mapping without moving the time cannot be seen by anybody.)

A store may be slow or hang, as a whole or in parts, and a server's memory is bounded.  So who waits for the store holds no content: a
thread brings the file's bytes into the page cache.  What is there is read to be answered, a few reads at a time, and waits for nothing.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar, cast
from weakref import WeakValueDictionary

import msgspec
import trio

from actors.lazytree.server import SourceError
from actors.lazytree.table import Row
from actors.mount.listing import aside_name

T = TypeVar("T")

KEPT_OPEN_MAX = 64
WAITING_MAX = 512  # reads that wait for the store, each in a thread of its own
WAITING_OF_ONE_MAX = 2  # of these for one file: a thread that hangs outlives its read, and the reader may ask again and again
READY_MAX = 12  # reads of what is in the page cache, up to 1 MiB each
SMALL_BYTES_MAX = 32 << 10  # so little may be held while waiting for the store
TRIES_MAX = 3  # to read from the page cache what was brought there a moment ago

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
    it has one.  `read_whole` is told the index of an object that has been read as a whole.  Raises OSError.
    """

    def __init__(self, path: str, aside: bytes = b"", read_whole: Callable[[int], None] = lambda index: None) -> None:
        self._aside = aside
        self._read_whole = read_whole
        self._read_bytes: dict[int, int] = {}  # of objects that have been read in part, by index
        self._store = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._decoder = msgspec.msgpack.Decoder(StoredFile)
        self._waiting = trio.CapacityLimiter(WAITING_MAX)
        self._waiting_of: WeakValueDictionary[int, trio.CapacityLimiter] = WeakValueDictionary()  # by index, while there is one
        self._ready = trio.CapacityLimiter(READY_MAX)
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, _Open] = OrderedDict()  # by index, the longest unused first

    def name(self, row: Row) -> str:
        """A file, for a reason."""
        return _readable(self._decoder.decode(row.source).path)

    async def read(self, index: int, row: Row, offset: int, size: int) -> bytes | bytearray:
        """`size` bytes at `offset` of the file in `row`.  Raises SourceError when they are not the listed version's."""
        data = await self._data(index, row, offset, size)
        # A byte that is read twice counts twice: rare, for the kernel caches what it has, and whatever comes of it is right.
        read_bytes = self._read_bytes.pop(index, 0) + size
        if read_bytes >= row.size_bytes:
            self._read_whole(index)
        else:
            self._read_bytes[index] = read_bytes
        return data

    async def _data(self, index: int, row: Row, offset: int, size: int) -> bytes | bytearray:
        stored = self._decoder.decode(row.source)
        turn = _Turn(self._waiting_of.setdefault(index, trio.CapacityLimiter(WAITING_OF_ONE_MAX)), self._waiting)
        try:
            file = self._kept_open(index)
            if file is None and size <= SMALL_BYTES_MAX:
                return await _in_thread(turn, self._read, index, stored, offset, size)
            for _ in range(TRIES_MAX):
                if file is not None:
                    data = await _in_thread(self._ready, _read_ready, file, stored, offset, size)
                    if data is not None:
                        return data
                file = await _in_thread(turn, self._bring, index, stored, offset, size)
            return await _in_thread(self._ready, self._read, index, stored, offset, size)
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

    def _bring(self, index: int, stored: StoredFile, offset: int, size: int) -> _Open:
        """Open the file, and bring the bytes into the page cache."""
        file = self._opened(index, stored)
        _check(file, stored)
        end = offset + size
        while offset < end and (piece := os.pread(file.descriptor, min(SMALL_BYTES_MAX, end - offset), offset)):
            offset += len(piece)
        return file

    def _kept_open(self, index: int) -> _Open | None:
        with self._lock:
            if index in self._kept:
                self._kept.move_to_end(index)
            return self._kept.get(index)

    def _opened(self, index: int, stored: StoredFile) -> _Open:
        if (kept := self._kept_open(index)) is not None:
            return kept
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


def _read_ready(file: _Open, stored: StoredFile, offset: int, size: int) -> bytearray | None:
    """The bytes, if the page cache has all of them (or the file system cannot say).  Raises SourceError, OSError."""
    _check(file, stored)
    data = bytearray(size)
    try:
        try:
            count = os.preadv(file.descriptor, [data], offset, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            count = os.preadv(file.descriptor, [data], offset)
    except BlockingIOError:
        return None
    _check(file, stored)
    return data if count == size else None


class _Turn:
    """A limiter that is two: of one file's threads, then of all."""

    def __init__(self, one: trio.CapacityLimiter, all_: trio.CapacityLimiter) -> None:
        self._one, self._all = one, all_

    async def acquire_on_behalf_of(self, borrower: object) -> None:
        await self._one.acquire_on_behalf_of(borrower)
        try:
            await self._all.acquire_on_behalf_of(borrower)
        except BaseException:
            self._one.release_on_behalf_of(borrower)
            raise

    def release_on_behalf_of(self, borrower: object) -> None:
        self._all.release_on_behalf_of(borrower)
        self._one.release_on_behalf_of(borrower)


async def _in_thread(limiter: trio.CapacityLimiter | _Turn, function: Callable[..., T], *arguments: Any) -> T:
    return await trio.to_thread.run_sync(
        function, *arguments, abandon_on_cancel=True, limiter=cast(trio.CapacityLimiter, limiter)
    )


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
