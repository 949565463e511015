"""Objects of images that are not what their name says: a disk that forgets, a power cut that was not noticed.

An object is named by the sha256 of its content, so nothing else need be known to find one that is damaged; only of sparse files the
name is made of their map too, which the image's archive has.  (A workspace's objects are named by versions, not by content: of these
the size alone can be looked at, when a tree is mounted.)

What is damaged is repaired: fetched from its image's registry, and put in the place of what is there, so that who opens the file from
then on has the right bytes.  What cannot be fetched now is removed: a read that fails is better than one that lies.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import BinaryIO, cast

from actors.cache.archives import SUFFIX
from actors.image.archives.archive import Archive
from actors.image.errors import ArchiveInvalid, ContentCorrupt, ImageError
from actors.image.layers.checkpoints import Spans, decompressed
from actors.image.layers.content import LayerContent, copy_content, decode_content, stored_bytes
from actors.image.registry.mirrors import mirrors_of
from actors.image.registry.reference import Reference
from actors.image.registry.repository import Registry
from actors.lazytree import trees
from actors.lazytree.objects import PREFIXES, Objects
from actors.lazytree.table import CorruptTable, Row
from actors.lazytree.trees import Tree

PIECE_BYTES = 1 << 20
RUN_SPANS = 8  # fetched at once
FETCH_S = 60.0
RWF_DONTCACHE = 0x80  # Linux 6.14: what was read for this need not stay in memory


@dataclass
class Report:
    """What was found.  `texts`: a line for each damaged object."""

    checked: int = 0
    damaged: int = 0
    repaired: int = 0
    texts: list[str] = field(default_factory=list)


def check(
    objects: Objects, archives: str, prefixes: Iterable[str], mirrors: str, alive: Callable[[], None] = lambda: None
) -> Report:
    """Look at all objects of images whose names begin with one of these `prefixes`, and repair what is damaged.  Raises OSError."""
    report = Report()
    prefixes = set(prefixes)
    images = [tree for tree in trees.trees(objects.descriptor) if tree.source.layers]
    of_images: dict[str, Tree] = {}
    for tree in images:
        for at in range(0, len(tree.keys), trees.KEY_BYTES):
            key = tree.keys[at : at + trees.KEY_BYTES].hex()
            if key[:2] in prefixes:
                of_images[key] = tree
    for key, tree in of_images.items():
        alive()
        try:
            right = is_right(objects, key, partial(_row, archives, tree, key), alive)
        except FileNotFoundError:
            continue  # not here
        report.checked += 1
        if right:
            continue
        report.damaged += 1
        problem = _repair(objects, archives, tree, key, mirrors)
        report.repaired += not problem
        done = f"it is removed, for it cannot be fetched: {problem}" if problem else "it is fetched again, and right now"
        report.texts.append(f"{tree.source.reference}, content {key[:12]}, was damaged on this node's disk; {done}")
    return report


def all_prefixes() -> list[str]:
    return sorted(PREFIXES)


def is_right(objects: Objects, key: str, row: Callable[[], Row | None], alive: Callable[[], None] = lambda: None) -> bool:
    """Whether the object is what its name says; what nobody can tell is right.  `row`: its image's.  Raises FileNotFoundError."""
    descriptor = os.open(Objects.path(key), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=objects.descriptor)
    try:
        status = os.fstat(descriptor)
        size = status.st_size
        # Of a file with holes, which may be terabytes, what is stored is looked at.
        if status.st_blocks * 512 >= size and _key_of(descriptor, size, size, None, alive) == key:
            return True
        if (found := row()) is None:
            return True
        content = decode_content(found)
        stored = stored_bytes(found, content)
        return size == found.size_bytes and _key_of(descriptor, size, stored, content.extents, alive) == key
    except OSError:
        return False  # the disk cannot read it
    finally:
        os.close(descriptor)


