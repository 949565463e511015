"""Tables of contents: what a layer of eStargz or zstd:chunked says of its entries and of where the content of its files lies.

Both are the JSON of CRFS: {"version": 1, "entries": […]}, an entry for each of the tar's, in its order, and behind that of a file in
several chunks one of type "chunk" for each further one.

    type, name, linkName, mode, uid, gid, modtime (RFC 3339), devMajor, devMinor, xattrs (values in base64), size
    digest         of the file's content
    offset         where the chunk's gzip member, or zstd frame, begins in the layer
    innerOffset    how many bytes into what comes out of that the chunk is
    chunkOffset, chunkSize, chunkDigest    the chunk's place in the file, without a size to its end; all of it without a digest
    chunkType      "zeros": nothing else is in it (zstd:chunked)

Sources: containerd's stargz-snapshotter, docs/estargz.md; containers/storage, docs/containers-storage-zstd-chunked.md.  Whether the
table is the one that the manifest means is for the caller to check (`tabled`).  No I/O.

What a table does not have is not there: names that are no UTF-8 (JSON's writers replace such bytes, and so the table is refused), and, as
these tools write them, attributes as libarchive has them and eStargz' fractions of seconds.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from actors.image.layers.content import CHUNK_BYTES, CHUNK_BYTES_MAX
from actors.image.layers.stream import Budget
from actors.image.layers.tar import RECORD_BYTES, Entry, shown

TOC_BYTES_MAX = 128 << 20  # of JSON: some 270,000 files
ZEROS_BYTES_MAX = 64 << 20  # of a chunk of zeros, which what cuts chunks by content finds no place to cut in
_ZEROS = bytes(CHUNK_BYTES)
_NUMBER_MAX = (1 << 63) - 1
_REPLACED = "�"  # what encoders put where bytes are no UTF-8
_KINDS = {
    "reg": stat.S_IFREG,
    "dir": stat.S_IFDIR,
    "symlink": stat.S_IFLNK,
    "hardlink": 0,
    "char": stat.S_IFCHR,
    "block": stat.S_IFBLK,
    "fifo": stat.S_IFIFO,
}
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_SPACE = re.compile(r"[ \t\r\n]*")
_TIME = re.compile(r"(\d{4}-\d\d-\d\d)T(\d\d):(\d\d):(\d\d)(?:\.(\d{1,9})\d*)?(?:Z|([+-])(\d\d):(\d\d))", re.ASCII)
_EPOCH_DAY = datetime.date(1970, 1, 1).toordinal()

_Number = Annotated[int, Meta(ge=0, le=_NUMBER_MAX)]


class TocUnusable(Exception):
    """The layer has to be read as any other; the text says why."""


class Chunk(NamedTuple):
    """A part of a file: `size` bytes with the sha256 `digest`, `inner` bytes into what comes out of the frame at `first` of the layer."""

    first: int
    inner: int
    size: int
    digest: bytes


@dataclass(slots=True, eq=False)
class Listed:
    """An entry; `key` is the digest of its content, None without content, which is in `chunks`.  `entry.offset` is for `frames` to say."""

    entry: Entry
    key: str | None
    chunks: list[Chunk]


class _Table(msgspec.Struct):
    version: int
    entries: msgspec.Raw


class _Item(msgspec.Struct, rename="camel"):
    name: str
    type: str
    link_name: str = ""
    mode: _Number = 0
    uid: _Number = 0
    gid: _Number = 0
    modtime: str | None = None
    dev_major: _Number = 0
    dev_minor: _Number = 0
    xattrs: dict[str, bytes] | None = None
    size: _Number = 0
    digest: str = ""
    offset: _Number = 0
    inner_offset: _Number = 0
    chunk_offset: _Number = 0
    chunk_size: _Number = 0
    chunk_digest: str = ""
    chunk_type: str = ""


def parse(table: bytes, budget: Budget) -> list[Listed]:
    """The entries of a table of at most TOC_BYTES_MAX, in their order.  Raises TocUnusable, OverBounds.

    Of the table's own memory no more is used than a few times its size, whatever is in it.
    """
    listed: list[Listed] = []
    items = _items(table)
    item = next(items, None)
    while item is not None:
        if item.type not in _KINDS:
            raise TocUnusable(f"its table has an entry {item.name[:200]!r} of type {item.type[:20]!r}")
        budget.take_entry()
        head, chunks = item, [item]
        while (item := next(items, None)) is not None and item.type == "chunk":
            if item.name != head.name:
                raise TocUnusable(f"its table has a chunk of {item.name[:200]!r} behind an entry {head.name[:200]!r}")
            chunks.append(item)
        listed.append(_listed(head, chunks))
        budget.take_bytes(head.size + RECORD_BYTES)
        budget.take_metadata(sum(len(name) + len(value) for name, value in listed[-1].entry.xattrs.items()))
    return listed


def _items(table: bytes) -> Iterator[_Item]:
    """One after another: all of them at once, as objects, would take many times the table's size."""
    try:
        found = msgspec.json.decode(table, type=_Table)
        text = str(memoryview(found.entries), "utf-8")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TocUnusable(f"its table of contents is not understood: {error}") from None
    if found.version != 1 or not text.startswith("["):
        raise TocUnusable(f"its table of contents is of version {found.version}, or no list")
    decoder, space = json.JSONDecoder(), _SPACE.match
    at = 1
    while True:
        at = _end(space, text, at)
        if text[at] == "]":
            return
        try:
            value, at = decoder.raw_decode(text, at)
            yield msgspec.convert(value, _Item)
        except (msgspec.ValidationError, ValueError, RecursionError) as error:
            raise TocUnusable(f"an entry of its table of contents is not understood: {error}") from None
        at = _end(space, text, at)
        at += text[at] == ","


