"""Where in an image's layers one may start to read: the checkpoints of each, and which objects lie where.  A section of the archive.

    head          number of layers, number of objects
    layers        of each: compressed and decompressed size, its checkpoints, its objects
    checkpoints   of each: bit of the compressed layer, byte of the decompressed one, place and length of its window
    order         the objects (indexes into the object table) by layer and offset
    windows       each compressed (zlib), behind the header of the block in whose middle its checkpoint stands, if any

Numbers are little-endian.  A layer without checkpoints is not compressed: it is read as it is, in *spans* of SPAN_BYTES.  Otherwise a span
reaches from one checkpoint to the next.  Spans are what is fetched; a server maps the section and reads of it what it needs.

Of a layer whose table of contents is known a checkpoint has no window but, in its place, the span's `frames`: at each one decompression
begins anew.
"""

from __future__ import annotations

import os
import struct
import tempfile
import zlib
from array import array
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

import msgspec
from zlib_ng import zlib_ng

from actors.image.layers.content import LayerContent, decode_content, stored_bytes
from actors.image.layers.inflate import BLOCK_BYTES, SPAN_BYTES, Checkpoint
from actors.image.layers.stream import decompress_from
from actors.lazytree.table import ObjectTable, Row, map_section

_HEAD = struct.Struct("<II")
_LAYER = struct.Struct("<QQIIII")  # compressed, decompressed bytes; first checkpoint, how many; first in order, how many
# Bits, offset; place and length of what is in the windows' part; how much of that, inflated, is header, and the header's bit.
_CHECKPOINT = struct.Struct("<QQQIHBB")
_WINDOW, _FRAMES = 0, 1  # what is in that place, the record's last byte
_FRAME = struct.Struct("<QQ")
_INDEX = struct.Struct("<I")
BLOCK_BYTES_MIN = 4096
_WINDOW_LEVEL = 3  # 2.4 KB a window of Debian's libraries; level 6 saves 5 % of them


class CorruptSpans(Exception):
    """The section is not what it should be; the text says why."""


class Span(NamedTuple):
    """A piece of a layer that can be read by itself: `begin` to `end` of its decompressed bytes.

    They come out of the compressed bytes from `first` to `stop`, by inflating from `checkpoint` on; as they are when it is None.  With
    `frames`, (compressed, decompressed) places, they come out of one after another of these, each by itself (`decompressed`).
    """

    begin: int
    end: int
    first: int
    stop: int
    checkpoint: Checkpoint | None
    frames: tuple[tuple[int, int], ...] = ()


class _Record(NamedTuple):
    """A checkpoint, as it is in the section."""

    bits: int
    offset: int
    place: int
    length: int
    header_bytes: int
    header_bit: int
    kind: int


class Layer(NamedTuple):
    """What the section says of one layer; without checkpoints it is not compressed."""

    compressed_bytes: int
    size_bytes: int
    first_checkpoint: int
    checkpoints: int
    first_object: int
    objects: int


