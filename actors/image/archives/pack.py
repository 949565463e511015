"""Packs: the chunks of an image that a workload's start needs, in the order wanted, compressed together.

    sha256-….WORKLOAD.pack    head: magic, version, number of chunks, which archive's (`ImageInfo.identity`)
                              of each chunk: its object's row in the archive's table, its number in the object
                              sha256 of all before
                              the chunks' bytes, one after another, as one zstd frame

It is written and read in one go.  The frame is trusted in nothing: each chunk must have the digest that the image's archive has for it.
No I/O but `workloads`.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from backports import zstd

from actors.image.archives.trace import BLOCKS_MAX, Block, Trace
from actors.image.layers.content import CHUNK_BYTES

CHUNKS_MAX = BLOCKS_MAX
SMALL_BYTES = 32 << 20  # up to so much the best compression takes seconds
LEVEL_SMALL, LEVEL = 19, 9
_WINDOW_LOG = 23  # 8 MiB: what a reader needs of memory
_MAGIC = b"AERIEPCK"
_VERSION = 1
_HEAD = struct.Struct("<8sII32s")
_CHECKSUM_BYTES = 32
_INFLATED_BYTES = 128 << 10  # at once


class PackInvalid(Exception):
    """The bytes are no pack of this image, or a damaged one; the text says why."""


class Chunk(NamedTuple):
    """A chunk (`content.chunk_of`) of what is stored of an object."""

    row: int
    number: int


def chunks_of(trace: Trace, numbers: Callable[[Block], Iterable[int]]) -> list[Chunk]:
    """The chunks in which a trace's blocks are, each once, in the order wanted; `numbers` tells those of one block."""
    return list(dict.fromkeys(Chunk(block.row, number) for block in trace.blocks for number in numbers(block)))


def write_pack(identity: str, chunks: Sequence[Chunk], contents: Iterable[bytes]) -> Iterator[bytes]:
    """The bytes of a pack for the archive of that identity ("sha256:…").

    The contents of its chunks are asked for in their order, one at a time.

    Raises ValueError for too many of them.
    """
    if len(chunks) > CHUNKS_MAX:
        raise ValueError(f"a pack of {len(chunks)} chunks; at most {CHUNKS_MAX} are allowed")
    index = array("I", [number for chunk in chunks for number in chunk]).tobytes()
    head = _HEAD.pack(_MAGIC, _VERSION, len(chunks), bytes.fromhex(identity.removeprefix("sha256:"))) + index
    yield head + hashlib.sha256(head).digest()
    level = LEVEL_SMALL if len(chunks) * CHUNK_BYTES <= SMALL_BYTES else LEVEL
    compressor = zstd.ZstdCompressor(
        options={
            zstd.CompressionParameter.compression_level: level,
            zstd.CompressionParameter.window_log: _WINDOW_LOG,
            zstd.CompressionParameter.checksum_flag: 0,
        }
    )
    for content in contents:
        if piece := compressor.compress(content):
            yield piece
    yield compressor.flush()


class Pack:
    """A pack that comes in `pieces`.  Making one reads its head.  Raises PackInvalid, and what the pieces raise."""

    def __init__(self, identity: str, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = bytearray()
        head = self._take(_HEAD.size)
        magic, version, count, image = _HEAD.unpack(head)
        if (magic, version) != (_MAGIC, _VERSION) or count > CHUNKS_MAX:
            raise PackInvalid(f"not a pack of version {_VERSION}")
        if image.hex() != identity.removeprefix("sha256:"):
            raise PackInvalid(f"a pack of sha256:{image.hex()}")
        index = self._take(8 * count)
        if self._take(_CHECKSUM_BYTES) != hashlib.sha256(head + index).digest():
            raise PackInvalid("its head is damaged")
        numbers = array("I", index)
        self.chunks = [Chunk(*pair) for pair in zip(numbers[::2], numbers[1::2], strict=True)]

    def contents(self, size_of: Callable[[Chunk], int]) -> Iterator[tuple[Chunk, bytes]]:
        """The chunks with their contents, NOT verified, as they come; `size_of` tells their sizes.

        Raises PackInvalid when they do not come, and what `size_of` and the pieces raise.
        """
        blocks = self._blocks()
        inflated = bytearray()
        for chunk in self.chunks:
            size = size_of(chunk)
            while len(inflated) < size:
                block = next(blocks, b"")
                if not block:
                    raise PackInvalid("it ends in the middle")
                inflated += block
            yield chunk, bytes(inflated[:size])
            del inflated[:size]

    def _blocks(self) -> Iterator[bytes]:
        decompressor = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG})
        try:
            while not decompressor.eof:
                piece = b""
                if decompressor.needs_input:
                    piece = bytes(self._rest) or next(self._pieces, b"")
                    self._rest.clear()
                    if not piece:
                        return
                if block := decompressor.decompress(piece, _INFLATED_BYTES):
                    yield block
        except zstd.ZstdError as error:
            raise PackInvalid(f"it is damaged: {error}") from None

    def _take(self, size: int) -> bytes:
        while len(self._rest) < size:
            piece = next(self._pieces, b"")
            if not piece:
                raise PackInvalid("it ends in the middle of its head")
            self._rest += piece
        taken = bytes(self._rest[:size])
        del self._rest[:size]
        return taken


def pack_path(directory: str, digest: str, workload: str) -> str:
    """Where the pack of a workload of the image `digest` lies."""
    return os.path.join(directory, f"{digest.replace(':', '-')}.{workload}.pack")


def workloads(directory: str, digest: str) -> set[str]:
    """The workloads that have a pack here.  Raises OSError."""
    pattern = re.compile(re.escape(digest.replace(":", "-")) + r"\.([0-9a-f]{16})\.pack")
    return {found[1] for name in os.listdir(directory) if (found := pattern.fullmatch(name))}
