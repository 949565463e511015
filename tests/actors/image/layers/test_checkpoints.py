"""Reading in the middle of a layer gives what reading it from the beginning gives."""

from __future__ import annotations

import gzip
import itertools
import os
import random
import zlib
from collections.abc import Iterator
from contextlib import closing
from operator import attrgetter
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from zlib_ng import zlib_ng

from actors.image.errors import ContentCorrupt
from actors.image.layers.checkpoints import Checkpoints, CorruptSpans, Spans
from actors.image.layers.content import LayerContent
from actors.image.layers.inflate import SPAN_BYTES, Checkpoint, inflate, inflate_from
from actors.lazytree.table import ObjectTable, Row, write_table

MIB = 1 << 20
WINDOW = 32 << 10


def pieces(data: bytes, size: int = 256 << 10, begin: int = 0) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(begin, len(data), size))


def text(size: int, seed: int = 1) -> bytes:
    """Compressible, with references over all distances."""
    draw = random.Random(seed)
    words = [draw.randbytes(draw.randrange(1, 40)) for _ in range(3000)]
    return b"".join(draw.choices(words, k=size // 15))[:size]


def checkpoints_of(packed: bytes, span_bytes: int = SPAN_BYTES, size: int = 256 << 10) -> tuple[list[Checkpoint], bytes]:
    found: list[Checkpoint] = []
    return found, b"".join(inflate(pieces(packed, size), found.append, span_bytes))


@some.composite
def parts(draw: some.DrawFn) -> bytes:
    """Some bytes of one sort."""
    size = draw(some.integers(0, 30_000))
    match draw(some.sampled_from(["random", "zeros", "text", "repeated"])):
        case "random":
            return random.Random(size).randbytes(size)
        case "zeros":
            return bytes(size)
        case "text":
            return text(size, size)
        case _:
            return draw(some.binary(min_size=1, max_size=50)) * (size // 20)


@some.composite
def members(draw: some.DrawFn) -> tuple[bytes, bytes]:
    """A gzip member, of all sorts of deflate blocks, and what is in it."""
    level = draw(some.integers(0, 9))
    strategy = draw(some.sampled_from([zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY, zlib.Z_FIXED, zlib.Z_RLE]))
    packer = zlib.compressobj(level, zlib.DEFLATED, 31, draw(some.integers(1, 9)), strategy)
    content, packed = b"", b""
    for part in draw(some.lists(parts(), max_size=5)):
        content += part
        packed += packer.compress(part)
        packed += packer.flush(draw(some.sampled_from([zlib.Z_NO_FLUSH, zlib.Z_SYNC_FLUSH, zlib.Z_FULL_FLUSH, zlib.Z_BLOCK])))
    return packed + packer.flush(), content


@settings(max_examples=100, deadline=None)
@given(data=some.data())
def test_from_any_checkpoint_come_the_bytes_that_stand_there(data: some.DataObject) -> None:
    packed = content = b""
    for member, inside in data.draw(some.lists(members(), min_size=1, max_size=4)):
        packed, content = packed + member, content + inside
    packed += bytes(data.draw(some.integers(0, 600)))
    found, whole = checkpoints_of(packed, data.draw(some.integers(1000, 50_000)), data.draw(some.integers(1, 9000)))
    assert whole == content
    assert found[0] == Checkpoint(0, 0, b"")
    assert found == sorted(set(found))
    size, block = data.draw(some.integers(1, 9000)), data.draw(some.integers(1, 9000))
    for checkpoint, following in zip(found, [*found[1:], None], strict=True):
        end, stop = (following.offset, (following.bits + 7) // 8) if following else (len(content), len(packed))
        # No byte of the next span is needed.
        read = b"".join(inflate_from(checkpoint, pieces(packed[:stop], size, checkpoint.bits // 8), block))
        assert read[: end - checkpoint.offset] == content[checkpoint.offset : end]
    checkpoint = data.draw(some.sampled_from(found))
    read = b"".join(inflate_from(checkpoint, pieces(packed, size, checkpoint.bits // 8), block))
    assert read == content[checkpoint.offset :]


def test_spans_are_little_longer_than_they_must_be() -> None:
    content = text(9 * MIB)
    found, whole = checkpoints_of(gzip.compress(content, 6))
    assert whole == content
    lengths = [following.offset - checkpoint.offset for checkpoint, following in itertools.pairwise(found)]
    assert min(lengths) >= SPAN_BYTES
    assert max(lengths) < SPAN_BYTES + 200_000


@pytest.mark.parametrize(
    "content", [text(7 * MIB), random.Random(3).randbytes(7 * MIB), bytes(7 * MIB)], ids=["text", "noise", "zeros"]
)
@pytest.mark.parametrize("level", [1, 2])
def test_a_compressor_that_makes_one_block_of_everything(content: bytes, level: int) -> None:
    found, whole = checkpoints_of(zlib_ng.compress(content, level, 31))
    assert whole == content
    assert (
        max(following.offset - checkpoint.offset for checkpoint, following in itertools.pairwise(found)) <= 2 * SPAN_BYTES + 259
    )


def test_checkpoints_in_the_middle_of_a_block() -> None:
    """Of every kind of block that can be long, between literals and behind matches."""
    content = text(100_000) + bytes(50_000) + random.Random(3).randbytes(50_000)
    for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_FIXED, zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE):
        packer = zlib.compressobj(6, zlib.DEFLATED, 31, 9, strategy)
        packed = packer.compress(content) + packer.flush()
        for size in (100, 1000, 256 << 10):
            found, whole = checkpoints_of(packed, 500, size)
            assert whole == content
            assert sum(1 for checkpoint in found if checkpoint.header) > 50
            for checkpoint in found[::5]:
                read = b"".join(inflate_from(checkpoint, pieces(packed, size, checkpoint.bits // 8)))
                assert read == content[checkpoint.offset :]


def test_damage_is_noticed_in_order_and_is_harmless_from_a_checkpoint() -> None:
    content = text(3 * MIB)
    packed = bytearray(gzip.compress(content, 6))
    found, _ = checkpoints_of(bytes(packed))
    packed[len(packed) // 2] ^= 0x10
    with pytest.raises(ContentCorrupt, match="not whole gzip"):
        checkpoints_of(bytes(packed))
    try:
        read = b"".join(inflate_from(found[1], pieces(bytes(packed), begin=found[1].bits // 8)))
    except ContentCorrupt:
        pass
    else:
        assert read != content[found[1].offset :]


def test_windows_keep_what_is_referred_to_and_no_more() -> None:
    """What is kept is little, and without any of it what comes out is wrong."""
    content = text(3 * MIB)
    packed = gzip.compress(content, 6)
    found, _ = checkpoints_of(packed)
    for checkpoint, following in itertools.pairwise(found[1:]):
        assert checkpoint.window != content[checkpoint.offset - len(checkpoint.window) : checkpoint.offset]
        places = [place for place, byte in enumerate(checkpoint.window) if byte]
        assert len(places) < len(checkpoint.window) * 3 / 4
        for place in random.Random(checkpoint.offset).sample(places, 20):
            window = bytearray(checkpoint.window)
            window[place] ^= 1
            changed = checkpoint._replace(window=bytes(window))
            read = b"".join(inflate_from(changed, pieces(packed, begin=checkpoint.bits // 8)))[:WINDOW]
            mark = 2 * WINDOW - len(checkpoint.window) + place
            if mark >> 8 != mark & 255:  # the others may be kept for what only looks like a reference
                assert read != content[checkpoint.offset : checkpoint.offset + WINDOW]
        assert following.offset > checkpoint.offset


def test_a_gzip_that_ends_in_the_middle() -> None:
    packed = gzip.compress(text(MIB))
    for end in (1, 9, 18, len(packed) // 2, len(packed) - 1):
        with pytest.raises(ContentCorrupt, match="ends in the middle"):
            checkpoints_of(packed[:end])


# --- the section


class Section:
    """Layers and objects in them, written and mapped: `layers` are (compressed or not, the tar)."""

    def __init__(self, home: Path, layers: list[bytes], objects: list[tuple[int, int, int]]) -> None:
        rows = sorted(
            (
                Row(os.urandom(32).hex(), size, msgspec.msgpack.encode(LayerContent(layer, offset)))
                for layer, offset, size in objects
            ),
            key=attrgetter("key"),
        )
        with open(home / "table", "wb") as file:
            write_table(file, rows)
        with closing(Checkpoints(str(home))) as checkpoints, open(home / "spans", "wb") as file:
            for layer in layers:
                size = len(layer)
                if layer.startswith(b"\x1f\x8b"):
                    size = sum(map(len, inflate(pieces(layer), checkpoints.add)))
                checkpoints.end_layer(len(layer), size)
            file.write(b"something else".ljust(4096))
            length = checkpoints.write(file, rows)
        self.table = ObjectTable(str(home / "table"))
        self.spans = Spans(str(home / "spans"), (4096, length), self.table)
        self.layers = layers

    def read(self, layer: int, first: int, last: int) -> bytes:
        span = self.spans.run(layer, first, last)
        packed = self.layers[layer][span.first : span.stop]
        if span.checkpoint is None:
            return packed
        return b"".join(inflate_from(span.checkpoint, iter([packed])))[: span.end - span.begin]

    def close(self) -> None:
        self.spans.close()
        self.table.close()


def test_every_byte_of_every_layer_is_in_one_span(tmp_path: Path) -> None:
    tars = [text(3 * MIB + 17, 1), text(5000, 2), text(4 * MIB, 3), b"", text(MIB, 4)]
    layers = [gzip.compress(tars[0]), gzip.compress(tars[1]), tars[2], gzip.compress(b""), tars[4]]
    with closing(Section(tmp_path, layers, [])) as section:
        spans = section.spans
        for number, tar in enumerate(tars):
            count = spans.count(number)
            assert b"".join(section.read(number, each, each) for each in range(count)) == tar
            for first in range(count):
                begin, _ = spans.bounds(number, first)
                for last in range(first, count):
                    assert section.read(number, first, last) == tar[begin : spans.bounds(number, last)[1]]
            for offset in {0, 1, 4999, MIB - 1, MIB, MIB + 1, len(tar) - 1} & set(range(len(tar))):
                begin, end = spans.bounds(number, spans.at(number, offset))
                assert begin <= offset < end
        assert [spans.count(number) for number in (1, 2, 4)] == [1, 8, 2]


def test_the_objects_of_a_part_of_a_layer(tmp_path: Path) -> None:
    draw = random.Random(7)
    objects, offset = [], 512
    for _ in range(500):
        size = draw.choice([1, 511, 512, 5000, 100_000])
        objects.append((1, offset, size))
        offset += size + -size % 512 + draw.choice([512, 1024, 50_000])
    layers = [bytes(1024), bytes(offset)]
    with closing(Section(tmp_path, layers, [(0, 512, 7), *objects])) as section:
        for _ in range(300):
            begin = draw.randrange(offset)
            end = begin + draw.choice([1, 600, 10_000, 3 * MIB])
            expected = [(at, size) for _, at, size in objects if at < end and at + size > begin]
            found = [(content.offset, row.size_bytes) for _, row, content in section.spans.objects(1, begin, end)]
            assert found == expected
        [(index, row, content)] = section.spans.objects(0, 0, 1024)
        assert (section.table.row(index), content) == (row, LayerContent(0, 512))


def test_a_section_that_is_too_short(tmp_path: Path) -> None:
    with closing(Section(tmp_path, [gzip.compress(text(2 * MIB))], [(0, 512, 100)])) as section:
        for length in (1, 8, 30, 60):
            with pytest.raises(CorruptSpans):
                Spans(str(tmp_path / "spans"), (4096, length), section.table)
