"""The spool of an image mount: where its server keeps what it has fetched until its parent has published it.

A sparse file without a name, on the file system of OBJECTS, in which every object of the image has a place of its own.  The server
writes to it (it has dropped its privileges and cannot write to OBJECTS), its successor goes on with it, the parent copies whole
objects out of it.  Nothing is recorded of what is in it: bytes are there if no hole is, and are the right ones if their digest is.
"""

from __future__ import annotations

import ctypes
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import accumulate

from actors.image.archives.archive import Archive
from actors.image.layers.checkpoints import Spans
from actors.image.layers.content import NO_SPACE, LayerContent, copy_content, decode_content, stored_bytes
from actors.lazytree.objects import Objects
from actors.lazytree.table import Row

PAGE_BYTES = 4096
_TAR_RECORD_BYTES = 512
# An object's data begins at a record of its layer, and at least one more record is between it and the next one's.
_SCALE = PAGE_BYTES // _TAR_RECORD_BYTES
PUBLISHED_BYTES_MAX, PUBLISHED_MAX = 256 << 20, 2048  # in one call; the order of seconds on a slow disk
MEMORY_BYTES = 16 << 20  # of a spool in memory
ROOM_BYTES = 64 << 20  # so much must be free on the disk before it is tried again
_PUNCH_HOLE, _KEEP_SIZE = 2, 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def create(objects_directory: str) -> int:
    """The descriptor of a new spool for content of the objects in that directory.  Raises OSError."""
    return os.open(objects_directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)


class Spool:
    """A spool, by its descriptor, which stays the caller's.  Thread-safe."""

    def __init__(self, descriptor: int, spans: Spans) -> None:
        self.descriptor = self._descriptor = descriptor
        # Of each layer, in the whole of the image's layers.
        self._starts = list(accumulate((layer.size_bytes for layer in spans.layers[:-1]), initial=0))
        self._spans = spans
        # Behind it is what is announced (`coming`).
        self.end = _SCALE * sum(layer.size_bytes for layer in spans.layers) + PAGE_BYTES
        self.end -= self.end % PAGE_BYTES
        self._memory: int | None = None

    @property
    def in_memory(self) -> bool:
        return self._descriptor == self._memory

    def to_memory(self) -> None:
        """From now on, what is fetched is kept in memory: the disk is full.  Nobody publishes that, and it is empty."""
        if self._memory is None:
            self._memory = os.memfd_create("spool", os.MFD_CLOEXEC)  # never closed: a thread may be just about to use it
        self._descriptor = self._memory

    def to_disk(self) -> None:
        """There is room again."""
        self._descriptor = self.descriptor
        if self._memory is not None:
            os.ftruncate(self._memory, 0)

    @property
    def disk_has_room(self) -> bool:
        return self._free_bytes >= ROOM_BYTES

    @property
    def has_ample_room(self) -> bool:
        """Whether there is room also for what nobody has asked for yet."""
        return not self.in_memory and self._free_bytes >= 4 * ROOM_BYTES

    @property
    def _free_bytes(self) -> int:
        found = os.fstatvfs(self.descriptor)
        return found.f_bavail * found.f_frsize

    def place(self, content: LayerContent) -> int:
        """Where the content of an object begins in the spool."""
        return _SCALE * (self._starts[content.layer] + content.offset)

    def write(self, place: int, data: memoryview) -> None:
        """Raises OSError (no space)."""
        while data:
            written = os.pwrite(self._descriptor, data, place)
            data, place = data[written:], place + written

    def read(self, place: int, size: int) -> bytes | None:
        """The bytes there, right or not; None when some of them are missing."""
        if not self.has(place, size):
            return None
        data = os.pread(self._descriptor, size, place)
        return data if len(data) == size else None

    def has(self, place: int, size: int) -> bool:
        """Whether something, right or not, is in each page of that place."""
        try:
            return os.lseek(self._descriptor, place, os.SEEK_HOLE) >= place + size
        except OSError:
            return False  # behind the end

    def free(self, place: int, size: int) -> None:
        """Give up what is there.  Raises OSError."""
        if _libc.fallocate(self._descriptor, _PUNCH_HOLE | _KEEP_SIZE, place, size):
            raise OSError(ctypes.get_errno(), f"fallocate: {os.strerror(ctypes.get_errno())}")

    def free_object(self, row: Row, content: LayerContent) -> None:
        """Give up all of an object, with its last page, which is no other's.  Raises OSError."""
        stored = stored_bytes(row, content)
        self.free(self.place(content), stored + -stored % PAGE_BYTES)

    def clear(self) -> None:
        os.ftruncate(self._descriptor, 0)

    @property
    def used_bytes(self) -> int:
        """Of the file system."""
        return os.fstat(self._descriptor).st_blocks * 512

    def objects(self) -> Iterator[tuple[int, Row, LayerContent]]:
        """The objects of which something is there."""
        place = 0
        while True:
            try:
                place = os.lseek(self._descriptor, place, os.SEEK_DATA)
            except OSError:
                return  # no more
            place -= place % PAGE_BYTES
            if place >= self.end:
                return
            layer = bisect_right(self._starts, place // _SCALE) - 1
            offset = place // _SCALE - self._starts[layer]
            for index, row, content in self._spans.objects(layer, offset, offset + 1):
                yield index, row, content
                place = self.place(content) + stored_bytes(row, content)
            place += PAGE_BYTES - place % PAGE_BYTES


def publish(archive: str, spool: int, objects: Objects, rows: Sequence[int]) -> list[int]:
    """Publish objects that a server has `Completed`: copied out, checked against their key, named; not yet durable.

    Blocks, for as long as it takes to copy and hash them: call it in a worker thread or a process.  Returns the rows for the
    `Taken` to answer with, as many as were done within PUBLISHED_BYTES_MAX and PUBLISHED_MAX: also those whose content is not theirs,
    which are not published.  What there is no room for is left out.  Raises OSError, ArchiveInvalid.
    """
    opened = Archive.open(archive, checked=True)
    with closing(opened.objects()) as table, closing(opened.spans(table)) as spans:
        taken, left_bytes = [], PUBLISHED_BYTES_MAX
        for index in rows[:PUBLISHED_MAX]:
            if left_bytes <= 0:
                break
            if 0 <= index < len(table):  # the server is nobody whom to believe
                row = table.row(index)
                if not objects.has(row.key):
                    try:
                        left_bytes -= _publish(Spool(spool, spans), objects, row)
                    except OSError as error:
                        if error.errno not in NO_SPACE:
                            raise
                        continue  # it is served from the spool for as long as it is there; later there may be room
            taken.append(index)
        return taken


def _publish(spool: Spool, objects: Objects, row: Row) -> int:
    """→ how many bytes were read."""
    content = decode_content(row)
    stored = stored_bytes(row, content)
    place = spool.place(content)

    def read(size: int) -> bytes:
        nonlocal place
        # What is hashed is what is written: the server could change the spool in between.
        data = spool.read(place, size)
        place += size
        return data if data is not None else bytes(size)

    if spool.has(place, stored):
        with objects.create(stored) as file:
            key, _ = copy_content(read, row.size_bytes, stored, content.extents, file)
            if key == row.key:
                objects.publish(file, key)
    return stored
