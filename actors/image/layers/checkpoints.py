"""Where in an image's layers one may start to read: the checkpoints of each, and which objects lie where.  A section of the archive.

    head          number of layers, number of objects
    layers        of each: compressed and decompressed size, its checkpoints, its objects
    checkpoints   of each: bit of the compressed layer, byte of the decompressed one, place and length of its window
    order         the objects (indexes into the object table) by layer and offset
    windows       each compressed (zlib), behind the header of the block in whose middle its checkpoint stands, if any

Numbers are little-endian.  A layer without checkpoints is not compressed: it is read as it is, in *spans* of SPAN_BYTES.  Otherwise a span
reaches from one checkpoint to the next.  Spans are what is fetched; a server maps the section and reads of it what it needs.
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
from actors.image.layers.inflate import SPAN_BYTES, Checkpoint
from actors.lazytree.table import ObjectTable, Row, map_section

_HEAD = struct.Struct("<II")
_LAYER = struct.Struct("<QQIIII")  # compressed, decompressed bytes; first checkpoint, how many; first in order, how many
# Bits, offset; place and length of what is in the windows' part; how much of that, inflated, is header, and the header's bit.
_CHECKPOINT = struct.Struct("<QQQIHBx")
_INDEX = struct.Struct("<I")
_WINDOW_LEVEL = 3  # 2.4 KB a window of Debian's libraries; level 6 saves 5 % of them


class CorruptSpans(Exception):
    """The section is not what it should be; the text says why."""


class Span(NamedTuple):
    """A piece of a layer that can be read by itself: `begin` to `end` of its decompressed bytes.

    They come out of the compressed bytes from `first` to `stop`, by inflating from `checkpoint` on; as they are when it is None.
    """

    begin: int
    end: int
    first: int
    stop: int
    checkpoint: Checkpoint | None


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

    def add(self, checkpoint: Checkpoint) -> None:
        """The next checkpoint of the layer that is being read."""
        header = checkpoint.header
        window = zlib_ng.compress(header + checkpoint.window, _WINDOW_LEVEL) if checkpoint.window else b""
        self._windows.write(window)
        place = (self._place, len(window), len(header), checkpoint.header_bit)
        self._records.append(_CHECKPOINT.pack(checkpoint.bits, checkpoint.offset, *place))
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

    def at(self, layer: int, offset: int) -> int:
        """The number of the span in which that byte of the decompressed layer is."""
        found = self.layers[layer]
        if not found.checkpoints:
            return offset // SPAN_BYTES
        low, high = 0, found.checkpoints
        while high - low > 1:
            middle = (low + high) // 2
            if self._record(found, middle)[1] <= offset:
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
            self._record(found, number)[1],
            self._record(found, following)[1] if following < found.checkpoints else found.size_bytes,
        )

    def run(self, layer: int, first: int, last: int) -> Span:
        """The spans from `first` to `last`, which is one of them, as one."""
        found = self.layers[layer]
        begin, end = self.bounds(layer, first)[0], self.bounds(layer, last)[1]
        if not found.checkpoints:
            return Span(begin, end, begin, end, None)
        bits, offset, place, length, header, header_bit = self._record(found, first)
        stop = found.compressed_bytes
        if last + 1 < found.checkpoints:
            stop = (self._record(found, last + 1)[0] + 7) // 8
        compressed = self._map[self._windows + place : self._windows + place + length]
        try:
            both = zlib.decompress(compressed) if length else b""
        except zlib.error as error:
            raise CorruptSpans(f"{self._path}: a window is damaged: {error}") from None
        return Span(begin, end, bits // 8, stop, Checkpoint(bits, offset, both[header:], both[:header], header_bit))

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

    def _record(self, layer: Layer, number: int) -> tuple[int, int, int, int, int, int]:
        place = self._checkpoints + _CHECKPOINT.size * (layer.first_checkpoint + number)
        record: tuple[int, int, int, int, int, int] = _CHECKPOINT.unpack_from(self._map, place)
        return record

    def _object(self, position: int) -> tuple[int, Row, LayerContent]:
        index: int = _INDEX.unpack_from(self._map, self._order + _INDEX.size * position)[0]
        row = self._table.row(index)
        try:
            return index, row, decode_content(row)
        except msgspec.MsgspecError as error:
            raise CorruptSpans(f"{self._path}: where object {index} lies is not understood: {error}") from None

    def close(self) -> None:
        self._map.release()