class Checkpoints:
    """The checkpoints of an image's layers while they are read, from the lowest layer up; windows wait in a file in `directory`."""

    def __init__(self, directory: str) -> None:
        self._windows: BinaryIO = tempfile.TemporaryFile(dir=directory)
        self._layers: list[tuple[int, int, int, int]] = []
        self._records: list[bytes] = []
        self._first = 0
        self._place = 0
        self.has_frames = False

    def add(self, checkpoint: Checkpoint) -> None:
        """The next checkpoint of the layer that is being read."""
        header = checkpoint.header
        window = zlib_ng.compress(header + checkpoint.window, _WINDOW_LEVEL) if checkpoint.window else b""
        self._add(checkpoint.bits, checkpoint.offset, window, len(header), checkpoint.header_bit, _WINDOW)

    def add_frames(self, frames: Sequence[tuple[int, int]]) -> None:
        """The next span of a layer whose table of contents is known: where its frames begin, compressed and decompressed."""
        first, begin = frames[0]
        packed = zlib_ng.compress(b"".join(_FRAME.pack(*frame) for frame in frames), _WINDOW_LEVEL)
        self._add(8 * first, begin, packed, 0, 0, _FRAMES)
        self.has_frames = True

    def _add(self, bits: int, offset: int, window: bytes, header_bytes: int, header_bit: int, kind: int) -> None:
        self._windows.write(window)
        self._records.append(_CHECKPOINT.pack(bits, offset, self._place, len(window), header_bytes, header_bit, kind))
        self._place += len(window)

    def end_layer(self, compressed_bytes: int, size_bytes: int) -> None:
        """The layer has been read, and no checkpoint was added if it is not compressed."""
        self._layers.append((compressed_bytes, size_bytes, self._first, len(self._records) - self._first))
        self._first = len(self._records)

    def write(self, file: BinaryIO, rows: Sequence[Row]) -> int:
        """Write the section; returns its size in bytes.  `rows` are those of the object table, sorted as they are there."""
        placed = sorted((content.layer, content.offset, index) for index, content in enumerate(map(decode_content, rows)))
        order = array("I", (index for _, _, index in placed))
        counts = [0] * len(self._layers)
        for layer, _, _ in placed:
            counts[layer] += 1
        head = [_HEAD.pack(len(self._layers), len(order))]
        first = 0
        for sizes, count in zip(self._layers, counts, strict=True):
            head.append(_LAYER.pack(*sizes, first, count))
            first += count
        body = b"".join([*head, *self._records, *map(_INDEX.pack, order)])
        file.write(body)
        self._windows.seek(0)
        while piece := self._windows.read(1 << 20):
            file.write(piece)
        return len(body) + self._place

    def close(self) -> None:
        self._windows.close()


class Spans:
    """The section in the file at `path`, mapped.  Raises CorruptSpans, OSError; so does every method."""

    def __init__(self, path: str, section: tuple[int, int], table: ObjectTable) -> None:
        """`table`: of the same archive; it is used and stays the caller's."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._map = map_section(descriptor, *section)
        finally:
            os.close(descriptor)
        self._path = path
        self._table = table
        try:
            layers, objects = _HEAD.unpack_from(self._map)
            self.layers = [Layer(*_LAYER.unpack_from(self._map, _HEAD.size + _LAYER.size * number)) for number in range(layers)]
        except struct.error:
            raise CorruptSpans(f"{path}: too short for what it says of its layers") from None
        self._checkpoints = _HEAD.size + _LAYER.size * layers
        self._order = self._checkpoints + _CHECKPOINT.size * sum(layer.checkpoints for layer in self.layers)
        self._windows = self._order + _INDEX.size * objects
        if self._windows > len(self._map) or objects != len(table):
            raise CorruptSpans(f"{path}: too short for what it says of its checkpoints, or of another image")

    def count(self, layer: int) -> int:
        """How many spans the layer has."""
        found = self.layers[layer]
        return found.checkpoints or -(-found.size_bytes // SPAN_BYTES)

    @property
    def longest_bytes(self) -> int:
        """Of all spans, decompressed; it takes some time to find."""
        lengths = (self.bounds(layer, number) for layer in range(len(self.layers)) for number in range(self.count(layer)))
        return max((end - begin for begin, end in lengths), default=0)

    def at(self, layer: int, offset: int) -> int:
        """The number of the span in which that byte of the decompressed layer is."""
        found = self.layers[layer]
        if not found.checkpoints:
            return offset // SPAN_BYTES
        low, high = 0, found.checkpoints
        while high - low > 1:
            middle = (low + high) // 2
            if self._record(found, middle).offset <= offset:
                low = middle
            else:
                high = middle
        return low

    def bounds(self, layer: int, number: int) -> tuple[int, int]:
        """Where the span begins and ends in the decompressed layer."""
        found = self.layers[layer]
        if not found.checkpoints:
            return number * SPAN_BYTES, min((number + 1) * SPAN_BYTES, found.size_bytes)
        following = number + 1
        return (
            self._record(found, number).offset,
            self._record(found, following).offset if following < found.checkpoints else found.size_bytes,
        )

    def run(self, layer: int, first: int, last: int) -> Span:
        """The spans from `first` to `last`, which is one of them, as one."""
        found = self.layers[layer]
        begin, end = self.bounds(layer, first)[0], self.bounds(layer, last)[1]
        if not found.checkpoints:
            return Span(begin, end, begin, end, None)
        record = self._record(found, first)
        stop = found.compressed_bytes
        if last + 1 < found.checkpoints:
            stop = (self._record(found, last + 1).bits + 7) // 8
        both = self._window(record)
        if record.kind == _FRAMES:
            both += b"".join(self._window(self._record(found, number)) for number in range(first + 1, last + 1))
            here = Checkpoint(record.bits, record.offset, b"")
            return Span(begin, end, record.bits // 8, stop, here, tuple(_FRAME.iter_unpack(both)))
        header = record.header_bytes
        here = Checkpoint(record.bits, record.offset, both[header:], both[:header], record.header_bit)
        return Span(begin, end, record.bits // 8, stop, here)

    def _window(self, record: _Record) -> bytes:
        """What is in the windows' part for a checkpoint.  Raises CorruptSpans."""
        compressed = self._map[self._windows + record.place : self._windows + record.place + record.length]
        try:
            return zlib.decompress(compressed) if record.length else b""
        except zlib.error as error:
            raise CorruptSpans(f"{self._path}: a window is damaged: {error}") from None

    def objects(self, layer: int, begin: int, end: int) -> Iterator[tuple[int, Row, LayerContent]]:
        """The objects of which a byte lies between `begin` and `end` of the decompressed layer, by their offset; index, row, place."""
        found = self.layers[layer]
        low, high = found.first_object, found.first_object + found.objects
        stop = high
        while low < high:  # the first that ends behind `begin`: objects do not overlap
            middle = (low + high) // 2
            _, row, content = self._object(middle)
            if content.offset + stored_bytes(row, content) > begin:
                high = middle
            else:
                low = middle + 1
        for position in range(low, stop):
            index, row, content = self._object(position)
            if content.offset >= end:
                return
            yield index, row, content

    def _record(self, layer: Layer, number: int) -> _Record:
        place = self._checkpoints + _CHECKPOINT.size * (layer.first_checkpoint + number)
        return _Record(*_CHECKPOINT.unpack_from(self._map, place))

    def _object(self, position: int) -> tuple[int, Row, LayerContent]:
        index: int = _INDEX.unpack_from(self._map, self._order + _INDEX.size * position)[0]
        row = self._table.row(index)
        try:
            return index, row, decode_content(row)
        except msgspec.MsgspecError as error:
            raise CorruptSpans(f"{self._path}: where object {index} lies is not understood: {error}") from None

    def close(self) -> None:
        self._map.release()


