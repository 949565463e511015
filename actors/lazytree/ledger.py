"""How much of the disk OBJECTS take: a sum of ledgers, one to a process that publishes or evicts, right also when one is killed.

    OBJECTS/limits       what may be taken in all, and how much of the disk stays free; whoever started a daemon last said so
    OBJECTS/ledgers/N    what the holders of this ledger have added, one after another; may be below zero, the sum is not
    OBJECTS/unlinked     files without a name that somebody still holds open: their space is taken until the kernel has freed it
    OBJECTS/wanted       somebody was refused, and so many bytes it wanted: written to wake whoever evicts
    OBJECTS/short        is there when whoever evicted last could not make all the room that it should have: it is no use to wait for it

A ledger is its holder's alone: by flock(2), so that it is free when its holder is dead.  It says what is about to be done before it is
(the *intent*: this inode, that name), and that it is done, with the sum, in one write after it.  Whoever takes a dead holder's ledger
looks whether the name, or the space, is there, and so knows which of the two is true.  Nothing is ever counted again for that, and
nobody waits for anybody: a holder that was stopped stops only itself.

The bound is hard.  A holder *promises* itself room, writes that down, and only then adds up what all have taken and promised: of two
that would be too much together, at least one sees it.

What a power cut leaves is counted anew (`Ledger.recount`), with the first start after it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
import time
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

QUANTUM_BYTES = 64 << 20  # promised at once; less when all of the cache is small
BLOCK_BYTES = 4096

LEDGERS, LIMITS, UNLINKED, WANTED, SHORT = "ledgers", "limits", "unlinked", "wanted", "short"
_RECORD = struct.Struct("<qqqqqq32s32s")
_UNLINKED = struct.Struct("<q32s")
_RECOUNTS_MAX = 5
_HANDLE_BYTES_MAX = 24

_libc = ctypes.CDLL(None, use_errno=True)


class NoRoom(OSError):
    """It would take more of the disk than may be taken.  No fault of anybody's: it can be done without keeping it."""

    def __init__(self, text: str) -> None:
        super().__init__(errno.ENOSPC, text)


class Limits(NamedTuple):
    """`cache_bytes_max`: what all objects may take; `free_bytes_min`: what stays free on their disk."""

    cache_bytes_max: int
    free_bytes_min: int


class _Intent(IntEnum):
    NONE = 0
    PUBLISH = 1  # a name is about to be given to this inode
    UNLINK = 2  # and to be taken from it
    FORGET = 3  # an unlinked file is freed, and is about to leave the list of these


_PUBLISH = int(_Intent.PUBLISH)


class _Record(NamedTuple):
    """What is in a ledger.  `adds_bytes` is what the intent adds, if it was carried out."""

    used: int = 0
    promised: int = 0
    since_ns: int = 0  # since when its holder has it; 0: nobody has
    intent: int = _Intent.NONE
    inode: int = 0
    adds_bytes: int = 0
    key: bytes = b""
    handle: bytes = b""


class Sum(NamedTuple):
    """All ledgers together: what is taken, what is taken or promised, and since when the oldest of their holders is at work."""

    used_bytes: int
    promised_bytes: int
    since_ns: int | None


def set_limits(directory: int, limits: Limits) -> None:
    """From now on these are the limits of the OBJECTS that this descriptor is of.  Raises OSError."""
    if limits_of(directory) == limits:
        return  # also on a full disk
    _write_whole(directory, LIMITS, b"%d %d\n" % limits)


def limits_of(directory: int) -> Limits | None:
    """None: nobody has set any."""
    text = _read_whole(directory, LIMITS).split()
    return Limits(int(text[0]), int(text[1])) if len(text) == 2 else None


def sum_of(directory: int) -> Sum:
    """What all ledgers say.  A few system calls for each."""
    records = [_Record(*_RECORD.unpack(body)) for body in _bodies(directory)]
    since = [record.since_ns for record in records if record.since_ns]
    return Sum(
        sum(record.used for record in records),
        sum(max(record.used, record.promised) for record in records),
        min(since, default=None),
    )


