"""What the syncs of one task have done so far: a file `synced` in the task's directory, appended to.

What is in the store is told from what others put there by its version, and a sync's own work is no exception: so before a batch
of steps is carried out, its results are written down, durably (an *intent*: the version that a file will have is known, since
it was written under a private name); and afterwards which of them were reached (*settled*).  A sync that finds an intent
without that looks in the store: what it finds there as intended was its own work, the rest was not done.

    each frame    length, CRC-32 (4 bytes each, little-endian), msgpack of a Batch

A torn frame at the end is one that was never acted upon, and is cut off.
"""

from __future__ import annotations

import fcntl
import os
import struct
import zlib
from collections.abc import Iterator

import msgspec

from actors.mount.listing import Entry
from actors.mount.steps import Conflict, Known

JOURNAL = "synced"
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
        self._file = os.open(os.path.join(directory, JOURNAL), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
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
        body = msgspec.msgpack.encode(batch)
        frame = memoryview(_HEAD.pack(len(body), zlib.crc32(body)) + body)
        while frame:
            frame = frame[os.write(self._file, frame) :]
        if not batch.settled:
            os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


def settle(known: Known, batch: Batch) -> None:
    """Take a settled batch into what is known."""
    for move in batch.moves:
        known.move(move.old, move.new)
    for result in batch.results:
        known.settle(result.path, result.where, result.wanted, result.reached)
    known.conflicts.update((path, Conflict(path, beside, reason)) for path, beside, reason in batch.conflicts)
