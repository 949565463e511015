"""What of an image's content is on this node, in OBJECTS or the spool, and what must be fetched before a read can be answered.

Everything here may take long and is called in threads; nothing is fetched.  What is answered has just been found right: a *chunk* of an
object (`content.chunk_of`) as a whole, piece by piece if it is a long one.
"""

from __future__ import annotations

import hashlib
import os
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from operator import itemgetter
from typing import NamedTuple

from actors.image.layers.checkpoints import Spans
from actors.image.layers.content import CHUNK_BYTES, LayerContent, chunk_at, chunk_count, chunk_of, stored_bytes
from actors.image.lazy.spool import Spool
from actors.lazytree.objects import Objects
from actors.lazytree.table import Row

PIECES_MAX = 512  # long chunks of which the digests of their pieces are remembered: half a kilobyte each


class Missing(NamedTuple):
    """Why a read cannot be answered yet: its `chunk` of the object is not there, or is not right.

    `spans` are all that what is left of the read needs, from this chunk on, to the byte `end` of the layer; in those of `holes`,
    something of it is missing.
    """

    chunk: int
    spans: range
    holes: list[int]
    end: int


class Held:
    """`objects`: OBJECTS' descriptor.  `reference`: the image's.  Thread-safe."""

    def __init__(self, spans: Spans, spool: Spool, objects: int, reference: str) -> None:
        self._spans = spans
        self._spool = spool
        self._objects = objects
        self._reference = reference
        self._damaged: set[str] = set()  # objects, by their key
        self._pieces: dict[tuple[str, int], list[bytes]] = {}  # of a chunk that was right: the digest of each CHUNK_BYTES of it

    def name(self, row: Row) -> str:
        """An object, for a reason: by its image, and what `sha256sum` says of the file."""
        return f"{self._reference}, content {row.key[:12]}"

    def load(self, row: Row, content: LayerContent, offset: int, size: int) -> bytes | Missing:
        """The bytes, or what must be fetched first."""
        if (ready := self._from_objects(row, content, offset, size)) is not None:
            return ready
        if content.extents is None:
            return self._from_spool(row, content, offset, size)
        data = bytearray(size)
        for at, stored_at, length in parts(content.extents, offset, size):
            part = self._from_spool(row, content, stored_at, length)
            if isinstance(part, Missing):
                return part
            data[at : at + length] = part
        return bytes(data)

    def _from_objects(self, row: Row, content: LayerContent, offset: int, size: int) -> bytes | None:
        """The bytes, if OBJECTS have them and they are right; those of a sparse file are not looked at."""
        try:
            descriptor = os.open(Objects.path(row.key), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._objects)
        except FileNotFoundError:
            return None

        def read(place: int, length: int) -> bytes | None:
            data = os.pread(descriptor, length, place)
            return data if len(data) == length else None

        try:
            if content.extents is not None:
                return read(offset, size)
            found = []
            for number in range(chunk_at(content, offset), chunk_at(content, offset + size - 1) + 1):
                data = self._checked(row, content, number, offset, offset + size, read)
                if data is None:
                    self._say_damaged(row)
                    return None
                found.append(data)
                del data
            return found[0] if len(found) == 1 else b"".join(found)
        finally:
            os.close(descriptor)

    def _say_damaged(self, row: Row) -> None:
        if row.key not in self._damaged:
            self._damaged.add(row.key)
            print(f"{self.name(row)} is damaged in the object cache; it is fetched", file=sys.stderr, flush=True)

    def _from_spool(self, row: Row, content: LayerContent, begin: int, size: int) -> bytes | Missing:
        """`size` bytes from `begin` of what is stored of the object."""
        found, end = [], begin + size
        last = chunk_at(content, end - 1)
        for number in range(chunk_at(content, begin), last + 1):
            data = self._spooled(row, content, number, begin, end)
            if data is None:
                return self._missing(row, content, number, last)
            found.append(data)
            del data
        return found[0] if len(found) == 1 else b"".join(found)

    def _spooled(self, row: Row, content: LayerContent, number: int, begin: int, end: int) -> bytes | None:
        place = self._spool.place(content)
        return self._checked(row, content, number, begin, end, lambda at, size: self._spool.read(place + at, size))

    def _checked(
        self, row: Row, content: LayerContent, number: int, begin: int, end: int, read: Callable[[int, int], bytes | None]
    ) -> bytes | None:
        """What a chunk has of the bytes from `begin` to `end` of what is stored, if `read`, which is given place and size, has it right."""
        part = chunk_of(row, content, number)
        if part.size <= CHUNK_BYTES:
            data = read(part.begin, part.size)
            if data is None or hashlib.sha256(data).digest() != part.digest:
                return None
            return data[max(0, begin - part.begin) : max(0, end - part.begin)]
        known = self._pieces.get((row.key, number))
        whole, digests, kept = hashlib.sha256(), [], []
        for piece, at in enumerate(range(part.begin, part.end, CHUNK_BYTES)):
            stop = min(at + CHUNK_BYTES, part.end)
            is_wanted = begin < stop and at < end
            if known is not None and not is_wanted:
                continue
            data = read(at, stop - at)
            if data is None:
                return None
            if known is None:
                whole.update(data)
                digests.append(hashlib.sha256(data).digest())
            elif hashlib.sha256(data).digest() != known[piece]:
                return None
            if is_wanted:
                kept.append(data[max(0, begin - at) : end - at])
            del data
        if known is None:
            if whole.digest() != part.digest:
                return None
            if len(self._pieces) >= PIECES_MAX:
                self._pieces.clear()
            self._pieces[row.key, number] = digests
        return b"".join(kept)

    def _missing(self, row: Row, content: LayerContent, chunk: int, last_chunk: int) -> Missing:
        layer, place = content.layer, self._spool.place(content)
        begin = content.offset + chunk_of(row, content, chunk).begin
        end = content.offset + chunk_of(row, content, last_chunk).end
        spans = range(self._spans.at(layer, begin), self._spans.at(layer, end - 1) + 1)
        holes = []
        for number in spans:
            first, stop = self._spans.bounds(layer, number)
            first, stop = max(first, begin), min(stop, end)
            if not self._spool.has(place + first - content.offset, stop - first):
                holes.append(number)
        return Missing(chunk, spans, holes, end)

    def lacks(self, row: Row, content: LayerContent, begin: int, end: int) -> bool:
        """Whether something of the object, between these places of its layer, is neither in OBJECTS nor in the spool."""
        if self.has(row):
            return False
        first, stop = max(begin, content.offset), min(end, content.offset + stored_bytes(row, content))
        return not self._spool.has(self._spool.place(content) + first - content.offset, stop - first)

    def has(self, row: Row) -> bool:
        """Whether OBJECTS have it, right or not, but not found damaged."""
        if row.key in self._damaged:
            return False
        try:
            return os.stat(Objects.path(row.key), dir_fd=self._objects, follow_symlinks=False).st_size == row.size_bytes
        except FileNotFoundError:
            return False

    def is_whole(self, row: Row, content: LayerContent) -> bool:
        """Whether all of the object seems to be in the spool; who publishes it looks closer."""
        if not self._spool.has(self._spool.place(content), stored_bytes(row, content)):
            return False
        # A page in which one span ends and the next begins is no hole when one of them is there.  Within the object a page
        # of the other one follows, but not at its ends.
        return all(self._spooled(row, content, chunk, 0, 0) is not None for chunk in {0, chunk_count(row, content) - 1})


def parts(extents: Sequence[tuple[int, int]], offset: int, size: int) -> Iterator[tuple[int, int, int]]:
    """What is stored of `size` bytes at `offset` of a sparse file: (offset in these bytes, in what is stored, length)."""
    stored = [0, *accumulate(length for _, length in extents)]
    for number in range(max(0, bisect_right(extents, offset, key=itemgetter(0)) - 1), len(extents)):
        begin, length = extents[number]
        if begin >= offset + size:
            return
        first, stop = max(begin, offset), min(begin + length, offset + size)
        if first < stop:
            yield first - offset, stored[number] + first - begin, stop - first