def _key_of(descriptor: int, size: int, stored: int, extents: list[tuple[int, int]] | None, alive: Callable[[], None]) -> str:
    def pieces() -> Iterator[bytes]:
        for offset, length in [(0, size)] if extents is None else extents:
            for at in range(offset, offset + length, PIECE_BYTES):
                alive()
                yield _read(descriptor, min(PIECE_BYTES, offset + length - at), at)

    return copy_content(_reader(pieces()), size, stored, extents, cast(BinaryIO, _Nowhere()))[0]


def _read(descriptor: int, size: int, at: int) -> bytes:
    data = bytearray(size)
    try:
        count = os.preadv(descriptor, [data], at, RWF_DONTCACHE)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        count = os.preadv(descriptor, [data], at)
    return bytes(data[:count])


class _Nowhere:
    """A file of which nothing is kept."""

    def write(self, data: bytes) -> None:
        pass

    def seek(self, offset: int) -> None:
        pass

    def truncate(self, size: int) -> None:
        pass


def _reader(blocks: Iterator[bytes]) -> Callable[[int], bytes]:
    """Gives the next so many bytes, or as many as there are."""
    left = memoryview(b"")

    def read(size: int) -> bytes:
        nonlocal left
        data = bytearray()
        while len(data) < size:
            if not left:
                left = memoryview(next(blocks, b""))
                if not left:
                    break
            part = left[: size - len(data)]
            data += part
            left = left[len(part) :]
        return bytes(data) + bytes(size - len(data))  # what is missing makes another digest

    return read


# --- repairing ---


def _repair(objects: Objects, archives: str, tree: Tree, key: str, mirrors: str) -> str:
    """Put the right content in the place of a damaged object, or remove it → why it is removed, "" when it is right now."""
    try:
        archive = Archive.open(os.path.join(archives, tree.name + SUFFIX))
        with contextlib.closing(archive.objects()) as table, contextlib.closing(archive.spans(table)) as spans:
            index = table.find(key)
            if index is None:
                raise ArchiveInvalid(f"{archive.path}: it has no such content")
            row = table.row(index)
            content = decode_content(row)
            reference = Reference.parse(tree.source.reference)
            layers = [layer.digest for layer in archive.info.layers]
            with Registry(reference, mirrors=mirrors_of(reference.registry, mirrors)) as registry:
                blocks = _fetched(registry, layers[content.layer], spans, row, content)
                with objects.create(stored_bytes(row, content)) as file:
                    found, _ = copy_content(_reader(blocks), row.size_bytes, stored_bytes(row, content), content.extents, file)
                    if found != key:
                        raise ContentCorrupt("what comes from there is damaged too")
                    objects.replace(file, key)
                    return ""
    except (OSError, ImageError, CorruptTable) as error:
        for other in trees.trees(objects.descriptor):
            trees.no_longer_whole(objects.descriptor, other.name)
        objects.ledger.unlink(key)
        return str(error)


def _fetched(registry: Registry, digest: str, spans: Spans, row: Row, content: LayerContent) -> Iterator[bytes]:
    """What is stored of an object, out of its layer.  Raises ImageError."""
    begin, end = content.offset, content.offset + stored_bytes(row, content)
    first, last = spans.at(content.layer, begin), spans.at(content.layer, end - 1)
    for number in range(first, last + 1, RUN_SPANS):
        span = spans.run(content.layer, number, min(last, number + RUN_SPANS - 1))
        pieces = registry.stream_range(digest, span.first, span.stop - span.first, timeout_s=FETCH_S)
        at = span.begin
        for block in decompressed(span, pieces):
            if part := block[max(0, begin - at) : max(0, min(end, span.end) - at)]:
                yield part
            at += len(block)


def _row(archives: str, tree: Tree, key: str) -> Row | None:
    """What the image's archive says of an object; None when it cannot be asked."""
    try:
        archive = Archive.open(os.path.join(archives, tree.name + SUFFIX), checked=True)
        with contextlib.closing(archive.objects()) as table:
            index = table.find(key)
            return None if index is None else table.row(index)
    except (OSError, ArchiveInvalid, CorruptTable):
        return None
