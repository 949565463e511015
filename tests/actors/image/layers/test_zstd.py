"""zstd in one frame or many, with and without tables of contents, from its begin and from any of its checkpoints."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as some

from actors.image.errors import ContentCorrupt
from actors.image.layers.inflate import BLOCK_BYTES, Checkpoint
from actors.image.layers.stream import decompress, decompress_from
from actors.image.layers.zstd import is_zstd, unzstd

TEXT = b"some text that is long enough to be worth compressing. " * 2000
NOISE = random.Random(7).randbytes(3 << 20)


def skippable(content: bytes, number: int = 0) -> bytes:
    """A skippable frame, such as a table of contents is in."""
    return bytes([0x50 + number]) + b"\x2a\x4d\x18" + len(content).to_bytes(4, "little") + content


def pieces(data: bytes, size: int, begin: int = 0) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(begin, len(data), size))


def checkpoints_of(packed: bytes, span: int = 1 << 20, size: int = 10_000) -> tuple[list[Checkpoint], bytes]:
    found: list[Checkpoint] = []
    return found, b"".join(unzstd(pieces(packed, size), found.append, span))


frames = some.one_of(
    some.tuples(some.integers(0, 40_000), some.integers(-5, 9)).map(
        lambda drawn: (zstd.compress(TEXT[: drawn[0]], drawn[1]), TEXT[: drawn[0]])
    ),
    some.integers(0, 40_000).map(lambda size: (zstd.compress(NOISE[:size]), NOISE[:size])),
    some.tuples(some.binary(max_size=300), some.integers(0, 15)).map(lambda drawn: (skippable(*drawn), b"")),
)


@settings(max_examples=150, deadline=None)
@given(some.lists(frames, min_size=1, max_size=12), some.integers(1, 60_000), some.integers(1, 9000), some.integers(1, 9000))
def test_from_any_checkpoint_come_the_bytes_that_stand_there(
    drawn: list[tuple[bytes, bytes]], span: int, size: int, block: int
) -> None:
    packed, content = (b"".join(parts) for parts in zip(*drawn, strict=True))
    found, whole = checkpoints_of(packed, span, size)
    assert whole == content
    assert found[0] == Checkpoint(0, 0, b"")
    assert found == sorted(set(found))
    assert all(after.offset - before.offset >= span for before, after in itertools.pairwise(found))
    for checkpoint, following in zip(found, [*found[1:], None], strict=True):
        end, stop = (following.offset, following.bits // 8) if following else (len(content), len(packed))
        # No byte of the next span is needed, and nothing but this one comes.
        read = b"".join(decompress_from(checkpoint, pieces(packed[:stop], size, checkpoint.bits // 8), block))
        assert read == content[checkpoint.offset : end]


def test_a_single_frame_has_one_checkpoint_and_is_read_from_its_begin() -> None:
    packed = zstd.compress(NOISE * 3)
    found, whole = checkpoints_of(packed)
    assert whole == NOISE * 3
    assert found == [Checkpoint(0, 0, b"")]


def test_frames_of_all_sizes_make_spans_of_a_mebibyte() -> None:
    """As of zstd:chunked: a frame for each file, and the table of contents in the last, skippable one."""
    sizes = [random.Random(number).randrange(1, 40_000) for number in range(400)]
    packed = b"".join(zstd.compress(NOISE[:size]) for size in sizes) + skippable(b"{}" * 500)
    found, whole = checkpoints_of(packed)
    assert whole == b"".join(NOISE[:size] for size in sizes)
    lengths = [after.offset - before.offset for before, after in itertools.pairwise(found)]
    assert 1 << 20 <= min(lengths) <= max(lengths) < (1 << 20) + 40_000


def test_a_layer_that_begins_with_a_skippable_frame_is_zstd() -> None:
    packed = skippable(b"seek table") + zstd.compress(TEXT)
    for size in (1, 3, 1000):
        assert b"".join(decompress(pieces(packed, size), lambda _: None)) == TEXT
    assert is_zstd(packed)
    assert not is_zstd(TEXT)
    assert not is_zstd(b"")


def test_blocks_are_bounded_however_much_a_piece_unpacks_to() -> None:
    bomb = zstd.compress(bytes(200 << 20))
    assert len(bomb) < 20_000
    sizes = [len(block) for block in decompress(iter([bomb]), lambda _: None)]
    assert (max(sizes), sum(sizes)) == (BLOCK_BYTES, 200 << 20)


def test_a_frame_that_wants_more_memory_than_there_is_for_it_is_refused() -> None:
    long = {zstd.CompressionParameter.window_log: 28, zstd.CompressionParameter.enable_long_distance_matching: 1}
    packer = zstd.ZstdCompressor(options=long)
    packed = packer.compress(TEXT) + packer.flush()
    with pytest.raises(ContentCorrupt, match="not whole zstd"):
        checkpoints_of(packed)


@pytest.mark.parametrize(
    ("packed", "text"),
    [
        (zstd.compress(TEXT)[:-1], "ends in the middle"),
        (zstd.compress(TEXT)[:20], "ends in the middle"),
        (zstd.compress(TEXT)[:4], "ends in the middle"),
        (zstd.compress(TEXT) + zstd.compress(TEXT)[:50], "ends in the middle"),
        (zstd.compress(TEXT) + skippable(b"123")[:-1], "ends in the middle"),
        (zstd.compress(TEXT) + b"garbage", "not whole zstd"),
        (zstd.compress(TEXT) + bytes(512), "not whole zstd"),
        (b"\x28\xb5\x2f\xfd" + bytes(100), "ends in the middle"),
    ],
)
def test_damaged_zstd_is_refused(packed: bytes, text: str) -> None:
    for size in (1, 100, 1 << 20):
        with pytest.raises(ContentCorrupt, match=text):
            checkpoints_of(packed, size=size)


CHECKED = {zstd.CompressionParameter.checksum_flag: 1}


@given(some.integers(0, len(zstd.compress(TEXT, options=CHECKED)) - 1), some.integers(1, 255))
def test_any_damage_is_an_error_or_the_same_content(at: int, change: int) -> None:
    packed = bytearray(zstd.compress(TEXT, options=CHECKED))
    packed[at] ^= change
    try:
        assert b"".join(decompress(iter([bytes(packed)]), lambda _: None)) in (TEXT, b"", bytes(packed))
    except ContentCorrupt:
        pass
