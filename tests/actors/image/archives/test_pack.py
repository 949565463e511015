"""The format of packs: what comes out is what went in, in any pieces; what is damaged, cut or another image's is refused."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from actors.image.archives.pack import CHUNKS_MAX, Chunk, Pack, PackInvalid, chunks_of, write_pack
from actors.image.archives.trace import BLOCK_BYTES, Block, Trace
from actors.image.layers.content import CHUNK_BYTES

DIGEST = "sha256:" + "ab" * 32
OTHER = "sha256:" + "cd" * 32


def content(chunk: Chunk) -> bytes:
    draw = random.Random(chunk.row * 1000 + chunk.number)
    return draw.randbytes(40) * draw.randrange(1, 400)


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    return iter([data[at : at + size] for at in range(0, len(data), size)])


def packed(chunks: list[Chunk], digest: str = DIGEST) -> bytes:
    return b"".join(write_pack(digest, chunks, map(content, chunks)))


def read(data: bytes, size: int = 1000, digest: str = DIGEST) -> list[tuple[Chunk, bytes]]:
    return list(Pack(digest, pieces(data, size)).contents(lambda chunk: len(content(chunk))))


CHUNKS = some.lists(some.builds(Chunk, some.integers(0, 50), some.integers(0, 9)), max_size=12, unique=True)


@settings(max_examples=12)
@given(CHUNKS, some.integers(1, 5000))
def test_a_pack_is_read_as_it_was_written(chunks: list[Chunk], size: int) -> None:
    assert read(packed(chunks), size) == [(chunk, content(chunk)) for chunk in chunks]


def test_a_pack_that_is_cut_never_gives_more_than_there_was() -> None:
    chunks = [Chunk(number, 0) for number in range(5)]
    whole = packed(chunks)
    for end in range(0, len(whole) - 10, 7):
        check_cut(whole[:end], chunks)


def check_cut(data: bytes, chunks: list[Chunk]) -> None:
    got: list[tuple[Chunk, bytes]] = []
    with pytest.raises(PackInvalid):
        pack = Pack(DIGEST, pieces(data, 100))
        got.extend(pack.contents(lambda chunk: len(content(chunk))))
    assert got == [(chunk, content(chunk)) for chunk in chunks[: len(got)]]


@pytest.mark.parametrize("at", [0, 9, 13, 20, 50, 100], ids=["magic", "version", "count", "digest", "index", "checksum"])
def test_a_damaged_head_is_refused(at: int) -> None:
    whole = bytearray(packed([Chunk(number, 1) for number in range(7)]))
    whole[at] ^= 1
    with pytest.raises(PackInvalid):
        Pack(DIGEST, pieces(bytes(whole), 64))


def test_another_image_s_pack_is_refused() -> None:
    with pytest.raises(PackInvalid, match=OTHER):
        read(packed([Chunk(1, 1)], OTHER))


def test_a_frame_that_wants_much_memory_is_refused() -> None:
    from backports import zstd

    head = packed([Chunk(1, 1)])
    head = head[: 48 + 8 + 32]
    wide = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 27})
    frame = wide.compress(bytes(200 << 20), zstd.ZstdCompressor.FLUSH_BLOCK)
    with pytest.raises(PackInvalid, match="damaged"):
        read(head + frame)


def test_a_pack_has_a_bound() -> None:
    with pytest.raises(ValueError, match="16385 chunks"):
        next(write_pack(DIGEST, [Chunk(0, number) for number in range(CHUNKS_MAX + 1)], []))


@pytest.mark.parametrize(
    ("blocks", "chunks"),
    [
        ([], []),
        ([(7, 0), (7, 1), (7, 3)], [(7, 0)]),
        ([(7, 9), (8, 0), (7, 1), (7, 8)], [(7, 2), (8, 0), (7, 0)]),
    ],
)
def test_a_trace_s_chunks_come_once_in_the_order_wanted(blocks: list[tuple[int, int]], chunks: list[tuple[int, int]]) -> None:
    assert (
        chunks_of(Trace([Block(*block) for block in blocks]), lambda block: [block.block * BLOCK_BYTES // CHUNK_BYTES])
        == chunks
    )
