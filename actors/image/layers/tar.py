"""The entries of a tar, as they come by in a `stream.LayerStream`.

Why not `tarfile`: it holds extended headers of any size in memory, takes a damaged header in the middle for the end, turns
times into floats and bytes into text, and is several times slower.

Formats: POSIX.1-2008 ustar and pax, GNU tar's (long names, base-256 numbers, sparse files old, 0.0, 0.1 and 1.0),
star's prefix, v7.  Extended attributes: SCHILY.xattr.* (raw) and LIBARCHIVE.xattr.* (name URL-encoded, value base64).
Global pax headers are passed over, as containerd and Docker do, with which images are made and tested.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
import struct
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass

from actors.image.errors import ContentCorrupt, Unsupported
from actors.image.layers.stream import Budget, LayerStream

RECORD_BYTES = 512
EXTENDED_BYTES_MAX = 1 << 20  # of one extended header; Go's archive/tar has the same bound
EXTENTS_MAX = 1 << 18  # of one sparse file
SIZE_MAX = (1 << 63) - 1  # of a file, as for the kernel

_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s64x8s8s155s12x")
_ZEROS = bytes(RECORD_BYTES)
_TYPES = {
    b"0": stat.S_IFREG,
    b"\0": stat.S_IFREG,
    b"7": stat.S_IFREG,
    b"S": stat.S_IFREG,
    b"1": 0,
    b"2": stat.S_IFLNK,
    b"3": stat.S_IFCHR,
    b"4": stat.S_IFBLK,
    b"5": stat.S_IFDIR,
    b"D": stat.S_IFDIR,  # GNU's incremental dumps: a directory with a list of names as its data
    b"6": stat.S_IFIFO,
}
_WITH_DATA = frozenset((b"0", b"\0", b"7", b"S", b"D", b"V", b"L", b"K", b"x", b"X", b"g"))
_DECIMAL = re.compile(rb"(-?)(\d{1,18})(?:\.(\d*))?")
_RECORD_LENGTH = re.compile(rb"(\d{1,7}) ")


@dataclass(slots=True)
class Entry:
    """What one entry says.  Names are the bytes that stand there: not normalised, not safe."""

    name: bytes
    mode: int  # with the type bits, which are 0 for a hard link
    uid: int
    gid: int
    mtime_ns: int
    size: int  # of a regular file, holes included
    target: bytes  # of a symbolic or hard link
    rdev: int
    xattrs: dict[bytes, bytes]
    offset: int  # where its data begins in the decompressed layer
    stored: int  # bytes of that data
    extents: list[tuple[int, int]] | None  # a sparse file's data: (offset in the file, length), ascending, `stored` in sum

    @property
    def is_hard_link(self) -> bool:
        return not stat.S_IFMT(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)


@dataclass(slots=True)
class _Header:
    """One header record; the numbers that only some types have are still in `record`."""

    type: bytes
    name: bytes
    target: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    record: bytes


def entries(stream: LayerStream, budget: Budget) -> Iterator[Entry]:
    """Each entry, the stream standing at its data, of which the taker may read as much as it wants.

    Ends at the end-of-archive mark or the end of the stream.  Raises ContentCorrupt, Unsupported, OverBounds.
    """
    records: list[tuple[bytes, bytes]] = []
    while (header := _next_header(stream)) is not None:
        begin, size = stream.offset, header.size
        if header.type in (b"x", b"X"):
            records += _pax_records(_extended(stream, size, budget))
        elif header.type in (b"L", b"K"):
            name = _extended(stream, size, budget).partition(b"\0")[0]
            records.append((b"path" if header.type == b"L" else b"linkpath", name))
        elif header.type not in (b"g", b"V"):
            budget.take_entry()
            entry = _entry(header, records, stream, budget)
            yield entry
            records = []
            begin, size = entry.offset, entry.stored
        stream.skip(begin + size - stream.offset)
        stream.read(-size % RECORD_BYTES)  # which umoci's last entry does not have


def _next_header(stream: LayerStream) -> _Header | None:
    record = stream.read(RECORD_BYTES)
    if record == _ZEROS:
        if stream.read(RECORD_BYTES).strip(b"\0"):
            raise ContentCorrupt(f"a layer's tar goes on behind its end, at byte {stream.offset}")
        return None
    if not record:
        return None
    if len(record) < RECORD_BYTES:
        raise ContentCorrupt(f"a layer's tar ends in the middle, at byte {stream.offset}")
    name, mode, uid, gid, size, mtime, checksum, kind, target, magic, _, _, prefix = _HEADER.unpack(record)
    unsigned = sum(record) - sum(checksum) + 8 * ord(" ")
    if _number(checksum) != unsigned:
        signed = unsigned - 256 * sum(byte > 127 for byte in record[:148] + record[156:])  # as some ancient tars do
        if _number(checksum) != signed:
            raise ContentCorrupt(f"a layer's tar has a damaged header at byte {stream.offset - RECORD_BYTES}")
    name = name.partition(b"\0")[0]
    if magic.startswith(b"ustar\0"):
        prefix = (prefix[:131] if record.endswith(b"tar\0") else prefix).partition(b"\0")[0]
        name = prefix + b"/" + name if prefix else name
    found = _Header(
        type=kind,
        name=name,
        target=target.partition(b"\0")[0],
        mode=_number(mode),
        uid=_number(uid),
        gid=_number(gid),
        size=_number(size),
        mtime=_number(mtime),
        record=record,
    )
    if not 0 <= found.size <= SIZE_MAX:
        raise ContentCorrupt(f"a layer's tar has an entry {shown(name)} of {found.size} bytes")
    return found


def _entry(header: _Header, records: list[tuple[bytes, bytes]], stream: LayerStream, budget: Budget) -> Entry:
    """The entry of a header and the extended records before it."""
    fields = {key: value for key, value in records if value}
    name = fields.get(b"GNU.sparse.name") or fields.get(b"path") or header.name
    target = fields.get(b"linkpath") or header.target
    if b"\0" in name or b"\0" in target:
        raise ContentCorrupt(f"{shown(name)}: a zero byte in a name")
    if header.type not in _TYPES:
        raise Unsupported(f"{shown(name)}: a tar entry of type {header.type.decode('latin-1')!r}")
    kind = _TYPES[header.type]
    if header.type == b"\0" and name.endswith(b"/"):
        kind = stat.S_IFDIR  # v7 has no type for them
    stored = 0
    if header.type in _WITH_DATA:
        stored = _integer(fields[b"size"]) if b"size" in fields else header.size
    size, extents = stored, None
    if kind == stat.S_IFREG:
        begin = stream.offset
        if header.type == b"S":
            size, extents = _old_sparse(header.record, stream, budget)
        elif fields.get(b"GNU.sparse.major", b"0") != b"0":
            size, extents = _integer(fields.get(b"GNU.sparse.realsize", b"")), _sparse_map(stream, budget)
            stored -= stream.offset - begin  # the map is a part of the data, in front of it
        elif b"GNU.sparse.size" in fields:
            size, extents = _integer(fields[b"GNU.sparse.size"]), _pax_extents(records)
    return Entry(
        name=name,
        mode=kind | header.mode & 0o7777,
        uid=_integer(fields[b"uid"]) if b"uid" in fields else header.uid,
        gid=_integer(fields[b"gid"]) if b"gid" in fields else header.gid,
        mtime_ns=_nanoseconds(fields[b"mtime"]) if b"mtime" in fields else header.mtime * 10**9,
        size=size if kind == stat.S_IFREG else 0,
        target=target,
        rdev=_device(header.record) if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0,
        xattrs=_xattrs(fields) if fields else {},
        offset=stream.offset,
        stored=stored,
        extents=None if extents is None else _checked(extents, size, stored, name),
    )


def _old_sparse(record: bytes, stream: LayerStream, budget: Budget) -> tuple[int, list[tuple[int, int]]]:
    """Size and extents of a GNU sparse file of the old kind: four extents in its header, more in records behind it."""
    size = _number(record[483:495])
    extents = _extent_fields(record[386:482])
    more = record[482]
    while more:
        record = stream.read_exactly(RECORD_BYTES)
        budget.take_metadata(RECORD_BYTES)
        extents += _extent_fields(record[:504])
        more = record[504]
        if len(extents) > EXTENTS_MAX:
            raise Unsupported(f"a sparse file of more than {EXTENTS_MAX} extents")
    return size, extents


def _extent_fields(fields: bytes) -> list[tuple[int, int]]:
    pairs = [(_number(fields[at : at + 12]), _number(fields[at + 12 : at + 24])) for at in range(0, len(fields), 24)]
    return [pair for pair in pairs if pair != (0, 0)]


def _sparse_map(stream: LayerStream, budget: Budget) -> list[tuple[int, int]]:
    """The extents of a sparse file of GNU's format 1.0: decimal lines in front of its data, filled up to a whole record."""
    numbers: list[int] = []
    rest = b""
    while not numbers or len(numbers) < 1 + 2 * numbers[0]:
        budget.take_metadata(RECORD_BYTES)
        *lines, rest = (rest + stream.read_exactly(RECORD_BYTES)).split(b"\n")
        numbers += map(_integer, lines)
        if len(rest) > RECORD_BYTES or (numbers and numbers[0] > EXTENTS_MAX):
            raise Unsupported(f"a sparse file of more than {EXTENTS_MAX} extents")
    end = 1 + 2 * numbers[0]
    return list(zip(numbers[1:end:2], numbers[2:end:2], strict=True))


