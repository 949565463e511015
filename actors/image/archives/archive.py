"""The archive of an image: all that is known of it but its files' content, in one file named by the manifest's digest.

    offset 0    META, an EROFS image: the kernel mounts the archive itself
    a page on   the object table (`actors.lazytree.table`; each source a `content.LayerContent`)
    a page on   where its layers can be read from (`checkpoints`)
    behind it   an `ImageInfo`, as msgpack
    the end     the footer: magic, version, place and length of each section, sha256 of all bytes before that

The directory of archives may be shared by several daemons, on one node or many.  An archive appears whole (written
beside, renamed into place), and whoever writes one of the same edition for the same digest writes an equal one, or one that differs
in `reference` only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from typing import BinaryIO

import msgspec

from actors.image.errors import ArchiveInvalid
from actors.image.layers.checkpoints import Checkpoints, CorruptSpans, Spans
from actors.lazytree import erofs
from actors.lazytree.table import CorruptTable, ObjectTable, Row, write_table

VERSION = 4  # 1 had no checkpoints, 2 larger chunks, 3 no frames (`checkpoints`)
VERSION_WITHOUT_FRAMES = 3  # is read, and written for what has none: older daemons with the same directory read it
_MAGIC = b"AERIEIMG"
_FOOTER = struct.Struct("<8sI4xQQQQQQQ")  # magic, version, length of META; offset and length of table, spans and info
_VERSION = struct.Struct("<8sI4x")
_OLD_FOOTER_BYTES = {1: 56}
_CHECKSUM_BYTES = 32
_PAGE_BYTES = 4096
HOLD_TRIES = 100
_TEMPORARY = re.compile(r"\.sha256-[0-9a-f]{64}\.[0-9a-f]{16}\.tmp")


class LayerInfo(msgspec.Struct, frozen=True):
    """One layer, as the registry has it: `size_bytes` compressed, `diff_id` the digest of the decompressed tar."""

    digest: str
    media_type: str
    size_bytes: int
    diff_id: str


class ImageInfo(msgspec.Struct, frozen=True):
    """What there is to know of an image besides its tree: where it came from, and how its config wants a task started.

    `unpacked_bytes` is the content of all its objects, holes not counted.  `edition` tells archives of one image apart that differ
    in their tables of objects, or in how these are cut: it says what was made otherwise than by reading all layers (`builder`).
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
    edition: str = ""

    @property
    def identity(self) -> str:
        """What numbers of objects and of their chunks belong to: the image's digest, for an archive that was made by reading all layers."""
        return f"sha256:{hashlib.sha256((self.digest + self.edition).encode()).hexdigest()}" if self.edition else self.digest


def archive_path(directory: str, digest: str) -> str:
    """Where the archive of the manifest `digest` ("sha256:…") lies."""
    return os.path.join(directory, digest.replace(":", "-") + ".aerie")


class Archive:
    """An archive that was found whole.  `path` can be mounted as META; `info` is what is in it."""

    def __init__(self, path: str, info: ImageInfo, table: tuple[int, int], spans: tuple[int, int]) -> None:
        self.path = path
        self.info = info
        self._table = table  # offset, length
        self._spans = spans

    @classmethod
    def open(cls, path: str, checked: bool = False) -> Archive:
        """The archive at `path`.  Raises ArchiveInvalid, OSError (FileNotFoundError when there is none).

        `checked`: its checksum has been found right already, and need not be looked at again.
        """
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            end = size - _CHECKSUM_BYTES
            if end < _FOOTER.size:
                raise ArchiveInvalid(f"{path}: {size} bytes are too few for an image's archive")
            file.seek(end - _FOOTER.size)
            footer = file.read(_FOOTER.size)
            magic, version, meta_length, *places = _FOOTER.unpack(footer)
            for old, length in _OLD_FOOTER_BYTES.items():
                if _VERSION.unpack_from(footer, len(footer) - length) == (_MAGIC, old):
                    magic, version = _MAGIC, old
            if magic != _MAGIC:
                raise ArchiveInvalid(f"{path}: not an image's archive, or not all of one")
            if version not in (VERSION, VERSION_WITHOUT_FRAMES):
                raise ArchiveInvalid(f"{path}: an archive of version {version}; this daemon reads version {VERSION}")
            if not checked and file.read() != _digest(file, end):
                raise ArchiveInvalid(f"{path}: the archive is damaged (its checksum is another)")
            sections = list(zip(places[::2], places[1::2], strict=True))
            ends = [meta_length]
            for offset, length in sections:
                if not ends[-1] <= offset <= offset + length <= end:
                    raise ArchiveInvalid(f"{path}: the archive's sections overlap")
                ends.append(offset + length)
            table, spans, (info_offset, info_length) = sections
            file.seek(info_offset)
            try:
                info = msgspec.msgpack.decode(file.read(info_length), type=ImageInfo)
            except msgspec.MsgspecError as error:
                raise ArchiveInvalid(f"{path}: the archive's description of the image is not understood: {error}") from None
        return cls(path, info, table, spans)

    def objects(self) -> ObjectTable:
        """The object table, which is the caller's to close.  Raises ArchiveInvalid, OSError."""
        try:
            return ObjectTable(self.path, self._table)
        except CorruptTable as error:
            raise ArchiveInvalid(str(error)) from None

    def spans(self, table: ObjectTable) -> Spans:
        """Where the content of the objects in `table` can be read from, the caller's to close.  Raises ArchiveInvalid, OSError."""
        try:
            return Spans(self.path, self._spans, table)
        except CorruptSpans as error:
            raise ArchiveInvalid(str(error)) from None


