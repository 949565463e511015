"""The objects of one tree, as a file that a LAZY server maps: looked up by key or index without being read into memory.

    header    magic, version, number of rows, size of the file
    rows      sorted by key: 32-byte key, size of the object, place and length of its source in the heap
    heap      sources: msgpack that only the tree's Source understands

Numbers are little-endian.  The index of a row is what LAZY's node ids are made of, so a new server, which maps the same file, knows
every node id that the kernel remembers of the old one.  A hundred thousand rows cost a server no private memory.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable
from operator import attrgetter
from typing import BinaryIO, NamedTuple

_HEADER = struct.Struct("<8sIIQ")
_ROW = struct.Struct("<32sQQI4x")
_MAGIC = b"AERIEOBJ"
_VERSION = 1


class CorruptTable(Exception):
    """The file is not an object table, or not a whole one; the text says why."""


class Row(NamedTuple):
    """One object: `key` is 64 hex digits, `source` msgpack for the tree's Source."""

    key: str
    size_bytes: int
    source: bytes


def write_table(file: BinaryIO, rows: Iterable[Row]) -> int:
    """Write a table of the rows, in any order; returns its size in bytes.  Raises ValueError for a key that comes twice."""
    ordered = sorted(rows, key=attrgetter("key"))
    place = _HEADER.size + _ROW.size * len(ordered)
    records, last = [], b""
    for row in ordered:
        key = bytes.fromhex(row.key)
        if len(key) != 32 or key == last:
            raise ValueError(f"object {row.key!r} comes twice, or is no key")
        records.append(_ROW.pack(key, row.size_bytes, place, len(row.source)))
        place, last = place + len(row.source), key
    file.write(_HEADER.pack(_MAGIC, _VERSION, len(ordered), place) + b"".join(records))
    file.writelines(row.source for row in ordered)
    return place


def map_section(descriptor: int, offset: int, length: int) -> memoryview:
    """A part of a file, mapped until the last view of it is released.  Raises OSError, ValueError (beyond its end)."""
    begin = offset - offset % mmap.ALLOCATIONGRANULARITY
    return memoryview(mmap.mmap(descriptor, offset - begin + length, prot=mmap.PROT_READ, offset=begin))[offset - begin :]


class ObjectTable:
    """A table in the file at `path`, which is mapped and not kept open.  Raises CorruptTable, OSError.

    `section`: offset and length of the table, for a file with something else in it.
    """

    def __init__(self, path: str, section: tuple[int, int] | None = None) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            offset, size_bytes = section or (0, os.fstat(descriptor).st_size)
            if size_bytes < _HEADER.size:
                raise CorruptTable(f"{path}: {size_bytes} bytes are too few for an object table")
            self._map = map_section(descriptor, offset, size_bytes)
        finally:
            os.close(descriptor)
        self._path = path
        self._count: int
        magic, version, self._count, recorded_bytes = _HEADER.unpack_from(self._map)
        if magic != _MAGIC or version != _VERSION:
            raise CorruptTable(f"{path}: not an object table of version {_VERSION}")
        if recorded_bytes != size_bytes or _HEADER.size + _ROW.size * self._count > size_bytes:
            raise CorruptTable(f"{path}: {size_bytes} bytes of a table of {self._count} rows and {recorded_bytes} bytes")

    def __len__(self) -> int:
        return self._count

    def row(self, index: int) -> Row:
        """The row at `index`.  Raises IndexError, CorruptTable."""
        if not 0 <= index < self._count:
            raise IndexError(f"row {index} of {self._count}")
        key, size_bytes, place, length = _ROW.unpack_from(self._map, _HEADER.size + _ROW.size * index)
        if place + length > len(self._map):
            raise CorruptTable(f"{self._path}: the source of row {index} lies outside of the file")
        return Row(key.hex(), size_bytes, bytes(self._map[place : place + length]))

    def keys(self) -> bytes:
        """The keys of all rows, 32 bytes each, sorted."""
        rows = self._map[_HEADER.size : _HEADER.size + _ROW.size * self._count]
        return b"".join(key for key, *_ in _ROW.iter_unpack(rows))

    def find(self, key: str) -> int | None:
        """The index of the object with that key, None when there is none (or `key` is not 64 lower-case hex digits)."""
        try:
            wanted = bytes.fromhex(key)
        except ValueError:
            return None
        low, high = 0, self._count
        while low < high:
            middle = (low + high) // 2
            place = _HEADER.size + _ROW.size * middle
            found = bytes(self._map[place : place + 32])
            if found == wanted:
                return middle if key == wanted.hex() else None  # one spelling: fromhex() takes "AB" and spaces too
            if found < wanted:
                low = middle + 1
            else:
                high = middle
        return None

    def close(self) -> None:
        self._map.release()