def decompressed(span: Span, pieces: Iterator[bytes], block_bytes: int = BLOCK_BYTES) -> Iterator[bytes]:
    """What stands in a span from its `begin` on, in blocks, out of its compressed bytes from its `first` on.

    NOT verified: it may be too short, and something else.  Raises ContentCorrupt for what is no such thing.
    """
    if span.checkpoint is None:
        return pieces
    if not span.frames:
        return decompress_from(span.checkpoint, pieces, block_bytes)
    return _from_frames(span, pieces, block_bytes)


def _from_frames(span: Span, pieces: Iterator[bytes], block_bytes: int) -> Iterator[bytes]:
    """Of each frame as much as has a place, and zeros where nothing comes: that is nobody's, or will not have its digest."""
    cut = _Cut(pieces, span.first)
    for frame, following in zip(span.frames, [*span.frames[1:], (span.stop, span.end)], strict=True):
        left = following[1] - frame[1]
        cut.skip_to(frame[0])
        blocks = decompress_from(
            Checkpoint(8 * frame[0], frame[1], b""), cut.until(following[0]), min(block_bytes, max(left, BLOCK_BYTES_MIN))
        )
        for block in blocks:
            yield block[:left]
            left -= len(block)
            if left <= 0:
                break
        while left > 0:
            yield bytes(min(left, block_bytes))
            left -= block_bytes


class _Cut:
    """Pieces of which the first byte is byte `at` of a layer, cut where somebody else is to go on."""

    def __init__(self, pieces: Iterator[bytes], at: int) -> None:
        self._pieces = pieces
        self._at = at  # of the first byte of what is left of the last piece
        self._rest = b""

    def until(self, stop: int) -> Iterator[bytes]:
        while self._at < stop and (self._rest or self._next()):
            part, self._rest = self._rest[: stop - self._at], self._rest[stop - self._at :]
            self._at += len(part)
            yield part

    def skip_to(self, place: int) -> None:
        for _ in self.until(place):
            pass

    def _next(self) -> bool:
        self._rest = next(self._pieces, b"")
        return bool(self._rest)
