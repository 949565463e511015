"""Layers of eStargz and of zstd:chunked, with their tables of contents, written from the facts of the formats."""

from __future__ import annotations

import base64
import datetime
import gzip
import itertools
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from backports import zstd

from tests.actors.image.images import Member, digest, encode, member, tar

STARGZ = "containerd.io/snapshot/stargz/toc.digest"
CHUNKED = "io.github.containers.zstd-chunked."
KINDS = {
    tarfile.REGTYPE: "reg",
    tarfile.DIRTYPE: "dir",
    tarfile.SYMTYPE: "symlink",
    tarfile.LNKTYPE: "hardlink",
    tarfile.CHRTYPE: "char",
    tarfile.BLKTYPE: "block",
    tarfile.FIFOTYPE: "fifo",
}
Entry = dict[str, Any]


@dataclass
class Tabled:
    """A layer: as it is pushed, as it unpacks, and what its manifest says of it."""

    blob: bytes
    tar: bytes
    annotations: dict[str, str]


@dataclass
class _Packed:
    """Frames, one behind another, and what each of them holds."""

    pack: Callable[[bytes], bytes]
    blob: bytearray = field(default_factory=bytearray)
    tar: bytearray = field(default_factory=bytearray)
    _frame: bytearray = field(default_factory=bytearray)

    def add(self, data: bytes) -> None:
        self.tar += data
        self._frame += data

    def end_frame(self) -> None:
        if self._frame:
            self.blob += self.pack(bytes(self._frame))
            self._frame.clear()

    @property
    def inner(self) -> int:
        return len(self._frame)


def estargz(
    *members: Member, chunk_bytes: int = 4 << 20, frame_bytes: int = 0, change: Callable[[list[Entry]], Any] = lambda _: None
) -> Tabled:
    """`frame_bytes`: files share a gzip member until it holds so many.  `change` is given the table's entries, to spoil them."""
    packed = _Packed(lambda data: gzip.compress(data, 1, mtime=0))
    entries: list[Entry] = []
    for item in (member(".no.prefetch.landmark", b"\x0f"), *members):
        info, content = item
        entry = _entry(info, content)
        encoded = encode(item)
        stored = len(content) + -len(content) % 512
        packed.add(encoded[: len(encoded) - stored])
        for at in range(0, len(content), chunk_bytes):
            if packed.inner >= frame_bytes:
                packed.end_frame()
            chunk = content[at : at + chunk_bytes]
            place: Entry = {"offset": len(packed.blob), "chunkDigest": digest(chunk)}
            if packed.inner:
                place["innerOffset"] = packed.inner
            if at:
                entry = {"name": info.name, "type": "chunk", "chunkOffset": at}
            if at + chunk_bytes <= len(content):
                place["chunkSize"] = chunk_bytes
            entries.append(entry | place)
            packed.add(chunk)
        if not content:
            entries.append(entry)
        packed.add(bytes(stored - len(content)))
    packed.end_frame()
    change(entries)
    table = json.dumps({"version": 1, "entries": entries}, indent="\t").encode()
    at = len(packed.blob)
    packed.add(tar(member("stargz.index.json", table, mode=0o444)))
    packed.end_frame()
    footer = b"\x1f\x8b\x08\x04" + bytes(5) + b"\xff" + (26).to_bytes(2, "little") + b"SG" + (22).to_bytes(2, "little")
    footer += b"%016xSTARGZ" % at + b"\x01\x00\x00\xff\xff" + bytes(8)
    assert len(footer) == 51
    return Tabled(bytes(packed.blob) + footer, bytes(packed.tar), {STARGZ: digest(table)})


def zstd_chunked(
    *members: Member, chunk_bytes: int = 64 << 10, change: Callable[[list[Entry]], Any] = lambda _: None
) -> Tabled:
    """Chunks of changing length, as content cuts them, none of them shared; headers have frames of their own."""
    packed = _Packed(lambda data: zstd.compress(data, 3))
    entries: list[Entry] = []
    for item in members:
        info, content = item
        encoded = encode(item)
        stored = len(content) + -len(content) % 512
        packed.add(encoded[: len(encoded) - stored])
        entry = _entry(info, content) | {"modtime": _time(float(info.pax_headers.get("mtime", info.mtime)), True)}
        if not content:
            entry.pop("digest", None)
        cuts = [0]
        while cuts[-1] < len(content):
            cuts.append(min(len(content), cuts[-1] + chunk_bytes // 2 + (len(cuts) * 7919) % chunk_bytes))
        for at, end in itertools.pairwise(cuts):
            packed.end_frame()
            chunk = content[at:end]
            if at:
                entry = {"name": info.name, "type": "chunk", "chunkOffset": at}
            entry["offset"] = len(packed.blob)
            if len(cuts) > 2:
                entry |= {"chunkSize": len(chunk), "chunkDigest": digest(chunk)}
                if not chunk.strip(b"\0"):
                    entry["chunkType"] = "zeros"
            entries.append(entry)
            packed.add(chunk)
            packed.end_frame()
            entries[-1]["endOffset"] = len(packed.blob)
        if not content:
            entries.append(entry)
        packed.add(bytes(stored - len(content)))
    packed.add(bytes(1024))
    packed.end_frame()
    change(entries)
    table = json.dumps({"version": 1, "entries": entries, "tarSplitDigest": digest(b"")}).encode()
    frame = zstd.compress(table)
    at = len(packed.blob) + 8
    footer = b"".join(number.to_bytes(8, "little") for number in (at, len(frame), len(table), 1, 0, 0, 0)) + b"GNUlInUx"
    blob = bytes(packed.blob) + skippable(frame) + skippable(footer)
    annotations = {
        f"{CHUNKED}manifest-checksum": digest(frame),
        f"{CHUNKED}manifest-position": f"{at}:{len(frame)}:{len(table)}:1",
    }
    return Tabled(blob, bytes(packed.tar), annotations)


def skippable(content: bytes) -> bytes:
    return b"\x50\x2a\x4d\x18" + len(content).to_bytes(4, "little") + content


def _entry(info: tarfile.TarInfo, content: bytes) -> Entry:
    kind = KINDS[info.type]
    entry: Entry = {"name": info.name, "type": kind, "mode": info.mode, "uid": info.uid, "gid": info.gid}
    if info.mtime:
        entry["modtime"] = _time(info.mtime, False)
    if kind == "reg":
        entry |= {"size": len(content), "digest": digest(content)}
    if info.linkname:
        entry["linkName"] = info.linkname
    if kind in ("char", "block"):
        entry |= {"devMajor": info.devmajor, "devMinor": info.devminor}
    xattrs = {
        name.removeprefix("SCHILY.xattr."): base64.b64encode(os.fsencode(value)).decode()
        for name, value in info.pax_headers.items()
        if name.startswith("SCHILY.xattr.")
    }
    return entry | ({"xattrs": xattrs} if xattrs else {})


def _time(seconds: float, is_fine: bool) -> str:
    """As Go writes it: eStargz' to the second, the other's to the nanosecond, in any zone."""
    time = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(seconds=round(seconds, 6 if is_fine else 0))
    if is_fine:
        time = time.astimezone(datetime.timezone(datetime.timedelta(hours=-7, minutes=-30)))
    return time.isoformat().replace("+00:00", "Z")


def images(layers: Sequence[Tabled]) -> dict[str, Any]:
    """What `Repository.push` wants besides the tars, for these layers with their tables."""
    return {"blobs": [layer.blob for layer in layers], "annotations": [layer.annotations for layer in layers]}
