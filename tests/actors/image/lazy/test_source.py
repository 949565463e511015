"""An image's content fetched from a real registry as it is read, through a proxy that counts and misbehaves."""

from __future__ import annotations

import gzip
import itertools
import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import trio
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as some

import actors.image.lazy.spool as spool_module
from actors.image.layers.content import decode_content, stored_bytes
from actors.image.lazy.flights import AHEAD_SPANS
from actors.image.lazy.held import parts
from actors.image.lazy.readahead import GROUP_SPANS
from actors.image.lazy.spool import Spool, create
from actors.lazytree.objects import Objects
from actors.lazytree.server import SourceError
from tests.actors.image.images import Repository, RunningRegistry, member, tar
from tests.actors.image.lazy.image import Image, damaged, give_up, landed, read, running, until
from tests.actors.image.proxy import Proxy, held, silent, stall, status, throttle
from tests.actors.lazytree.test_bounds import wait_for

MIB = 1 << 20

pytestmark = pytest.mark.usefixtures("unhurried")


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def prose(size: int, seed: int = 0) -> bytes:
    draw = random.Random(seed)
    words = [draw.randbytes(draw.randrange(1, 30)) for _ in range(2000)]
    return b"".join(draw.choices(words, k=size // 12 + 9))[:size]


SMALL = {f"etc/{number}": prose(1 + 37 * number, number) for number in range(60)}
FILES = {
    "usr/noise": noise(5 * MIB + 17),
    "usr/prose": prose(6 * MIB + 1),
    "usr/zeros": bytes(3 * MIB),
    **SMALL,
    "usr/last": noise(MIB, 1),
}
PLAIN = {"plain/a": noise(3 * MIB + 5, 2), "plain/b": prose(700, 3), "plain/c": noise(2 * MIB, 4)}

FRAMES = {"z/a": prose(3 * MIB + 9, 7), "z/b": noise(2 * MIB + 11, 8), "z/c": prose(900, 9)}
FRAME = {"y/a": noise(MIB + 13, 10), "y/b": prose(2 * MIB + 15, 11)}


def layer(files: dict[str, bytes]) -> bytes:
    return tar(*(member(name, content) for name, content in files.items()))


@pytest.fixture
def proxy(registry: RunningRegistry) -> Iterator[Proxy]:
    """One for each test: what an earlier one has left on its way is not counted in it."""
    with Proxy(registry.address) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def pushed(registry: RunningRegistry) -> Repository:
    """A layer in one gzip member, one that is plain, one in many members, one with a sparse file in it, and zstd in many frames and one."""
    repository = registry.repository("lazysource")
    layers = [layer(FILES), layer(PLAIN), layer({"m/big": prose(4 * MIB, 5)}), sparse_layer(), layer(FRAMES), layer(FRAME)]
    members = b"".join(gzip.compress(layers[2][at : at + 300_000], 6, mtime=0) for at in range(0, len(layers[2]), 300_000))
    blobs = [gzip.compress(layers[0], 6, mtime=0), layers[1], members, gzip.compress(layers[3], 6, mtime=0)]
    blobs.append(b"".join(zstd.compress(layers[4][at : at + 70_000]) for at in range(0, len(layers[4]), 70_000)))
    blobs.append(zstd.compress(layers[5]))
    repository.push(*layers, blobs=blobs)
    return repository


@pytest.fixture
def image(tmp_path: Path, pushed: Repository, proxy: Proxy) -> Iterator[Image]:
    with closing(Image(tmp_path, pushed, proxy)) as image:
        yield image


EXTENTS = [(4096, 1000), (2 * MIB, MIB), (4 * MIB - 1, 600_000)]
SPARSE_SIZE = 9 * MIB + 3
SPARSE_DATA = noise(sum(length for _, length in EXTENTS), 6)


def sparse_layer() -> bytes:
    numbers = ",".join(f"{offset},{length}" for offset, length in EXTENTS)
    headers = {"GNU.sparse.size": str(SPARSE_SIZE), "GNU.sparse.name": "sparse", "GNU.sparse.map": numbers}
    return tar(member("sparse", SPARSE_DATA, pax_headers=headers))


def sparse_content() -> bytes:
    content, at = bytearray(SPARSE_SIZE), 0
    for offset, length in EXTENTS:
        content[offset : offset + length] = SPARSE_DATA[at : at + length]
        at += length
    return bytes(content)


CONTENTS = [*FILES.values(), *PLAIN.values(), prose(4 * MIB, 5), sparse_content(), *FRAMES.values(), *FRAME.values()]
assert len({len(content) for content in CONTENTS}) == len(CONTENTS)  # a size tells which it is


def by_size(image: Image, content: bytes) -> int:
    return image.find(len(content))


def test_every_file_is_read_and_every_byte_moves_once(image: Image) -> None:
    whole: list[int] = []
    source = image.source(completed=whole.extend)

    async def body() -> None:
        for content in CONTENTS:
            index = by_size(image, content)
            for offset in range(0, len(content), MIB):
                assert (
                    await read(image, source, index, offset, min(MIB, len(content) - offset)) == content[offset : offset + MIB]
                )
        await all_whole(image, whole)

    running(source, body)
    # What one span ends with is what the next begins with: one byte of compressed data.
    for number, info in enumerate(image.archive.info.layers):
        seen = image.proxy.seen(f"/blobs/{info.digest}")
        moved = sum(exchange.body_bytes for exchange in seen)
        assert moved <= info.size_bytes + len(seen), number
    assert sorted(set(whole)) == list(range(len(image.table)))


async def all_whole(image: Image, whole: list[int]) -> None:
    """What is read ahead is read out of the spool before it has landed, and is said to be whole a moment later."""
    await until(lambda: len(set(whole)) == len(image.table))


@settings(max_examples=60, deadline=None)
@given(seed=some.integers())
def test_any_part_of_any_file_is_read_in_any_order(shared: Image, seed: int) -> None:
    draw = random.Random(seed)
    descriptor = create(shared.objects_directory)
    before, shared.spool = shared.spool, descriptor
    try:
        source = shared.source(spool_bytes_max=draw.choice([0, 3 * MIB, 1 << 30]))
        wanted = []
        for _ in range(draw.randrange(1, 8)):
            content = draw.choice(CONTENTS)
            offset = draw.randrange(len(content))
            wanted.append((content, offset, min(len(content) - offset, draw.choice([1, 4096, 70_000, MIB, 2 * MIB]))))

        async def one(content: bytes, offset: int, size: int) -> None:
            assert await read(shared, source, by_size(shared, content), offset, size) == content[offset : offset + size]

        async def body() -> None:
            async with trio.open_nursery() as nursery:
                for each in wanted:
                    if draw.random() < 0.5:
                        nursery.start_soon(one, *each)
                    else:
                        await one(*each)

        running(source, body)
    finally:
        shared.spool = before
        give_up(descriptor)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, pushed: Repository, registry: RunningRegistry) -> Iterator[Image]:
    with Proxy(registry.address) as proxy, closing(Image(tmp_path_factory.mktemp("shared"), pushed, proxy)) as image:
        yield image


def test_many_readers_of_one_cold_file_fetch_it_once(image: Image) -> None:
    content = FILES["usr/noise"]
    index = by_size(image, content)
    source = image.source()
    image.proxy.on("/blobs/", throttle(20e6))

    async def one(offset: int) -> None:
        assert await read(image, source, index, offset, 50_000) == content[offset : offset + 50_000]

    async def body() -> None:
        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(one, (number * 49_999) % (len(content) - 50_000))

    running(source, body)
    ranges = image.ranges()
    assert all(stop <= begin + 1 for (_, stop), (begin, _) in itertools.pairwise(ranges))
    assert image.moved_bytes() < len(content) * 1.3


def test_readers_of_different_files_in_one_span_fetch_it_once(image: Image) -> None:
    source = image.source()

    async def one(content: bytes) -> None:
        assert await read(image, source, by_size(image, content)) == content

    async def body() -> None:
        async with trio.open_nursery() as nursery:
            for content in SMALL.values():
                nursery.start_soon(one, content)

    running(source, body)
    ranges = image.ranges()
    assert all(stop <= begin + 1 for (_, stop), (begin, _) in itertools.pairwise(ranges))
    wanted = [decode_content(image.table.row(by_size(image, content))) for content in SMALL.values()]
    spans = {image.spans.at(content.layer, content.offset) for content in wanted}
    assert len(ranges) <= len(spans) + GROUP_SPANS // AHEAD_SPANS  # and what lies beside them


def test_a_part_of_a_big_file_moves_little(image: Image) -> None:
    source = image.source()
    content = FILES["usr/noise"]

    async def body() -> None:
        assert (
            await read(image, source, by_size(image, content), 2 * MIB + 500_000, 65_536)
            == content[2 * MIB + 500_000 : 2 * MIB + 565_536]
        )

    running(source, body)
    assert image.moved_bytes() < 3.3 * MIB


@pytest.mark.parametrize("name", ["usr/noise", "usr/prose", "plain/a"])
def test_damaged_content_is_an_error_and_never_bytes_and_read_again_when_it_is_right(image: Image, name: str) -> None:
    content = (FILES | PLAIN)[name]
    index = by_size(image, content)
    source = image.source()
    image.proxy.on("/blobs/", damaged)

    async def body() -> None:
        right = 0
        for offset in range(0, len(content), 300_000):
            size = min(300_000, len(content) - offset)
            try:
                assert await read(image, source, index, offset, size) == content[offset : offset + size]
                right += 1
            except SourceError as error:
                assert "is damaged" in error.reason
                assert str(image.reference) in error.reason
        assert right < len(content) / 300_000
        image.proxy.behave()
        assert await read(image, source, index) == content

    running(source, body)


@pytest.mark.parametrize("name", ["usr/prose", "plain/a"])
def test_what_is_damaged_on_its_way_here_is_fetched_once_more(image: Image, name: str) -> None:
    content = (FILES | PLAIN)[name]
    source = image.source()
    image.proxy.on("/blobs/", damaged, times=1)

    async def body() -> None:
        assert await read(image, source, by_size(image, content)) == content

    running(source, body)


@pytest.mark.parametrize("name", ["usr/prose", "plain/a"])
def test_what_a_mirror_damages_comes_from_the_registry(image: Image, registry: RunningRegistry, name: str) -> None:
    content = (FILES | PLAIN)[name]
    with Proxy(registry.address) as mirror:
        mirror.on("/blobs/", damaged)
        source = image.source(mirrors=[f"http://{mirror.address}"])

        async def body() -> None:
            assert await read(image, source, by_size(image, content)) == content

        running(source, body)
        assert mirror.seen("/blobs/")
    assert image.ranges()


@pytest.mark.parametrize(
    ("code", "text"), [(404, "has lost"), (500, "answers 500"), (401, "docker login"), (416, "ends before byte")]
)
def test_a_registry_that_refuses_is_the_reason(image: Image, code: int, text: str) -> None:
    source = image.source()
    image.proxy.on("/blobs/", status(code))

    async def body() -> None:
        with pytest.raises(SourceError, match=text) as caught:
            await read(image, source, by_size(image, SMALL["etc/3"]))
        assert str(image.reference) in caught.value.reason

    running(source, body)


def test_stuck_ranges_delay_nobody_who_has_what_he_needs(image: Image) -> None:
    source = image.source()
    ready = FILES["usr/last"]
    ended: list[bytes] = []

    async def stuck(content: bytes) -> None:
        await read(image, source, by_size(image, content))
        ended.append(content)

    async def body() -> float:
        assert await read(image, source, by_size(image, ready)) == ready
        await landed(source)
        image.proxy.forget()
        image.proxy.on("/blobs/", silent())
        took_s: list[float] = []
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                for content in (FILES["usr/noise"], FILES["usr/prose"], *PLAIN.values()):
                    nursery.start_soon(stuck, content)
            await until(lambda: len(image.proxy.seen("/blobs/")) >= 4)
            for _ in range(20):
                begin = time.perf_counter()
                assert await read(image, source, by_size(image, ready)) == ready
                took_s.append(time.perf_counter() - begin)
            assert not ended
            nursery.cancel_scope.cancel()
        return sorted(took_s)[len(took_s) // 2]

    assert running(source, body) < 2  # on a busy machine; nothing here waits for a range, which would take a minute


def test_a_fetch_nobody_waits_for_is_given_up_and_begun_again(image: Image) -> None:
    source = image.source()
    content = SMALL["etc/7"]
    image.proxy.on("/blobs/", silent(), times=1)

    async def body() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, image, source, by_size(image, content))
            await until(lambda: image.proxy.seen("/blobs/"))
            nursery.cancel_scope.cancel()
        with trio.fail_after(30):  # what was asked for first would be asked for again after a minute
            assert await read(image, source, by_size(image, content)) == content

    running(source, body)


def test_a_successor_on_the_same_spool_fetches_nothing_again(image: Image) -> None:
    whole: list[int] = []
    content = FILES["usr/noise"]
    index = by_size(image, content)

    async def first() -> None:
        assert await read(image, source, index, 0, 3 * MIB) == content[: 3 * MIB]
        assert await read(image, source, by_size(image, PLAIN["plain/b"])) == PLAIN["plain/b"]
        await landed(source)

    source = image.source()
    running(source, first)
    image.proxy.forget()
    image.proxy.on("/blobs/", status(500))
    source = image.source(completed=whole.extend)

    async def second() -> None:
        assert await read(image, source, index, MIB // 2, 2 * MIB) == content[MIB // 2 : MIB // 2 + 2 * MIB]
        await source.inherited()

    running(source, second)
    assert image.ranges() == []
    assert by_size(image, PLAIN["plain/b"]) in whole
    assert index not in whole
    image.proxy.behave()
    whole.clear()

    async def third() -> None:
        assert await read(image, source, index) == content
        await until(lambda: index in whole)  # which is said when all has landed that came with its end

    running(source, third)
    assert image.moved_bytes() < 4 * MIB


def test_what_is_whole_is_published_and_read_from_objects(image: Image) -> None:
    whole: list[int] = []
    source = image.source(completed=whole.extend)

    async def body() -> None:
        for content in CONTENTS:
            await read(image, source, by_size(image, content))
        await all_whole(image, whole)
        taken = image.publish(*set(whole))
        assert sorted(taken) == sorted(set(whole)) == list(range(len(image.table)))
        await source.taken(taken)
        image.proxy.on("/blobs/", status(500))
        for content in CONTENTS:
            assert await read(image, source, by_size(image, content)) == content

    running(source, body)
    assert os.fstat(image.spool).st_blocks == 0
    for content in CONTENTS:
        row = image.table.row(by_size(image, content))
        path = Path(image.objects_directory) / Objects.path(row.key)
        assert path.read_bytes() == content
        assert path.stat().st_mode & 0o7777 == 0o444
    sparse = Path(image.objects_directory) / Objects.path(image.table.row(image.find(SPARSE_SIZE)).key)
    assert sparse.stat().st_blocks * 512 < SPARSE_SIZE / 2


def test_what_leaves_objects_is_fetched_again(image: Image) -> None:
    whole: list[int] = []
    source = image.source(completed=whole.extend)
    content = FILES["usr/last"]
    index = by_size(image, content)

    async def body() -> None:
        await read(image, source, index)
        await until(lambda: index in whole)
        await source.taken(image.publish(*whole))
        os.unlink(Path(image.objects_directory) / Objects.path(image.table.row(index).key))
        assert await read(image, source, index) == content

    running(source, body)


def test_wrong_content_is_not_published_and_nor_is_what_is_not_there(image: Image) -> None:
    index, other = by_size(image, FILES["usr/last"]), by_size(image, SMALL["etc/5"])
    spool = Spool(image.spool, image.spans)
    row = image.table.row(index)
    spool.write(spool.place(decode_content(row)), memoryview(noise(MIB, 99)))
    assert image.publish(index, other, 10**9) == [index, other, 10**9]
    assert not image.objects.has(row.key)
    assert not image.objects.has(image.table.row(other).key)


def test_what_was_taken_and_not_published_stays_for_who_reads_it(
    tmp_path: Path, registry: RunningRegistry, proxy: Proxy
) -> None:
    """Given up under a fetch that goes on, it would be torn where the page was half written, and the registry blamed for it."""
    content, chunk = noise(MIB, 11), 256 << 10
    repository = registry.repository("taken")
    repository.push(tar(member("before", noise(62_464, 12)), member("after", content)))  # so that pieces end in pages
    come = threading.Event()

    with closing(Image(tmp_path, repository, proxy)) as image:
        source = image.source()
        index = by_size(image, content)
        written = Spool(image.spool, image.spans)
        place = written.place(decode_content(image.table.row(index)))
        proxy.on("/blobs/", held(320 << 10, come))

        async def body() -> None:
            async with trio.open_nursery() as nursery:

                async def reading() -> None:
                    assert await read(image, source, index, chunk, chunk) == content[chunk : 2 * chunk]

                nursery.start_soon(reading)
                try:
                    await trio.to_thread.run_sync(wait_for, lambda: written.has(place + chunk, 1))
                    assert not written.has(place + chunk + 4096, 1)
                    await source.taken([index])
                finally:
                    come.set()

        running(source, body)


def test_the_spool_is_held_to_its_bound_and_reads_go_on(image: Image) -> None:
    bound = 4 * MIB
    source = image.source(spool_bytes_max=bound)
    most = 0

    async def body() -> None:
        nonlocal most
        for _ in range(2):
            for content in (FILES["usr/noise"], PLAIN["plain/a"], FILES["usr/prose"]):
                for offset in range(0, len(content), MIB):
                    size = min(MIB, len(content) - offset)
                    assert await read(image, source, by_size(image, content), offset, size) == content[offset : offset + size]
                    most = max(most, os.fstat(image.spool).st_blocks * 512)

    running(source, body)
    assert most < bound + 4 * MIB


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "small", str(path)], check=True)
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_on_a_full_disk_what_is_not_needed_makes_room_and_where_there_is_none_memory_does(
    image: Image, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.close(image.spool)
    image.spool = create(str(small_disk))
    source = image.source()
    content = FILES["usr/noise"]
    index = by_size(image, content)

    async def body() -> None:
        for offset in range(0, 5 * MIB, MIB):
            assert await read(image, source, index, offset, 1000) == content[offset : offset + 1000]

    running(source, body)
    with open(small_disk / "other", "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:  # what is left of fetches is still being written
            file.write(bytes(4096))
    other = image.source()  # which knows nothing of what it could give up

    async def without_room() -> None:
        memory = []
        for content in (FILES["usr/noise"], FILES["usr/prose"], PLAIN["plain/a"], CONTENTS[-3]):
            for offset in range(0, len(content) - 1000, 700_000):
                assert await read(image, other, by_size(image, content), offset, 1000) == content[offset : offset + 1000]
                memory.append(other._spool.used_bytes)
        assert other._spool.in_memory and 0 < max(memory) < 24 * MIB  # the bound is 16 MiB, and a fetch may be under way
        (small_disk / "other").unlink()
        monkeypatch.setattr(spool_module, "ROOM_BYTES", MIB)
        far = SMALL["etc/30"]  # from what was read so far, and ahead
        assert await read(image, other, by_size(image, far)) == far
        assert not other._spool.in_memory and os.fstat(image.spool).st_blocks

    running(other, without_room)


def test_a_read_is_answered_when_what_it_needs_has_come(image: Image) -> None:
    """And not when all has that is fetched with it: the rest of the span comes no more."""
    image.proxy.on("/blobs/", stall(400_000))
    content = FILES["usr/noise"]
    source = image.source()
    index = by_size(image, content)

    async def body() -> None:
        for _ in range(2):
            with trio.fail_after(30):  # no connection would be left for another one before twice that
                assert await read(image, source, index, 1000, 5000) == content[1000:6000]

    running(source, body)


def test_an_object_that_was_cut_is_not_taken_for_one(image: Image) -> None:
    content = FILES["usr/last"]
    index = by_size(image, content)
    path = Path(image.objects_directory) / Objects.path(image.table.row(index).key)
    path.write_bytes(content[:1000])
    source = image.source()

    async def body() -> None:
        assert await read(image, source, index) == content

    running(source, body)


def test_objects_have_places_of_their_own(image: Image) -> None:
    spool = Spool(image.spool, image.spans)
    taken = []
    for index in range(len(image.table)):
        row = image.table.row(index)
        place = spool.place(decode_content(row))
        assert place % 4096 == 0
        taken.append((place, place + stored_bytes(row, decode_content(row))))
    taken.sort()
    assert all(stop <= -(-begin // 4096) * 4096 for (_, stop), (begin, _) in itertools.pairwise(taken))
    assert list(spool.objects()) == []
    for begin, stop in taken:
        spool.write(begin, memoryview(bytes(stop - begin)))
    assert sorted(index for index, _, _ in spool.objects()) == list(range(len(image.table)))


@given(data=some.data())
def test_parts_of_a_sparse_file(data: some.DataObject) -> None:
    lengths = data.draw(some.lists(some.tuples(some.integers(0, 20), some.integers(1, 20)), max_size=8))
    extents, at, stored = [], 0, b""
    content = bytearray()
    for hole, length in lengths:
        at += hole
        extents.append((at, length))
        piece = noise(length, at)
        content += bytes(hole) + piece
        stored += piece
        at += length
    content += bytes(data.draw(some.integers(1, 20)))
    offset = data.draw(some.integers(0, len(content) - 1))
    size = data.draw(some.integers(1, len(content) - offset))
    result = bytearray(size)
    for begin, place, length in parts(extents, offset, size):
        result[begin : begin + length] = stored[place : place + length]
    assert result == content[offset : offset + size]


@pytest.mark.parametrize("where", ["objects", "spool"])
def test_what_is_damaged_on_this_disk_is_fetched_again(image: Image, where: str, capfd: pytest.CaptureFixture[str]) -> None:
    expected = FILES["usr/prose"]
    index = by_size(image, expected)
    row = image.table.row(index)
    place = Spool(image.spool, image.spans).place(decode_content(row))

    async def body() -> None:
        assert await read(image, source, index) == expected
        if where == "objects":
            image.publish(index)
            await source.taken([index])
            file = os.open(Objects.path(row.key), os.O_WRONLY, dir_fd=image.objects.descriptor)
            os.pwrite(file, b"damage", 1000)
            os.close(file)
        else:
            os.pwrite(image.spool, b"damage", place + 1000)
        assert await read(image, source, index, 500, 2000) == expected[500:2500]
        assert await read(image, source, index) == expected

    source = image.source()
    running(source, body)
    assert "is damaged" in capfd.readouterr().err
