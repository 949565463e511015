"""Layers that are indexed without being downloaded: those whose table of contents the manifest vouches for.

The manifest's annotations of a layer have the table's digest, so that it is as trustworthy as the layer itself would be; what is fetched
is the table, and for eStargz the footer that says where it is.

    eStargz         `containerd.io/snapshot/stargz/toc.digest` is the digest of the JSON; the layer ends with an empty gzip
                    member of FOOTER_BYTES, whose header has where the member begins in which the JSON is, the one file of a tar
    zstd:chunked    `io.github.containers.zstd-chunked.manifest-checksum` and `.manifest-position` (older tools leave "github."
                    out): digest and place ("offset:length:length of the JSON:1") of a zstd frame of the JSON, in a skippable one

Sources: as of `toc`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from actors.image.errors import ContentCorrupt, Unsupported
from actors.image.layers.content import CHUNK_BYTES
from actors.image.layers.frames import Layout, lay_out
from actors.image.layers.inflate import Checkpoint, inflate_from
from actors.image.layers.stream import Budget, LayerStream
from actors.image.layers.tar import entries
from actors.image.layers.toc import TOC_BYTES_MAX, Chunk, Listed, TocUnusable, parse
from actors.image.layers.zstd import unzstd_from
from actors.image.registry.manifests import Descriptor
from actors.image.registry.repository import Registry

PACKED_BYTES_MAX = 32 << 20  # of a table, as it is fetched
FOOTER_BYTES = 51
_TOC_NAME = b"stargz.index.json"
_STARGZ = "containerd.io/snapshot/stargz/toc.digest"
_CHUNKED = ("io.github.containers.zstd-chunked.", "io.containers.zstd-chunked.")
_POSITION = re.compile(r"(\d{1,18}):(\d{1,9}):(\d{1,9}):1")
_SKIPPABLE_HEAD_BYTES = 8
# RFC 1952: a member with an extra field "SG", and nothing in it.
_FOOTER = re.compile(rb"\x1f\x8b\x08\x04.{6}\x1a\x00SG\x16\x00([0-9a-f]{16})STARGZ\x01\x00\x00\xff\xff\x00{8}", re.DOTALL)


class TabledLayer(NamedTuple):
    """A layer as its table says.  `fetched_bytes` of it have come."""

    listed: list[Listed]
    layout: Layout
    fetched_bytes: int


def has_table(layer: Descriptor) -> bool:
    """Whether the manifest vouches for a table of contents."""
    annotations = layer.annotations or {}
    return _STARGZ in annotations or any(f"{prefix}manifest-checksum" in annotations for prefix in _CHUNKED)


def read_table(registry: Registry, layer: Descriptor, budget: Budget) -> TabledLayer:
    """The layer by its table, if it `has_table`.

    Raises TocUnusable when it must be read as others are, OverBounds, and what `Registry.read_range` raises for a registry that is away.
    """
    for _ in range(2):
        try:
            return _read(registry, layer, budget)
        except _Other as error:
            if not registry.distrust_mirrors():
                raise TocUnusable(str(error)) from None
    raise AssertionError("mirrors can be distrusted once")


class _Other(TocUnusable):
    """What came is not what the manifest means."""


def _read(registry: Registry, layer: Descriptor, budget: Budget) -> TabledLayer:
    annotations = layer.annotations or {}
    for prefix in _CHUNKED:
        if checksum := annotations.get(f"{prefix}manifest-checksum"):
            position = annotations.get(f"{prefix}manifest-position", "")
            return _read_chunked(registry, layer, checksum, position, budget)
    return _read_stargz(registry, layer, annotations[_STARGZ], budget)


def _read_chunked(registry: Registry, layer: Descriptor, checksum: str, position: str, budget: Budget) -> TabledLayer:
    match = _POSITION.fullmatch(position)
    if match is None:
        raise TocUnusable(f"its table of contents is at {position[:100]!r}, which is no place that is known")
    offset, length, table_bytes = map(int, match.groups())
    packed = _fetch(registry, layer, offset, length)
    _check(packed, checksum)
    table = _joined(unzstd_from(iter([packed])), table_bytes)
    listed = parse(table, budget)
    return TabledLayer(listed, lay_out(listed, offset - _SKIPPABLE_HEAD_BYTES), length)


def _read_stargz(registry: Registry, layer: Descriptor, digest: str, budget: Budget) -> TabledLayer:
    end = layer.size - FOOTER_BYTES
    footer = _FOOTER.fullmatch(_fetch(registry, layer, end, FOOTER_BYTES))
    if footer is None:
        raise _Other("it does not end with the footer of eStargz")
    offset = int(footer[1], 16)
    packed = _fetch(registry, layer, offset, end - offset)
    try:
        stream = LayerStream(inflate_from(Checkpoint(8 * offset, 0, b""), iter([packed])), "", budget)
        entry = next(entries(stream, budget), None)
        if entry is None or entry.name != _TOC_NAME or not entry.is_file:
            raise _Other("there is no table of contents where its footer says")
        if entry.stored > TOC_BYTES_MAX:
            raise TocUnusable(f"its table of contents is larger than {TOC_BYTES_MAX} bytes")
        table = stream.read_exactly(entry.stored)
    except (ContentCorrupt, Unsupported) as error:
        raise _Other(f"its table of contents cannot be read: {error}") from None
    _check(table, digest)
    # To who reads the layer it is a file like any other, and so it is here.
    itself = Listed(entry, digest.removeprefix("sha256:"), list(_chunks_of(table, offset, entry.offset)))
    listed = [*parse(table, budget), itself]
    return TabledLayer(listed, lay_out(listed, end), FOOTER_BYTES + len(packed))


def _chunks_of(content: bytes, first: int, inner: int) -> Iterator[Chunk]:
    for at in range(0, len(content), CHUNK_BYTES):
        part = content[at : at + CHUNK_BYTES]
        yield Chunk(first, inner + at, len(part), hashlib.sha256(part).digest())


def _fetch(registry: Registry, layer: Descriptor, offset: int, length: int) -> bytes:
    """Raises TocUnusable for what cannot be in the layer, or is too long."""
    if not (0 < offset < layer.size and 0 < length <= layer.size - offset):
        # By a footer, which anybody may have changed.
        raise _Other("its table of contents is said to be where the layer is not")
    if length > PACKED_BYTES_MAX:
        raise _Other(f"its table of contents is of {length} bytes, at most {PACKED_BYTES_MAX} are read")
    try:
        return registry.read_range(layer.digest, offset, length, only_if_short=True)
    except Unsupported as error:
        raise TocUnusable(str(error)) from None  # its content could not be had by ranges, either
    except ContentCorrupt as error:
        raise _Other(str(error)) from None


def _check(content: bytes, digest: str) -> None:
    found = "sha256:" + hashlib.sha256(content).hexdigest()
    if found != digest:
        raise _Other(f"its table of contents is {found}, the manifest says {digest[:100]}")


def _joined(blocks: Iterable[bytes], size: int) -> bytes:
    """Raises TocUnusable unless they have that size, and one that is taken."""
    if size > TOC_BYTES_MAX:
        raise TocUnusable(f"its table of contents is larger than {TOC_BYTES_MAX} bytes")
    table = bytearray()
    try:
        for block in blocks:
            table += block
            if len(table) > size:
                break
    except ContentCorrupt as error:
        raise TocUnusable(f"its table of contents cannot be read: {error}") from None
    if len(table) != size:
        raise TocUnusable(f"its table of contents is not of {size} bytes, as is announced")
    return bytes(table)
