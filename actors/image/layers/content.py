"""The content of a layer's files: hashed, cut into chunks, and put into OBJECTS, as it goes by.

An object's key is the sha256 of its content.  A sparse file's is the sha256 of its map and data: its holes may be
terabytes, which nobody should have to hash.  A row's source (`LayerContent`) says where in the image's layers the
content is and what each chunk of it must hash to, so that a lazy loader can fetch and check a part of it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import struct
import time
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, cast

import msgspec

from actors.lazytree.ledger import is_short
from actors.lazytree.objects import Objects
from actors.lazytree.table import Row

if TYPE_CHECKING:  # what unpacks layers; of who only reads content it is no part
    from actors.image.layers.stream import LayerStream
    from actors.image.layers.tar import Entry

CHUNK_BYTES = 256 << 10
CHUNK_BYTES_MAX = 4 << 20  # of those that a table of contents cuts: what eStargz' tools make of a larger file
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
PATIENCE_S, PATIENCE_STEP_S = 2.0, 0.05  # one build waits for no longer, in all, until there is room again
_SPARSE = b"aerie sparse object 1\0"
_EXTENT = struct.Struct("<QQ")


class LayerContent(msgspec.Struct, frozen=True, array_like=True):
    """Where an object's content is: the `source` of an image's rows, as msgpack.

    It is `offset` bytes into the decompressed layer number `layer` (0 is the lowest).  `chunks` are the 32-byte sha256
    digests of each CHUNK_BYTES of it, the last one shorter; empty when there is one chunk and its digest is the
    object's key.  `extents` of a sparse file are (offset in the object, length), ascending: their bytes follow one
    another in the layer, and it is these that chunks count; the rest of the object is holes.

    `ends` is there when a layer's table of contents has cut the chunks, of up to CHUNK_BYTES_MAX: where each ends, as 64-bit numbers of
    this machine's (little-endian).  The table's layer is decompressed from its `frames`, which also says what `offset` means then.
    """

    layer: int
    offset: int
    chunks: bytes = b""
    extents: list[tuple[int, int]] | None = None
    ends: bytes = b""


class Part(NamedTuple):
    """A chunk: a part of what is stored of an object, from `begin`, which is checked as a whole against its sha256 `digest`."""

    begin: int
    size: int
    digest: bytes

    @property
    def end(self) -> int:
        return self.begin + self.size


_decoder = msgspec.msgpack.Decoder(LayerContent)


def decode_content(row: Row) -> LayerContent:
    """Where the content of an image's object is.  Raises msgspec.MsgspecError."""
    return _decoder.decode(row.source)


def stored_bytes(row: Row, content: LayerContent) -> int:
    """How many bytes of the layer are the object's content: its size without its holes."""
    return row.size_bytes if content.extents is None else sum(length for _, length in content.extents)


def chunk_of(row: Row, content: LayerContent, number: int) -> Part:
    """A chunk of what is stored of an object.  Raises IndexError when it has none of that number."""
    if not 0 <= number < chunk_count(row, content):
        raise IndexError(f"chunk {number} of object {row.key}")
    if content.ends:
        ends = memoryview(content.ends).cast("Q")
        begin = ends[number - 1] if number else 0
        size = ends[number] - begin
    else:
        begin = number * CHUNK_BYTES
        size = min(CHUNK_BYTES, stored_bytes(row, content) - begin)
    return Part(begin, size, content.chunks[32 * number : 32 * number + 32] or bytes.fromhex(row.key))


def chunk_at(content: LayerContent, offset: int) -> int:
    """The number of the chunk in which that byte of what is stored of an object is."""
    return bisect_right(memoryview(content.ends).cast("Q"), offset) if content.ends else offset // CHUNK_BYTES


def chunk_count(row: Row, content: LayerContent) -> int:
    return len(content.ends) // 8 if content.ends else -(-stored_bytes(row, content) // CHUNK_BYTES)