def write_archive(directory: str, root: erofs.Node, rows: Iterable[Row], checkpoints: Checkpoints, info: ImageInfo) -> str:
    """Write the archive of `info.digest` and return its path, where it is whole and durable or not at all.

    Raises OSError, and ValueError for a tree that EROFS cannot express.
    """
    path = archive_path(directory, info.digest)
    with _written(path) as file:
        _write_sections(file, root, rows, checkpoints, info)
    return path


def receive_archive(directory: str, digest: str, fill: Callable[[BinaryIO], bool]) -> Archive | None:
    """Take the archive of `digest` as `fill` writes it into a file, checked as a whole before it has its name, and durable.

    None when `fill` returns False: there was none.  Raises ArchiveInvalid for what is no archive or another image's, OSError.
    """
    path = archive_path(directory, digest)
    try:
        with _written(path) as file:
            if not fill(file):
                raise _NothingCame
            file.flush()
            info = Archive.open(file.name).info
            if info.digest != digest:
                raise ArchiveInvalid(f"{path}: what came for it is the archive of {info.digest}")
    except _NothingCame:
        return None
    return Archive.open(path, checked=True)


def save_beside(path: str, pieces: Iterable[bytes]) -> int:
    """Write a file that belongs to an archive, "DIRECTORY/sha256-….something", whole and durable or not at all → its size in bytes.

    Raises OSError.
    """
    with _written(path) as file:
        file.writelines(pieces)
        return file.tell()


def hold(path: str) -> int:
    """Keep the archive from being evicted, by anybody on any node, until the descriptor is closed.  It is used now, its time says.

    Where the file system knows no locks, or no times of ours, that is how it is.  Raises OSError (FileNotFoundError: there is none).
    """
    for _ in range(HOLD_TRIES):
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _lock_shared(file)
            if os.fstat(file).st_nlink:
                with contextlib.suppress(OSError):
                    os.utime(file)
                return file
        except BlockingIOError:
            time.sleep(0.001)  # somebody removes it, just now
        except BaseException:
            os.close(file)
            raise
        os.close(file)
    raise FileNotFoundError(errno.ENOENT, "it is just being removed", path)


def _lock_shared(file: int) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise


def _write_sections(file: BinaryIO, root: erofs.Node, rows: Iterable[Row], checkpoints: Checkpoints, info: ImageInfo) -> None:
    ordered = sorted(rows, key=attrgetter("key"))
    meta_length = erofs.write(root, file)
    table_offset = _fill_page(file, meta_length)
    table_length = write_table(file, ordered)
    spans_offset = _fill_page(file, table_offset + table_length)
    spans_length = checkpoints.write(file, ordered)
    info_offset = spans_offset + spans_length
    encoded = msgspec.msgpack.encode(info)
    file.write(encoded)
    places = (table_offset, table_length, spans_offset, spans_length, info_offset, len(encoded))
    file.write(_FOOTER.pack(_MAGIC, VERSION if checkpoints.has_frames else VERSION_WITHOUT_FRAMES, meta_length, *places))
    file.flush()
    file.write(_digest(file, info_offset + len(encoded) + _FOOTER.size))
    file.flush()


def _fill_page(file: BinaryIO, end: int) -> int:
    """Where the next page begins, when the file has `end` bytes; up to there it is filled with zeros."""
    file.write(bytes(-end % _PAGE_BYTES))
    return end + -end % _PAGE_BYTES


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


class _NothingCame(Exception):
    pass


@contextlib.contextmanager
def _written(path: str) -> Iterator[BinaryIO]:
    """A new file, to be filled: after the block it is at `path`, whole and durable; after an exception it is not there.

    Raises OSError.  What earlier writers that were killed have left is removed.
    """
    directory, name = os.path.split(path)
    _remove_abandoned(directory)
    temporary, file = _create(directory, name.partition(".")[0])
    with file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.rename(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
    _sync_directory(directory)


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