def wanted_bytes(directory: int) -> int:
    """What was wanted by whoever was refused last."""
    return int(_read_whole(directory, WANTED) or 0)


def note_short(directory: int, short: bool) -> None:
    """Whether the last eviction made too little room."""
    try:
        if short:
            os.close(os.open(SHORT, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=directory))
        else:
            os.unlink(SHORT, dir_fd=directory)
    except OSError:
        pass  # there is none; or a full disk, and somebody waits in vain


def is_short(directory: int) -> bool:
    return os.access(SHORT, os.F_OK, dir_fd=directory)


def unlinked_bytes(directory: int) -> int:
    """What files take that have no name any more."""
    return sum(size for size, _ in _unlinked(directory))


def free_bytes(directory: int) -> int:
    """On the disk."""
    found = os.fstatvfs(directory)
    return found.f_bavail * found.f_frsize


def taken_bytes(status: os.stat_result, path: str = "", directory: int | None = None) -> int:
    """What a file takes of the disk; by its size, which stays as it is, but for a sparse one.

    `path`, and the `directory` that it begins in: where the file is, to be looked at more closely if it seems to be sparse.  While
    ext4 finds a place for what was just written, it counts these blocks for a moment neither as wanted nor as taken.  Raises OSError.
    """
    size = status.st_size + -status.st_size % BLOCK_BYTES
    taken = max(status.st_blocks * 512, BLOCK_BYTES)
    return size if taken >= size or (path and not _has_holes(path, directory)) else taken


def _has_holes(path: str, directory: int | None) -> bool:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return True  # it is gone, and as good as what its status says
    try:
        return os.lseek(file, 0, os.SEEK_HOLE) < os.fstat(file).st_size
    finally:
        os.close(file)