def _pax_extents(records: list[tuple[bytes, bytes]]) -> list[tuple[int, int]]:
    """The extents of a sparse file of GNU's formats 0.0 (a record for each number) and 0.1 (one record with all)."""
    numbers = [_integer(value) for key, value in records if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes")]
    for key, value in records:
        if key == b"GNU.sparse.map":
            numbers = [_integer(number) for number in value.split(b",")]
    if len(numbers) % 2:
        raise ContentCorrupt("a sparse file whose map has an odd number of numbers")
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _checked(extents: list[tuple[int, int]], size: int, stored: int, name: bytes) -> list[tuple[int, int]]:
    """The extents that have bytes, if they are what they should be.  Raises ContentCorrupt."""
    extents = [(offset, length) for offset, length in extents if length]
    end = 0
    for offset, length in extents:
        if offset < end or length < 0:
            raise ContentCorrupt(f"{shown(name)}: a sparse file whose extents overlap or go back")
        end = offset + length
    if not end <= size <= SIZE_MAX or sum(length for _, length in extents) != stored:
        raise ContentCorrupt(f"{shown(name)}: a sparse file whose extents do not fit its size")
    return extents


def _extended(stream: LayerStream, size: int, budget: Budget) -> bytes:
    """The data of an extended header."""
    if size > EXTENDED_BYTES_MAX:
        raise Unsupported(f"an extended tar header of {size} bytes; at most {EXTENDED_BYTES_MAX} are taken")
    budget.take_metadata(size)
    return stream.read_exactly(size)


def _pax_records(data: bytes) -> list[tuple[bytes, bytes]]:
    """The records of a pax header: each is b"LENGTH KEY=VALUE\\n", the length that of all of it."""
    records = []
    at = 0
    while at < len(data) and data[at]:
        length = _RECORD_LENGTH.match(data, at)
        end = at + int(length[1]) if length else 0
        if length is None or not length.end() < end <= len(data) or data[end - 1] != ord("\n"):
            raise ContentCorrupt("a layer's tar has a damaged extended header")
        key, equals, value = data[length.end() : end - 1].partition(b"=")
        if not equals:
            raise ContentCorrupt("a layer's tar has a damaged extended header")
        records.append((key, value))
        at = end
    return records


def _xattrs(fields: dict[bytes, bytes]) -> dict[bytes, bytes]:
    xattrs = {}
    for key, value in fields.items():
        if key.startswith(b"LIBARCHIVE.xattr."):
            name = urllib.parse.unquote_to_bytes(key.removeprefix(b"LIBARCHIVE.xattr."))
            try:
                xattrs[name] = base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)  # libarchive does not pad
            except binascii.Error:
                raise ContentCorrupt(f"extended attribute {shown(name)}: not base64") from None
    for key, value in fields.items():
        if key.startswith(b"SCHILY.xattr."):
            xattrs[key.removeprefix(b"SCHILY.xattr.")] = value
    return xattrs