class Contents:
    """The objects of one image, in OBJECTS before or not: each one's row, and the holes of sparse ones, by key."""

    def __init__(self, objects: Objects) -> None:
        self.rows: dict[str, Row] = {}
        self.hole_bytes: dict[str, int] = {}
        self.complete = True  # all of it could be kept
        self._patience_s = PATIENCE_S
        self._objects = objects
        self._encoder = msgspec.msgpack.Encoder()

    def take(self, stream: LayerStream, entry: Entry, layer: int) -> str | None:
        """Read the entry's data off the stream into an object and return its key, None for an empty file.

        Where there is no room for it, nothing is kept (`complete` is False from then on): it can be fetched.  Raises OSError, and
        what the stream raises.
        """
        if not entry.size:
            return None
        if entry.extents is None and entry.stored <= CHUNK_BYTES:
            data = stream.read_exactly(entry.stored)
            key = hashlib.sha256(data).hexdigest()
            if not self._objects.has(key):
                with self._file(entry.stored) as file:
                    file.write(data)
                    self._publish(file, key)
            chunks = b""
        else:
            with self._file(entry.stored) as file:
                key, chunks = copy_content(stream.read_exactly, entry.size, entry.stored, entry.extents, file)
                self._publish(file, key)
        if key not in self.rows:
            source = self._encoder.encode(LayerContent(layer, entry.offset, chunks, entry.extents))
            self.rows[key] = Row(key, entry.size, source)
            if entry.stored < entry.size:
                self.hole_bytes[key] = entry.size - entry.stored
        return key

    def note(self, key: str, size: int, layer: int, offset: int, chunks: Iterable[tuple[int, bytes]]) -> None:
        """An object of which nothing is read now: its place in its layer, size and digest of each chunk.

        Unless OBJECTS have it, not all of it is here (`complete`).
        """
        self.complete = self.complete and self._objects.has(key)
        if key in self.rows:
            return
        sizes, digests = zip(*chunks, strict=True)
        parts = (b"", b"")  # what is the only one has the object's digest, and its size
        if len(sizes) > 1 or size > CHUNK_BYTES:
            parts = b"".join(digests), array("Q", accumulate(sizes)).tobytes()
        self.rows[key] = Row(key, size, self._encoder.encode(LayerContent(layer, offset, parts[0], None, parts[1])))

    def _file(self, size_bytes: int) -> BinaryIO:
        """A file for an object, or what takes its content and keeps none of it."""
        while True:
            try:
                return cast(BinaryIO, _UntilFull(self._objects.create(size_bytes)))
            except OSError as error:
                if error.errno not in NO_SPACE:
                    raise
                self.complete = False
                if self._patience_s <= 0 or is_short(self._objects.descriptor):
                    return cast(BinaryIO, _UntilFull(None))
                time.sleep(PATIENCE_STEP_S)  # room is being made
                self._patience_s -= PATIENCE_STEP_S

    def _publish(self, file: BinaryIO, key: str) -> None:
        kept = cast(_UntilFull, file).file
        if kept is None or not _published(self._objects, kept, key):
            self.complete = False


class _UntilFull:
    """A file on a disk that may be full: what cannot be written is lost, and with it the file."""

    def __init__(self, file: BinaryIO | None) -> None:
        self.file = file

    def __enter__(self) -> _UntilFull:
        return self

    def __exit__(self, *failure: object) -> None:
        self._close()

    def write(self, data: bytes | memoryview) -> None:
        self._try(lambda file: file.write(data))

    def seek(self, offset: int) -> None:
        self._try(lambda file: file.seek(offset))

    def truncate(self, size: int) -> None:
        self._try(lambda file: file.truncate(size))

    def _try(self, do: Callable[[BinaryIO], object]) -> None:
        if self.file is not None:
            try:
                do(self.file)
            except OSError as error:
                if error.errno not in NO_SPACE:
                    raise
                self._close()

    def _close(self) -> None:
        file, self.file = self.file, None
        if file is not None:
            with contextlib.suppress(OSError):  # what it still had to write finds no room either
                file.close()


def _published(objects: Objects, file: BinaryIO, key: str) -> bool:
    """Publish a file → False when the disk is too full for the rest of it, or its name."""
    try:
        objects.publish(file, key)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        return False
    return True


def copy_content(
    read: Callable[[int], bytes], size: int, stored: int, extents: list[tuple[int, int]] | None, file: BinaryIO
) -> tuple[str, bytes]:
    """Copy an object of `size` bytes, `stored` of them to be read, into the file, holes left out.

    Returns its key and the digests of its chunks.  `read` gives the next so many bytes.
    """
    whole = hashlib.sha256()
    if extents is not None:
        whole.update(_SPARSE + struct.pack("<Q", size) + b"".join(_EXTENT.pack(*extent) for extent in extents))
        file.truncate(size)
    digests = []
    ahead = list(reversed(extents or ()))
    left = stored
    while left:
        chunk = read(min(left, CHUNK_BYTES))
        left -= len(chunk)
        whole.update(chunk)
        digests.append(hashlib.sha256(chunk).digest())
        if extents is None:
            file.write(chunk)
        else:
            _scatter(chunk, ahead, file)
    return whole.hexdigest(), b"".join(digests)


def _scatter(chunk: bytes, ahead: list[tuple[int, int]], file: BinaryIO) -> None:
    """Write the next bytes of a sparse file's data where its extents, the next one last in `ahead`, say."""
    rest = memoryview(chunk)
    while rest:
        offset, length = ahead.pop()
        part = rest[:length]
        file.seek(offset)
        file.write(part)
        rest = rest[length:]
        if len(part) < length:
            ahead.append((offset + len(part), length - len(part)))