class Ledger:
    """One of the ledgers of the OBJECTS that the descriptor `directory` is of, from here until `close`.  For one thread at a time."""

    def __init__(self, directory: int, taken: tuple[int, bytes] | None = None) -> None:
        """Take one whose holder is dead, or a new one; `taken`: this one, locked, and what is in it.  Raises OSError."""
        self._directory = directory
        self._limits = limits_of(directory)
        with contextlib.suppress(FileExistsError):
            os.mkdir(LEDGERS, 0o700, dir_fd=directory)
        self._file, body = taken or _take(directory)
        self._record = _Record(*_RECORD.unpack(body)) if len(body) == _RECORD.size else _Record()
        self._resolve()
        self._save(self._record._replace(promised=self._record.used, since_ns=time.time_ns()))

    def close(self) -> None:
        self._save(self._record._replace(promised=self._record.used, since_ns=0))
        os.close(self._file)

    # --- adding ---

    def admit(self, size_bytes: int) -> None:
        """See to it that an object of this size can be published.  Raises NoRoom."""
        wanted = self._record.used + size_bytes + -size_bytes % BLOCK_BYTES
        if wanted <= self._record.promised or self._limits is None:
            return
        quantum = min(QUANTUM_BYTES, self._limits.cache_bytes_max // 64)
        for promised in (wanted + quantum, wanted):
            before = self._record
            self._save(before._replace(promised=promised))
            if self._fits(promised - before.used):
                return
            self._save(before)
        with contextlib.suppress(OSError):  # nobody hears it then, and nothing is evicted for it
            _write_whole(self._directory, WANTED, b"%d\n" % size_bytes)
        raise NoRoom("the object cache is as full as it may be")

    def _fits(self, promised_bytes: int) -> bool:
        assert self._limits is not None
        return (
            sum_of(self._directory).promised_bytes <= self._limits.cache_bytes_max
            and free_bytes(self._directory) >= self._limits.free_bytes_min + promised_bytes
        )

    def begin_publishing(self, key: str, file: int) -> int:
        """The file of that descriptor is about to be given its name → what it counts for, for `end_publishing`."""
        status = os.fstat(file)
        size, record = taken_bytes(status, f"/proc/self/fd/{file}"), self._record
        # Packed as it is, for this comes with every file of an image.
        body = _RECORD.pack(
            record.used, record.promised, record.since_ns, _PUBLISH, status.st_ino, size, bytes.fromhex(key), b""
        )
        os.pwrite(self._file, body, 0)
        return size

    def end_publishing(self, size_bytes: int) -> None:
        """It has its name; 0: it has not."""
        self._done(size_bytes)

    # --- taking away ---

    def unlink(self, key: str, published_bytes: int | None = None) -> int:
        """Remove an object → how many bytes that has freed; those of a file that somebody holds come with `forget_freed`.

        `published_bytes`: the size that it had when it was counted, if that is not the present one.
        """
        path = f"{key[:2]}/{key[2:]}"
        try:
            status = os.stat(path, dir_fd=self._directory, follow_symlinks=False)
            handle = _handle_of(self._directory, path)
        except FileNotFoundError:
            return 0
        if published_bytes is None:
            size = taken_bytes(status, path, self._directory)
        else:
            size = published_bytes + -published_bytes % BLOCK_BYTES
        self._save(
            self._record._replace(
                intent=_Intent.UNLINK, inode=status.st_ino, adds_bytes=-size, key=bytes.fromhex(key), handle=handle
            )
        )
        with contextlib.suppress(FileNotFoundError):  # by somebody who keeps no ledger
            os.unlink(path, dir_fd=self._directory)
        return self._after_unlink()

    def _after_unlink(self) -> int:
        size = -self._record.adds_bytes
        if not _is_freed(self._directory, self._record.handle):
            # It is in the list before it is forgotten here; and not twice, when that was all that a dead holder had left to do.
            rows = _unlinked(self._directory)
            if all(handle != self._record.handle for _, handle in rows):
                _write_unlinked(self._directory, [*rows, (size, self._record.handle)])
            self._done(0)
            return 0
        self._done(-size)
        return size

    def forget_freed(self) -> int:
        """Look which files that had been unlinked are freed by now → how many bytes.  For whoever evicts, who is alone."""
        freed = 0
        rows = _unlinked(self._directory)
        for row in rows:
            size, handle = row
            if _is_freed(self._directory, handle):
                self._save(self._record._replace(intent=_Intent.FORGET, adds_bytes=-size, handle=handle))
                _write_unlinked(self._directory, [left for left in _unlinked(self._directory) if left != row])
                self._done(-size)
                freed += size
        return freed

    def recount(self, counted_bytes: int, before: Sum) -> bool:
        """Set the sum of all ledgers right, by what was `counted` while it was `before` → False: it has changed meanwhile."""
        if sum_of(self._directory).used_bytes != before.used_bytes:
            return False
        self._done(counted_bytes + unlinked_bytes(self._directory) - before.used_bytes)
        return True

    # --- its file ---

    def _resolve(self) -> None:
        """Finish what a dead holder was at."""
        record = self._record
        match record.intent:
            case _Intent.PUBLISH:
                self._done(record.adds_bytes if self._is_there() else 0)
            case _Intent.UNLINK if self._is_there():
                self._done(0)
            case _Intent.UNLINK:
                self._after_unlink()
            case _Intent.FORGET:
                listed = any(handle == record.handle for _, handle in _unlinked(self._directory))
                self._done(0 if listed else record.adds_bytes)

    def _is_there(self) -> bool:
        """Whether the object of the intent has its name."""
        key = self._record.key.hex()
        try:
            found = os.stat(f"{key[:2]}/{key[2:]}", dir_fd=self._directory, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return found.st_ino == self._record.inode

    def _done(self, added_bytes: int) -> None:
        record = self._record
        used = record.used + added_bytes
        self._save(_Record(used, max(record.promised, used), record.since_ns))

    def _save(self, record: _Record) -> None:
        os.pwrite(self._file, _RECORD.pack(*record), 0)
        self._record = record


def _take(directory: int) -> tuple[int, bytes]:
    """A ledger that nobody holds, locked, and what is in it."""
    number = 0
    while True:
        file = os.open(f"{LEDGERS}/{number}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=directory)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file, os.pread(file, _RECORD.size, 0)
        except BlockingIOError:
            os.close(file)
            number += 1


def take_up(directory: int) -> set[bytes]:
    """Finish what dead holders were at → the keys that living ones are just publishing.

    For whoever evicts: what is published and not counted would be taken off all the same.
    """
    publishing: set[bytes] = set()
    number = 0
    while True:
        try:
            file = os.open(f"{LEDGERS}/{number}", os.O_RDWR | os.O_CLOEXEC, dir_fd=directory)
        except FileNotFoundError:
            return publishing
        body = os.pread(file, _RECORD.size, 0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            if len(body) == _RECORD.size and (record := _Record(*_RECORD.unpack(body))).intent == _Intent.PUBLISH:
                publishing.add(record.key)
        else:
            Ledger(directory, (file, os.pread(file, _RECORD.size, 0))).close()
        number += 1


def _bodies(directory: int) -> Iterator[bytes]:
    number = 0
    while True:
        try:
            file = os.open(f"{LEDGERS}/{number}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
        except FileNotFoundError:
            return
        try:
            body = os.read(file, _RECORD.size)
        finally:
            os.close(file)
        if len(body) == _RECORD.size:  # else it is just being made
            yield body
        number += 1


def _unlinked(directory: int) -> list[tuple[int, bytes]]:
    body = _read_whole(directory, UNLINKED)
    return list(_UNLINKED.iter_unpack(body[: len(body) - len(body) % _UNLINKED.size]))


def _write_unlinked(directory: int, rows: list[tuple[int, bytes]]) -> None:
    _write_whole(directory, UNLINKED, b"".join(_UNLINKED.pack(*row) for row in rows))


def _read_whole(directory: int, name: str) -> bytes:
    """The content of a small file; nothing when there is none."""
    try:
        file = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return b""
    try:
        return os.read(file, 1 << 20)
    finally:
        os.close(file)


def _write_whole(directory: int, name: str, body: bytes) -> None:
    """Write a small file, whole or not at all."""
    unnamed = f".{name}.{os.getpid()}.{time.monotonic_ns()}"
    file = os.open(unnamed, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory)
    try:
        os.write(file, body)
    finally:
        os.close(file)
    os.rename(unnamed, name, src_dir_fd=directory, dst_dir_fd=directory)


# --- whether the kernel has freed a file that has no name: by its handle (name_to_handle_at(2)), which holds nothing ---


class _FileHandle(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint), ("type", ctypes.c_int), ("bytes", ctypes.c_ubyte * _HANDLE_BYTES_MAX)]


def _handle_of(directory: int, path: str) -> bytes:
    """The file's handle, 32 bytes; no bytes where the file system has none."""
    found, mount = _FileHandle(_HANDLE_BYTES_MAX), ctypes.c_int()
    if _libc.name_to_handle_at(directory, os.fsencode(path), ctypes.byref(found), ctypes.byref(mount), 0):
        if ctypes.get_errno() == errno.ENOENT:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return b""
    return bytes(found).ljust(32, b"\0")


def _is_freed(directory: int, handle: bytes) -> bool:
    """Whether the file is gone; so it is, as far as anybody can say, when it has no handle, or this process may not use one."""
    if not handle.strip(b"\0"):
        return True
    found = _FileHandle.from_buffer_copy(handle)
    descriptor = _libc.open_by_handle_at(directory, ctypes.byref(found), os.O_PATH | os.O_CLOEXEC)
    if descriptor < 0:
        return True
    try:
        return os.fstat(descriptor).st_nlink > 0  # not the one that was unlinked: that has no name
    finally:
        os.close(descriptor)