def _end(space: Any, text: str, at: int) -> int:
    end: int = space(text, at).end()
    return end


def _listed(head: _Item, items: list[_Item]) -> Listed:
    kind = _KINDS[head.type]
    name, target = _bytes(head.name), _bytes(head.link_name)
    is_file = head.type == "reg"
    if len(items) > 1 and not (is_file and head.size):
        raise TocUnusable(f"its table has chunks for {shown(name)}, which has no content")
    key, chunks = None, []
    if is_file and head.size:
        key = _hexadecimal(head.digest, name)
        chunks = list(_chunks(head, items, name))
    rdev = 0
    if kind in (stat.S_IFCHR, stat.S_IFBLK):
        if head.dev_major >= 1 << 12 or head.dev_minor >= 1 << 20:
            raise TocUnusable(f"its table has a device {head.dev_major}:{head.dev_minor}, which Linux cannot have")
        rdev = os.makedev(head.dev_major, head.dev_minor)
    entry = Entry(
        name=name,
        mode=kind | head.mode & 0o7777,
        uid=head.uid,
        gid=head.gid,
        mtime_ns=_nanoseconds(head.modtime) if head.modtime else 0,
        size=head.size if is_file else 0,
        target=target,
        rdev=rdev,
        # One without a value is none in a tar.
        xattrs={_bytes(attribute): value for attribute, value in (head.xattrs or {}).items() if value},
        offset=0,
        stored=head.size if is_file else 0,
        extents=None,
    )
    return Listed(entry, key, chunks)


def _chunks(head: _Item, items: list[_Item], name: bytes) -> Iterator[Chunk]:
    """A file's.  Raises TocUnusable unless they are all of it, one behind another."""
    begin = 0
    for item, following in zip(items, [*items[1:], None], strict=True):
        end = head.size if following is None else following.chunk_offset
        size = end - begin
        if item.chunk_offset != begin or size <= 0 or item.chunk_size not in (0, size):
            raise TocUnusable(f"the chunks of {shown(name)} in its table do not make up the file")
        digest = _hexadecimal(item.chunk_digest or (head.digest if len(items) == 1 else ""), name)
        if size <= CHUNK_BYTES_MAX:
            yield Chunk(item.offset, item.inner_offset, size, bytes.fromhex(digest))
        elif size <= ZEROS_BYTES_MAX and (item.chunk_type == "zeros" or digest == _digest_of_zeros(size).hex()):
            yield from _zeros(item, size)
        else:
            raise TocUnusable(f"{shown(name)} has a chunk of {size} bytes; at most {CHUNK_BYTES_MAX} can be checked at a time")
        begin = end


def _zeros(item: _Item, size: int) -> Iterator[Chunk]:
    """Of a chunk of zeros the digest of any part is known."""
    for at in range(0, size, CHUNK_BYTES):
        part = min(CHUNK_BYTES, size - at)
        yield Chunk(item.offset, item.inner_offset + at, part, _digest_of_zeros(part))


@lru_cache(64)
def _digest_of_zeros(size: int) -> bytes:
    sha256 = hashlib.sha256()
    for at in range(0, size, CHUNK_BYTES):
        sha256.update(_ZEROS[: size - at])
    return sha256.digest()


def _hexadecimal(digest: str, name: bytes) -> str:
    if not (match := _DIGEST.fullmatch(digest)):
        raise TocUnusable(f"its table has no sha256 digest for {shown(name)}, or for a chunk of it")
    return match[1]


def _bytes(text: str) -> bytes:
    if _REPLACED in text:
        raise TocUnusable(f"its table has a name {text[:200]!r}, which was not UTF-8 before")
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        raise TocUnusable(f"its table has a name {text[:200]!r}, which is no text") from None
    if b"\0" in encoded:
        raise TocUnusable(f"its table has a name {text[:200]!r}: a zero byte in a name")
    return encoded


def _nanoseconds(time: str) -> int:
    """Nanoseconds since 1970 of an RFC 3339 time."""
    match = _TIME.fullmatch(time)
    if match is None:
        raise TocUnusable(f"its table has {time[:40]!r} where a time should be")
    date, hour, minute, second, fraction, sign, zone_hours, zone_minutes = match.groups()
    seconds = 86400 * _day(date) + 3600 * int(hour) + 60 * int(minute) + int(second)
    if sign:
        seconds -= (1 if sign == "+" else -1) * (3600 * int(zone_hours) + 60 * int(zone_minutes))
    return 10**9 * seconds + int((fraction or "").ljust(9, "0"))


@lru_cache(1024)
def _day(date: str) -> int:
    """Of "2026-11-26" since 1970."""
    try:
        return datetime.date.fromisoformat(date).toordinal() - _EPOCH_DAY
    except ValueError:
        raise TocUnusable(f"its table has {date!r} where a date should be") from None