def _number(field: bytes) -> int:
    """A header's number: octal, or binary in two's complement when the first bit is set (which is no part of it)."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ~(1 << 8 * len(field) - 1)
        return value - (1 << 8 * len(field) - 1) if field[0] & 0x40 else value
    text = field.strip(b" \0").partition(b"\0")[0]
    try:
        return int(text, 8) if text else 0
    except ValueError:
        raise ContentCorrupt(f"a layer's tar has {text!r} where a number should be") from None


def _integer(text: bytes) -> int:
    """A decimal number of a pax record."""
    if not (text.isdigit() and len(text) <= 19 and (number := int(text)) <= SIZE_MAX):
        raise ContentCorrupt(f"a layer's tar has {shown(text)} where a number should be")
    return number


def _nanoseconds(text: bytes) -> int:
    """A time of a pax record, in seconds with any number of decimals, as nanoseconds since 1970."""
    if not (match := _DECIMAL.fullmatch(text)):
        raise ContentCorrupt(f"a layer's tar has {shown(text)} where a time should be")
    sign, seconds, decimals = match.groups()
    nanoseconds = int(seconds) * 10**9 + int((decimals or b"")[:9].ljust(9, b"0"))
    return -nanoseconds if sign else nanoseconds


def _device(record: bytes) -> int:
    major, minor = _number(record[329:337]), _number(record[337:345])
    if not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):
        raise ContentCorrupt(f"a layer's tar has a device {major}:{minor}, which Linux cannot have")
    return os.makedev(major, minor)


def shown(name: bytes) -> str:
    """A name from a layer, for an error's text."""
    return repr(os.fsdecode(name[:200]))
