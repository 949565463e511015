"""A layer on its way from the registry: compressed pieces in, the bytes of the tar out, both digests verified, bounds kept.

    blob pieces → Verified (size and digest of the manifest) → decompress → LayerStream (diff_id of the config, bounds)

All of it is pulled by whoever reads the LayerStream, a block at a time: memory does not grow with the layer.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator

from actors.image.errors import ContentCorrupt, OverBounds
from actors.image.layers.inflate import BLOCK_BYTES, Checkpoint, inflate, inflate_from
from actors.image.layers.zstd import MAGIC, is_zstd, unzstd, unzstd_from
from actors.image.registry.manifests import Descriptor

_GZIP_MAGIC = b"\x1f\x8b"
_METADATA_SIZE_MAX = 256 << 20  # names, attributes and maps of sparse files: what the builder keeps in memory


class Budget:
    """What an image may still take.  The bounds are absolute: no ratio tells a bomb from a log file.

    `unpacked_bytes_max` is of all layers, decompressed (holes of sparse files are not in there); `entries_max` of files,
    directories and whiteouts in all layers, directories that are only implied included.
    """

    def __init__(self, unpacked_bytes_max: int, entries_max: int) -> None:
        self.unpacked_bytes = 0
        self.entries = 0
        self._metadata_bytes = 0
        self._unpacked_bytes_max = unpacked_bytes_max
        self._entries_max = entries_max

    def take_bytes(self, count: int) -> None:
        """`count` decompressed bytes more.  Raises OverBounds."""
        self.unpacked_bytes += count
        if self.unpacked_bytes > self._unpacked_bytes_max:
            raise OverBounds(f"the image unpacks to more than {self._unpacked_bytes_max} bytes, the bound on this node")

    def take_entry(self) -> None:
        """One entry more.  Raises OverBounds."""
        self.entries += 1
        if self.entries > self._entries_max:
            raise OverBounds(f"the image has more than {self._entries_max} entries, the bound on this node")

    def take_metadata(self, count: int) -> None:
        """`count` bytes of extended headers more.  Raises OverBounds."""
        self._metadata_bytes += count
        if self._metadata_bytes > _METADATA_SIZE_MAX:
            raise OverBounds(f"the image has more than {_METADATA_SIZE_MAX} bytes of names and attributes")


class Verified:
    """A blob's pieces, handed on as they come; after the last one their digest is known to be right."""

    def __init__(self, pieces: Iterator[bytes], blob: Descriptor) -> None:
        self._pieces = pieces
        self._blob = blob
        self._hash = hashlib.sha256()
        self.size = 0  # bytes so far

    def __iter__(self) -> Verified:
        return self

    def __next__(self) -> bytes:
        """Raises ContentCorrupt at the end of what is not the blob, or as soon as it is too long."""
        piece = next(self._pieces, b"")
        self.size += len(piece)
        self._hash.update(piece)
        if self.size > self._blob.size:
            raise self._corrupt(f"it is longer than {self._blob.size} bytes")
        if piece:
            return piece
        if self.size < self._blob.size:
            raise self._corrupt(f"it ends after {self.size} of {self._blob.size} bytes")
        if "sha256:" + self._hash.hexdigest() != self._blob.digest:
            raise self._corrupt(f"its digest is sha256:{self._hash.hexdigest()}")
        raise StopIteration

    def _corrupt(self, why: str) -> ContentCorrupt:
        return ContentCorrupt(f"the registry's copy of {self._blob.digest} is damaged: {why}; push the image again")


def decompress(pieces: Iterator[bytes], checkpoint: Callable[[Checkpoint], None]) -> Iterator[bytes]:
    """The bytes of a layer, in blocks of at most BLOCK_BYTES: decompressed if they are gzip or zstd (which media types do not tell).

    `checkpoint` is called with those of a compressed layer.  Raises ContentCorrupt.
    """
    first, pieces = _peek(pieces)
    if is_zstd(first):
        return unzstd(pieces, checkpoint)
    return inflate(pieces, checkpoint) if first.startswith(_GZIP_MAGIC) else pieces


def decompress_from(checkpoint: Checkpoint, pieces: Iterator[bytes], block_bytes: int = BLOCK_BYTES) -> Iterator[bytes]:
    """The decompressed bytes from a checkpoint on, in blocks of at most `block_bytes`, to the end of the pieces.

    The pieces begin with the byte in which the checkpoint's first bit is.  Raises ContentCorrupt for what is not compressed; that it
    is the right content is for the taker to check.
    """
    if not checkpoint.window:
        first, pieces = _peek(pieces)
        if is_zstd(first):
            return unzstd_from(pieces, block_bytes)
    return inflate_from(checkpoint, pieces, block_bytes)


def _peek(pieces: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """Enough of the first bytes to know their format by, and all of them again."""
    first = next(pieces, b"")
    while 0 < len(first) < len(MAGIC) and (more := next(pieces, b"")):
        first += more
    return first, itertools.chain([first], pieces)


class LayerStream:
    """The decompressed bytes of one layer, in order; `offset` counts them."""

    def __init__(self, blocks: Iterator[bytes], diff_id: str, budget: Budget) -> None:
        self.offset = 0
        self._blocks = blocks
        self._diff_id = diff_id
        self._budget = budget
        self._hash = hashlib.sha256()
        self._block = b""
        self._start = 0  # of what is unread in it

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer only at the end of the layer.  Raises ContentCorrupt, OverBounds."""
        end = self._start + size
        if end <= len(self._block):
            data = self._block[self._start : end]
            self._start = end
        else:
            parts = [self._block[self._start :]]
            wanted = size - len(parts[0])
            while wanted and self._advance():
                parts.append(self._block[:wanted])
                self._start = len(parts[-1])
                wanted -= self._start
            data = b"".join(parts)
        self.offset += len(data)
        return data

    def read_exactly(self, size: int) -> bytes:
        """The next `size` bytes.  Raises ContentCorrupt when the layer has no more so many, OverBounds."""
        data = self.read(size)
        if len(data) < size:
            raise ContentCorrupt(f"a layer's tar ends in the middle, at byte {self.offset}")
        return data

    def skip(self, size: int) -> None:
        """Pass over `size` bytes.  Raises as `read_exactly`."""
        while size > 0:
            size -= len(self.read_exactly(min(size, BLOCK_BYTES)))

    def finish(self) -> None:
        """Read to the end and verify everything.  Raises ContentCorrupt, OverBounds."""
        self.offset += len(self._block) - self._start
        while self._advance():
            self.offset += len(self._block)
        if "sha256:" + self._hash.hexdigest() != self._diff_id:
            raise ContentCorrupt(f"a layer unpacks to sha256:{self._hash.hexdigest()}, the image's config says {self._diff_id}")

    def _advance(self) -> bool:
        self._block, self._start = next(self._blocks, b""), 0
        self._hash.update(self._block)
        self._budget.take_bytes(len(self._block))
        return bool(self._block)
