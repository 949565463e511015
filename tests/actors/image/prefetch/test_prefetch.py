"""Making and streaming packs, in processes of their own, and what a server does that is told what comes."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from actors.image.archives import trace
from actors.image.archives.archive import save_beside
from actors.image.archives.pack import Chunk, Pack, pack_path, write_pack
from actors.image.archives.trace import BLOCK_BYTES, Block, Trace
from actors.image.layers.content import CHUNK_BYTES
from actors.image.lazy.coming import STALL_S, Announced, Coming, end_announcement
from actors.image.lazy.flights import WAITING_BYTES, WAITING_MIN
from actors.image.lazy.source import RegistrySource
from actors.image.lazy.spool import Spool
from actors.image.prefetch import process as prefetch
from actors.image.prefetch.process import Content
from actors.image.wire import Completed, MakePack, PackAbsent, PackComing, PackMade, PackThrough, Streaming, StreamPack
from supervisor.channel import Channel, ChannelClosed
from supervisor.frames import Codec, Message
from tests.actors.image.images import Repository, RunningRegistry, member, tar
from tests.actors.image.layers.tables import Tabled, estargz, images, zstd_chunked
from tests.actors.image.lazy.image import Image, landed, read, running, until
from tests.actors.image.proxy import Proxy
from tests.actors.lazytree.harness import fork

WORKLOAD = "0123456789abcdef"
SAYS = Codec(PackMade, Streaming, PackComing, PackAbsent, PackThrough, Completed)
SIZES = [3 * CHUNK_BYTES + 100, 70_000, 900, 2 * CHUNK_BYTES, CHUNK_BYTES]
CONTENT = {size: random.Random(size).randbytes(size) for size in SIZES}

pytestmark = pytest.mark.usefixtures("unhurried")


@pytest.fixture
def proxy(registry: RunningRegistry) -> Iterator[Proxy]:
    with Proxy(registry.address) as started:
        yield started


@pytest.fixture(scope="module")
def pushed(registry: RunningRegistry) -> Repository:
    repository = registry.repository("packed")
    repository.push(tar(*(member(str(size), content) for size, content in CONTENT.items())))
    return repository


@pytest.fixture
def image(tmp_path: Path, pushed: Repository, proxy: Proxy) -> Iterator[Image]:
    with closing(Image(tmp_path, pushed, proxy)) as opened:
        yield opened


def told(entry: str, order: Message, image: Image, spool: bool = True) -> list[Message]:
    """Run a prefetcher → all that it says, but that it lives."""
    channel, end = Channel.pair(SAYS)
    arguments = Codec(type(order)).encode(order)

    def run() -> None:
        channel.close()
        getattr(prefetch, entry)(end, [image.spool] if spool else [], arguments)

    pid = fork(run)
    end.close()
    said: list[Message] = []
    try:
        while True:
            message = channel.receive(60)[0]
            if not isinstance(message, Streaming):  # of which there are more on a slow machine
                said.append(message)
    except ChannelClosed:
        pass
    channel.close()
    assert os.waitpid(pid, 0)[1] == 0
    return said


def stream(image: Image) -> list[Message]:
    return told("stream", StreamPack(image.path, image.objects_directory, WORKLOAD), image)


def make(image: Image, **fields: bool) -> PackMade:
    [made] = told("make", MakePack(image.path, image.objects_directory, WORKLOAD), image, **fields)
    assert isinstance(made, PackMade)
    return made


def chunks(image: Image, *places: tuple[int, int]) -> list[Chunk]:
    """(size of the object, number)"""
    return [Chunk(image.find(size), number) for size, number in places]


def content_of(image: Image, chunk: Chunk) -> bytes:
    return CONTENT[image.table.row(chunk.row).size_bytes][chunk.number * CHUNK_BYTES :][:CHUNK_BYTES]


def pack_of(image: Image) -> Path:
    return Path(pack_path(image.archive_directory, image.archive.info.digest, WORKLOAD))


def put_pack(image: Image, wanted: list[Chunk], contents: list[bytes] | None = None) -> None:
    found = contents or [content_of(image, chunk) for chunk in wanted]
    save_beside(str(pack_of(image)), write_pack(image.archive.info.digest, wanted, found))


def have(image: Image, *sizes: int) -> None:
    """Have these objects in OBJECTS."""
    for size in sizes:
        with image.objects.create() as file:
            file.write(CONTENT[size])
            image.objects.publish(file, hashlib.sha256(CONTENT[size]).hexdigest())


def in_objects(image: Image) -> set[int]:
    rows = [image.table.row(index) for index in range(len(image.table))]
    return {row.size_bytes for row in rows if image.objects.has(row.key)}


def test_a_pack_is_made_of_what_is_here_in_the_order_of_the_trace(image: Image) -> None:
    have(image, 70_000, SIZES[0])
    blocks = [
        Block(image.find(70_000), 1),
        Block(image.find(SIZES[0]), 9),
        Block(image.find(900), 0),
        Block(image.find(70_000), 0),
    ]
    trace.save(image.archive_directory, image.archive.info.digest, WORKLOAD, Trace(blocks))
    made = make(image)
    assert (made.chunks, made.problem) == (2, "")
    data = pack_of(image).read_bytes()
    assert made.size_bytes == len(data)
    pack = Pack(image.archive.info.digest, iter([data]))
    assert pack.chunks == chunks(image, (70_000, 0), (SIZES[0], 9 * BLOCK_BYTES // CHUNK_BYTES))
    contents = [content for _, content in pack.contents(lambda chunk: len(content_of(image, chunk)))]
    assert contents == [content_of(image, chunk) for chunk in pack.chunks]
    assert make(image) == PackMade(0, 0)  # it is there


def test_what_is_only_in_the_spool_is_packed_too(image: Image) -> None:
    with content_here(image) as content:
        for chunk in chunks(image, (SIZES[0], 1), (SIZES[0], 3)):
            content.keep(chunk, content_of(image, chunk))
    blocks = [Block(image.find(SIZES[0]), number) for number in (4, 12)]
    trace.save(image.archive_directory, image.archive.info.digest, WORKLOAD, Trace(blocks))
    assert make(image, spool=False).problem == "of 2 chunks 0 are here"
    assert not pack_of(image).exists()
    assert make(image).chunks == 2


@pytest.mark.parametrize("blocks", [None, [], [(99, 0)], [(0, 1 << 20)]], ids=["no trace", "empty", "no object", "no chunk"])
def test_no_pack_is_made_of_what_is_no_trace(image: Image, blocks: list[tuple[int, int]] | None) -> None:
    if blocks is not None:
        found = Trace([Block(*block) for block in blocks])
        trace.save(image.archive_directory, image.archive.info.digest, WORKLOAD, found)
    made = make(image)
    assert made.problem and not pack_of(image).exists()


@pytest.mark.parametrize("writer", [estargz, zstd_chunked])
def test_of_a_layer_with_a_table_the_chunks_are_those_of_the_table(
    writer: Callable[..., Tabled], tmp_path: Path, repository: Repository, proxy: Proxy
) -> None:
    content = random.Random(1).randbytes(5 << 20)
    layer = writer(member("f", content), member("g", b"small"))
    repository.push(layer.tar, **images([layer]))
    with closing(Image(tmp_path, repository, proxy, lazy=True)) as image, closing(image.elsewhere(tmp_path / "other")) as other:
        index = image.find(len(content))
        source = image.source()
        wanted = [BLOCK_BYTES, 4 * BLOCK_BYTES - 10]

        async def reads() -> None:
            await read(image, source, index, *wanted)
            await landed(source)

        running(source, reads)
        blocks = [Block(index, number) for number in range(1, 5)]
        trace.save(image.archive_directory, image.archive.info.digest, WORKLOAD, Trace(blocks))
        made = make(image)
        assert (made.chunks > 0, made.problem) == (True, "")
        assert [type(message) for message in stream(other)] == [PackComing, PackThrough]
        proxy.forget()
        source = other.source()
        assert running(source, partial(read, other, source, index, *wanted)) == content[wanted[0] :][: wanted[1]]
        assert other.moved_bytes() == 0
        # A pack for another sort of archive of this image has other numbers in it.
        stale = b"".join(write_pack(image.archive.info.digest, [Chunk(index, 0)], [content[:CHUNK_BYTES]]))
        pack_of(image).write_bytes(stale)
        [said] = stream(other)
        assert isinstance(said, PackThrough) and "a pack of sha256" in said.problem
        assert not pack_of(image).exists()


def content_here(image: Image) -> closing[Content]:
    return closing(Content(image.path, image.objects_directory, [image.spool]))


def test_a_stream_brings_small_objects_to_objects_and_parts_to_the_spool(image: Image) -> None:
    have(image, 900)
    wanted = chunks(image, (70_000, 0), (SIZES[0], 2), (900, 0), (2 * CHUNK_BYTES, 1), (2 * CHUNK_BYTES, 0), (CHUNK_BYTES, 0))
    put_pack(image, wanted)
    said = stream(image)
    end = Spool(image.spool, image.spans).end
    assert said == [
        PackComing(6, end),
        Completed([image.find(2 * CHUNK_BYTES)]),
        PackThrough(5, 70_000 + 4 * CHUNK_BYTES),
    ]
    assert in_objects(image) == {900, 70_000, CHUNK_BYTES}
    assert image.publish(image.find(2 * CHUNK_BYTES)) == [image.find(2 * CHUNK_BYTES)]
    assert in_objects(image) == {900, 70_000, CHUNK_BYTES, 2 * CHUNK_BYTES}

    async def reads() -> bytes:
        return await read(image, source, image.find(SIZES[0]), 2 * CHUNK_BYTES, CHUNK_BYTES)

    source = image.source()
    assert running(source, reads) == CONTENT[SIZES[0]][2 * CHUNK_BYTES : 3 * CHUNK_BYTES]
    assert image.moved_bytes() == 0


@pytest.mark.parametrize("damage", ["content", "cut", "head", "no object", "no chunk", "nothing", "bits"])
def test_a_bad_pack_brings_nothing_that_is_wrong_and_is_removed(image: Image, damage: str) -> None:
    wanted = chunks(image, (70_000, 0), (SIZES[0], 2), (2 * CHUNK_BYTES, 1))
    contents = [content_of(image, chunk) for chunk in wanted]
    if damage == "content":
        contents[1] = bytes(len(contents[1]))
    elif damage == "no object":
        wanted[1] = Chunk(99, 0)
    elif damage == "no chunk":
        wanted[1] = Chunk(wanted[1].row, 77)
    put_pack(image, wanted, contents)
    data = pack_of(image).read_bytes()
    bad = {
        "cut": data[:-50_000],
        "head": data[:60] + b"x" + data[61:],
        "nothing": b"",
        "bits": data[:90_000] + bytes(100) + data[90_100:],
    }
    pack_of(image).write_bytes(bad.get(damage, data))
    said = stream(image)
    assert isinstance(said[-1], PackThrough) and said[-1].problem.endswith("it is removed")
    assert not pack_of(image).exists()
    for path in Path(image.objects_directory).glob("??/*"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.parent.name + path.name
    source = image.source()

    async def reads() -> None:
        for size in SIZES:
            assert await read(image, source, image.find(size)) == CONTENT[size]

    running(source, reads)


def test_a_pack_of_what_is_here_is_not_read(image: Image) -> None:
    have(image, 70_000)
    put_pack(image, chunks(image, (70_000, 0)))
    assert stream(image) == [PackAbsent()]
    pack_of(image).unlink()
    assert stream(image) == [PackAbsent()]


# What comes, as the server sees it: by a clock that stands still, but where it is put on, for this machine may stand still, too


@pytest.fixture
def coming(image: Image) -> Iterator[Coming]:
    with closing(Coming(image.spool, Spool(image.spool, image.spans).end)) as made:
        yield made


@pytest.fixture
def clock() -> trio.testing.MockClock:
    return trio.testing.MockClock()


async def waiting(coming: Coming, source: RegistrySource, readers: int) -> trio.Event:
    """Wait until so many reads wait for what comes → what ends that."""
    await until(lambda: source._flights.readers.borrowed_tokens == readers and coming._changed is not None)
    await trio.testing.wait_all_tasks_blocked()
    assert coming._changed is not None
    return coming._changed


def test_a_read_waits_for_what_is_announced_and_fetches_nothing(
    image: Image, coming: Coming, clock: trio.testing.MockClock
) -> None:
    wanted = chunks(image, (900, 0), (SIZES[0], 1), (70_000, 0))
    kept = Spool(image.spool, image.spans)
    announced = Announced(image.spool, kept.end)
    announced.begin(wanted)
    source = image.source(coming=coming)

    async def reads() -> None:
        got: list[bytes] = []

        async def one() -> None:
            got.append(await read(image, source, image.find(SIZES[0]), CHUNK_BYTES, 5000))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one)
            nursery.start_soon(one)
            for _ in range(2):  # longer than it may take without any progress
                over = await waiting(coming, source, 2)
                clock.jump(0.7 * STALL_S)
                await trio.testing.wait_all_tasks_blocked()
                assert not got and not over.is_set()
                with content_here(image) as content:
                    content.keep(wanted[1], content_of(image, wanted[1]))
                announced.through()
                await until(over.is_set)
            await until(lambda: len(got) == 2)
        assert got == [CONTENT[SIZES[0]][CHUNK_BYTES : CHUNK_BYTES + 5000]] * 2

    running(source, reads, clock=clock)
    assert image.moved_bytes() == 0


def test_what_came_after_a_read_had_looked_is_looked_for_once_more(
    image: Image, coming: Coming, clock: trio.testing.MockClock
) -> None:
    """And not fetched: here it comes while the read waits for its turn to wait."""
    wanted = chunks(image, (900, 0), (70_000, 0))
    announced = Announced(image.spool, Spool(image.spool, image.spans).end)
    announced.begin(wanted)
    source = image.source(coming=coming, spool_bytes_max=WAITING_MIN * WAITING_BYTES)

    async def reads() -> None:
        got: list[int] = []

        async def one(size: int) -> None:
            assert await read(image, source, image.find(size)) == CONTENT[size]
            got.append(size)

        async with trio.open_nursery() as nursery:
            for _ in range(WAITING_MIN):
                nursery.start_soon(one, 70_000)
            await waiting(coming, source, WAITING_MIN)
            nursery.start_soon(one, 900)
            await until(lambda: source._flights.readers.statistics().tasks_waiting == 1)
            for chunk in wanted:
                with content_here(image) as content:
                    content.keep(chunk, content_of(image, chunk))
                announced.through()
            await until(lambda: len(got) == WAITING_MIN + 1)

    running(source, reads, clock=clock)
    assert image.moved_bytes() == 0


@pytest.mark.parametrize("how", ["hangs", "ended", "did not bring it", "brought it wrong"])
def test_what_does_not_come_is_fetched(image: Image, coming: Coming, clock: trio.testing.MockClock, how: str) -> None:
    """At once, when it is known that it does not come."""
    wanted = chunks(image, (900, 0), (SIZES[0], 1))
    kept = Spool(image.spool, image.spans)
    announced = Announced(image.spool, kept.end)
    announced.begin(wanted)
    source = image.source(coming=coming)

    async def reads() -> None:
        got: list[bytes] = []

        async def one(*place: int) -> None:
            got.append(await read(image, source, *place))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, image.find(SIZES[0]), CHUNK_BYTES, 5000)
            await waiting(coming, source, 1)
            if how == "hangs":
                clock.jump(STALL_S)
            elif how == "ended":
                end_announcement(image.spool, kept.end)
            else:
                if how == "brought it wrong":
                    kept.write(
                        kept.place(prefetch.decode_content(image.table.row(wanted[1].row))) + CHUNK_BYTES,
                        memoryview(bytes(CHUNK_BYTES)),
                    )
                announced.through()
                announced.through()
            await until(lambda: got)
            if how == "hangs":  # and the next one does not wait for the same again
                nursery.start_soon(one, image.find(900))
                await until(lambda: len(got) == 2)
        assert got[0] == CONTENT[SIZES[0]][CHUNK_BYTES : CHUNK_BYTES + 5000]

    running(source, reads, clock=clock)
    assert image.moved_bytes() > 0


def test_a_server_that_comes_later_knows_what_is_announced(image: Image, clock: trio.testing.MockClock) -> None:
    wanted = chunks(image, (900, 0), (SIZES[0], 1))
    kept = Spool(image.spool, image.spans)
    announced = Announced(image.spool, kept.end)
    announced.begin(wanted)
    announced.through()

    async def ask() -> list[bool]:
        come: list[bool] = []

        async def arrivals(coming: Coming) -> None:
            for chunk in (wanted[0], wanted[1], wanted[1]):
                come.append(await coming.arrival(*chunk))

        with closing(Coming(image.spool, kept.end)) as coming:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(arrivals, coming)
                await until(lambda: coming._changed is not None)
                announced.through()
                await until(lambda: len(come) == 3)
        return come

    assert trio.run(ask, clock=clock) == [True, True, True]


def test_a_prefetcher_that_is_killed_leaves_what_can_be_used(image: Image, coming: Coming) -> None:
    put_pack(image, chunks(image, (SIZES[0], 0), (SIZES[0], 1), (SIZES[0], 2), (70_000, 0), (900, 0)))
    arguments = Codec(StreamPack).encode(StreamPack(image.path, image.objects_directory, WORKLOAD))
    for share in range(12):
        channel, end = Channel.pair(SAYS)
        pid = fork(partial(prefetch.stream, end, [image.spool], arguments))
        # Not a wait for something: a kill at an instant that nobody chose.
        time.sleep(share * 0.004)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        channel.close()
        end.close()
    source = image.source(coming=coming)

    async def reads() -> None:
        for size in SIZES:
            assert await read(image, source, image.find(size)) == CONTENT[size]

    running(source, reads)
