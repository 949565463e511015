"""The archive of an image: all that is known of it but its files' content, in one file named by the manifest's digest.

    offset 0    META, an EROFS image: the kernel mounts the archive itself
    a page on   the object table (`actors.lazytree.table`; each source a `content.LayerContent`)
    behind it   an `ImageInfo`, as msgpack
    the end     the footer: magic, version, place and length of each section, sha256 of all bytes before that

The directory of archives may be shared by several daemons, on one node or many.  An archive appears whole (written
beside, renamed into place), and whoever writes one for the same digest writes an equal one, or one that differs in
`reference` only.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import struct
from collections.abc import Iterable
from typing import BinaryIO

import msgspec

from actors.image.errors import ArchiveInvalid
from actors.lazytree import erofs
from actors.lazytree.table import CorruptTable, ObjectTable, Row, write_table

VERSION = 1
_MAGIC = b"AERIEIMG"
_FOOTER = struct.Struct("<8sI4xQQQQQ")  # magic, version, length of META, table's offset and length, info's offset and length
_CHECKSUM_BYTES = 32
_PAGE_BYTES = 4096
_TEMPORARY = re.compile(r"\.sha256-[0-9a-f]{64}\.[0-9a-f]{16}\.tmp")


class LayerInfo(msgspec.Struct, frozen=True):
    """One layer, as the registry has it: `size_bytes` compressed, `diff_id` the digest of the decompressed tar."""

    digest: str
    media_type: str
    size_bytes: int
    diff_id: str


class ImageInfo(msgspec.Struct, frozen=True):
    """What there is to know of an image besides its tree: where it came from, and how its config wants a task started.

    `unpacked_bytes` is the content of all its objects, holes not counted.
    """

    reference: str
    digest: str
    layers: list[LayerInfo]
    env: list[str]
    entrypoint: list[str]
    command: list[str]
    working_dir: str
    user: str
    objects: int
    unpacked_bytes: int


def archive_path(directory: str, digest: str) -> str:
    """Where the archive of the manifest `digest` ("sha256:…") lies."""
    return os.path.join(directory, digest.replace(":", "-") + ".aerie")


class Archive:
    """An archive that was found whole.  `path` can be mounted as META; `info` is what is in it."""

    def __init__(self, path: str, info: ImageInfo, table: tuple[int, int]) -> None:
        self.path = path
        self.info = info
        self._table = table  # offset, length

    @classmethod
    def open(cls, path: str) -> Archive:
        """The archive at `path`, all of it checked.  Raises ArchiveInvalid, OSError (FileNotFoundError when there is none)."""
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            end = size - _CHECKSUM_BYTES
            if end < _FOOTER.size:
                raise ArchiveInvalid(f"{path}: {size} bytes are too few for an image's archive")
            file.seek(end - _FOOTER.size)
            magic, version, meta_length, *sections = _FOOTER.unpack(file.read(_FOOTER.size))
            table_offset, table_length, info_offset, info_length = sections
            if magic != _MAGIC:
                raise ArchiveInvalid(f"{path}: not an image's archive, or not all of one")
            if version != VERSION:
                raise ArchiveInvalid(f"{path}: an archive of version {version}; this daemon reads version {VERSION}")
            if file.read() != _digest(file, end):
                raise ArchiveInvalid(f"{path}: the archive is damaged (its checksum is another)")
            if (
                not meta_length
                <= table_offset
                <= table_offset + table_length
                <= info_offset
                <= info_offset + info_length
                <= end
            ):
                raise ArchiveInvalid(f"{path}: the archive's sections overlap")
            file.seek(info_offset)
            try:
                info = msgspec.msgpack.decode(file.read(info_length), type=ImageInfo)
            except msgspec.MsgspecError as error:
                raise ArchiveInvalid(f"{path}: the archive's description of the image is not understood: {error}") from None
        return cls(path, info, (table_offset, table_length))

    def objects(self) -> ObjectTable:
        """The object table, which is the caller's to close.  Raises ArchiveInvalid, OSError."""
        offset, length = self._table
        # ObjectTable maps a file of its own: the section is copied into one that has no name and no disk.
        descriptor = os.memfd_create("objects", os.MFD_CLOEXEC)
        try:
            with open(self.path, "rb") as file:
                while length > 0 and (copied := os.sendfile(descriptor, file.fileno(), offset, length)):
                    offset, length = offset + copied, length - copied
            return ObjectTable(f"/proc/self/fd/{descriptor}")
        except CorruptTable as error:
            raise ArchiveInvalid(f"{self.path}: {error}") from None
        finally:
            os.close(descriptor)


def write_archive(directory: str, root: erofs.Node, rows: Iterable[Row], info: ImageInfo) -> str:
    """Write the archive of `info.digest` and return its path, where it is whole and durable or not at all.

    Raises OSError, and ValueError for a tree that EROFS cannot express.  What earlier writers that were killed have
    left is removed.
    """
    _remove_abandoned(directory)
    path = archive_path(directory, info.digest)
    temporary, file = _create(directory, os.path.basename(path).removesuffix(".aerie"))
    with file:
        try:
            _write_sections(file, root, rows, info)
            os.fsync(file.fileno())
            os.rename(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    _sync_directory(directory)
    return path


def _write_sections(file: BinaryIO, root: erofs.Node, rows: Iterable[Row], info: ImageInfo) -> None:
    meta_length = erofs.write(root, file)
    table_offset = meta_length + -meta_length % _PAGE_BYTES
    file.write(bytes(table_offset - meta_length))
    table_length = write_table(file, rows)
    encoded = msgspec.msgpack.encode(info)
    file.write(encoded)
    info_offset = table_offset + table_length
    file.write(_FOOTER.pack(_MAGIC, VERSION, meta_length, table_offset, table_length, info_offset, len(encoded)))
    file.flush()
    file.write(_digest(file, info_offset + len(encoded) + _FOOTER.size))
    file.flush()


def _digest(file: BinaryIO, length: int) -> bytes:
    """sha256 of the file's first `length` bytes; leaves it standing behind them."""
    file.seek(0)
    sha256 = hashlib.sha256()
    while length:
        piece = file.read(min(length, 1 << 20))
        if not piece:
            break  # it was cut just now; the digest will be another
        sha256.update(piece)
        length -= len(piece)
    return sha256.digest()


def _create(directory: str, name: str) -> tuple[str, BinaryIO]:
    """A new temporary, locked for as long as it is open: a lock that can be had tells that the writer is dead."""
    while True:
        path = os.path.join(directory, f".{name}.{secrets.token_hex(8)}.tmp")
        file = open(path, "x+b")
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return path, file
        file.close()  # somebody cleaned it up before it was locked


def _remove_abandoned(directory: str) -> None:
    for name in os.listdir(directory):
        if not _TEMPORARY.fullmatch(name):
            continue
        path = os.path.join(directory, name)
        try:
            with open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
        except (BlockingIOError, FileNotFoundError):
            pass  # being written, or finished or removed just now


def _sync_directory(directory: str) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
