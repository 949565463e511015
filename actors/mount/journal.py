"""What the syncs of one task have done so far: a file `synced` in the task's directory, appended to.

What is in the store is told from what others put there by its version, and a sync's own work is no exception: so before a batch
of steps is carried out, its results are written down, durably (an *intent*: the version that a file will have is known, since
it was written under a private name); and afterwards which of them were reached (*settled*).  A sync that finds an intent
without that looks in the store: what it finds there as intended was its own work, the rest was not done.

    each frame    length, CRC-32 (4 bytes each, little-endian), msgpack of a Batch

A torn frame at the end is one that was never acted upon, and is cut off.  A task that runs for days has many syncs: a journal
that says much more than what came of it is replaced by one that says only that (`compact`).
"""

from __future__ import annotations

import fcntl
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

import msgspec

from actors.mount.listing import LISTING, Entry
from actors.mount.staging import UPPER
from actors.mount.steps import Conflict, Known

JOURNAL = "synced"
COMPACT_BYTES = 4 << 20  # a shorter journal is left as it is
COMPACT_RATIO = 4  # what is gained by replacing it, at least
_HEAD = struct.Struct("<II")


class Result(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The workspace's `path` with `wanted` is dealt with when the store has `reached` at `where`."""

    path: bytes
    where: bytes
    wanted: Entry | None
    reached: Entry | None


class Move(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The store's directory `old`, whose inode this is, became `new`."""

    old: bytes
    new: bytes
    inode: int


class Batch(msgspec.Struct, frozen=True, array_like=True):
    """Work, intended or `settled`.  `conflicts` (path, beside, reason) hold with the result at `beside`, if there is one."""

    settled: bool
    results: list[Result] = []
    moves: list[Move] = []
    conflicts: list[tuple[bytes, bytes, str]] = []


class Journal:
    """The journal in the task's directory, locked: a second sync of the same task waits for the first.  Raises OSError."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._file = _open_locked(os.path.join(directory, JOURNAL))
        try:
            self.batches = list(self._read())
        except BaseException:
            os.close(self._file)
            raise

    def _read(self) -> Iterator[Batch]:
        with open(self._file, "rb", closefd=False) as file:
            content = file.read()
        place = 0
        decoder = msgspec.msgpack.Decoder(Batch)
        while len(content) - place >= _HEAD.size:
            length, checksum = _HEAD.unpack_from(content, place)
            body = content[place + _HEAD.size : place + _HEAD.size + length]
            if len(body) < length or zlib.crc32(body) != checksum:
                break
            yield decoder.decode(body)
            place += _HEAD.size + length
        os.ftruncate(self._file, place)
        os.lseek(self._file, place, os.SEEK_SET)

    def append(self, batch: Batch) -> None:
        """Write a batch down; an intent is durable when this returns."""
        _write(self._file, _frame(batch))
        if not batch.settled:
            os.fsync(self._file)

    def compact(self, listing: Mapping[bytes, Entry], known: Known) -> None:
        """Replace a journal that is long by what came of it, `known`, if that is much shorter.  No intent may be open."""
        size_bytes = os.lseek(self._file, 0, os.SEEK_CUR)
        if size_bytes < COMPACT_BYTES:
            return
        frame = _frame(summary(listing, known))
        if size_bytes < COMPACT_RATIO * len(frame):
            return
        path = os.path.join(self._directory, JOURNAL)
        with suppress(FileNotFoundError):
            os.unlink(f"{path}.new")
        file = os.open(f"{path}.new", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)  # before it has the name: whoever opens that waits for this sync's end
            _write(file, frame)
            os.fsync(file)
            os.rename(f"{path}.new", path)
            directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)  # before an intent is written to a file that may not be the one found after a power cut
            finally:
                os.close(directory)
        except BaseException:
            os.close(file)
            raise
        os.close(self._file)
        self._file = file

    def close(self) -> None:
        os.close(self._file)


@contextmanager
def no_more_syncs(directory: str) -> Iterator[None]:
    """Wait for the end of a sync of the task's directory that is under way; none will find anything to do there again.

    For whoever removes the directory: staging that is half gone reads like a task that took back half of its work.  Raises OSError.
    """
    try:
        file = _open_locked(os.path.join(directory, JOURNAL))
    except FileNotFoundError:
        yield  # the directory is gone
        return
    try:
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(directory, LISTING))  # no sync goes on without it
        yield
    finally:
        os.close(file)


def staged(directory: str) -> bool:
    """Whether a task has changed anything in the workspace of this directory."""
    try:
        with os.scandir(os.path.join(directory, UPPER)) as entries:
            return next(entries, None) is not None or os.path.exists(os.path.join(directory, JOURNAL))
    except FileNotFoundError:
        return False


def summary(listing: Mapping[bytes, Entry], known: Known) -> Batch:
    """One settled batch that makes `known` of what the listing says."""
    was = Known.listed(listing)
    for old, new in known.moves:
        was.move(old, new)
    paths = {path for view in (was.ours, was.theirs, known.ours, known.theirs) for path in view}
    results = [
        Result(path, path, known.ours.get(path), known.theirs.get(path))
        for path in sorted(paths)
        if was.ours.get(path) != known.ours.get(path) or was.theirs.get(path) != known.theirs.get(path)
    ]
    moves = [Move(old, new, 0) for old, new in known.moves]  # the inode is only asked of an intent
    conflicts = [(conflict.path, conflict.beside, conflict.reason) for conflict in known.conflicts.values()]
    return Batch(True, results, moves, conflicts)


def _open_locked(path: str) -> int:
    """The file at `path`, made if it is missing, locked: the one that has the name by then."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                if os.path.samestat(os.fstat(file), os.stat(path)):
                    return file
            except FileNotFoundError:
                pass  # removed while we waited: the next attempt says whether its directory is gone too
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _frame(batch: Batch) -> bytes:
    body = msgspec.msgpack.encode(batch)
    return _HEAD.pack(len(body), zlib.crc32(body)) + body


def _write(file: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(file, rest) :]


def settle(known: Known, batch: Batch) -> None:
    """Take a settled batch into what is known."""
    for move in batch.moves:
        known.move(move.old, move.new)
    for result in batch.results:
        known.settle(result.path, result.where, result.wanted, result.reached)
    for path, beside, reason in batch.conflicts:
        if reason:
            known.conflicts[path] = Conflict(path, beside, reason)
        else:
            known.conflicts.pop(path, None)
