"""zstd, decompressed in order with a checkpoint at a frame's begin every so often, and again from any of them on.

A frame (RFC 8878) can be read by itself, and from its begin only: of a layer that is one frame, as many tools write it, everything up to
what is wanted must be read.  Layers of the kinds zstd:chunked and "seekable" have a frame for each file or chunk.  Their tables of
contents, in skippable frames at the end, are for who does not want to read all of the layer (`tabled`).

The decompressor is that of Python 3.14's standard library, by its backport.  GIL-free; a decompressor is one thread's at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from backports.zstd import DecompressionParameter, ZstdDecompressor, ZstdError

from actors.image.errors import ContentCorrupt
from actors.image.layers.inflate import BLOCK_BYTES, SPAN_BYTES, Checkpoint

MAGIC = b"\x28\xb5\x2f\xfd"
WINDOW_LOG_MAX = 27  # 128 MiB of memory, which zstd --long wants and libzstd takes unless it is told otherwise
_SKIPPABLE = b"\x2a\x4d\x18"  # behind a byte from 0x50 to 0x5f
_SLICE_BYTES = 32 << 10  # fed at once: what a frame leaves of it is copied, and there may be a frame for each file


def is_zstd(first: bytes) -> bool:
    """Whether a layer that begins so (4 bytes at least) is zstd."""
    return first.startswith(MAGIC) or (first[1:4] == _SKIPPABLE and first[0] & 0xF0 == 0x50)


def unzstd(pieces: Iterator[bytes], checkpoint: Callable[[Checkpoint], None], span_bytes: int = SPAN_BYTES) -> Iterator[bytes]:
    """The decompressed bytes of all frames, in blocks of at most BLOCK_BYTES; `checkpoint` is called with each, the one at 0 first.

    Skippable frames are passed over.  Raises ContentCorrupt.
    """
    last = produced = 0
    checkpoint(Checkpoint(0, 0, b""))
    for begin, block in _frames(pieces, BLOCK_BYTES):
        if begin is not None and produced - last >= span_bytes:
            last = produced
            checkpoint(Checkpoint(8 * begin, produced, b""))
        if block:
            produced += len(block)
            yield block


def unzstd_from(pieces: Iterator[bytes], block_bytes: int = BLOCK_BYTES) -> Iterator[bytes]:
    """The decompressed bytes of frames, the first of which begins with the pieces.  Raises ContentCorrupt."""
    for _, block in _frames(pieces, block_bytes):
        if block:
            yield block


def _frames(pieces: Iterator[bytes], block_bytes: int) -> Iterator[tuple[int | None, bytes]]:
    """The output, block by block; before that of each frame, where the frame begins in the input, and nothing."""
    slices = (piece[at : at + _SLICE_BYTES] for piece in pieces for at in range(0, len(piece), _SLICE_BYTES))
    data, consumed = next(slices, b""), 0  # what is not fed yet, and how much was fed before it
    while data:
        yield consumed, b""
        frame = ZstdDecompressor(options={DecompressionParameter.window_log_max: WINDOW_LOG_MAX})
        while not frame.eof:
            if frame.needs_input and not data:
                raise ContentCorrupt("a layer's zstd ends in the middle")
            try:
                block = frame.decompress(data, block_bytes)
            except ZstdError as error:
                raise ContentCorrupt(f"a layer is not whole zstd: {error}") from None
            consumed += len(data)
            data = b""
            yield None, block
            if frame.eof:
                data = frame.unused_data
                consumed -= len(data)
            elif frame.needs_input:
                data = next(slices, b"")
        data = data or next(slices, b"")
