"""Fetching all that is missing, behind what is read; from a real registry, through a proxy that counts and stalls."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import trio

from actors.image.lazy import filling
from actors.image.lazy.filling import Filling
from actors.image.lazy.source import RegistrySource
from tests.actors.image.images import Repository, RunningRegistry, member, tar
from tests.actors.image.layers.tables import Tabled, estargz, images, zstd_chunked
from tests.actors.image.lazy.image import Image, read, running, until
from tests.actors.image.proxy import Proxy, held, status

MIB = 1 << 20
FILES = {f"file-{number}": random.Random(number).randbytes(size) for number, size in enumerate((9 * MIB, 300, 3 * MIB, 70_000))}
MORE = {"more": random.Random(9).randbytes(2 * MIB + 5), "fifth": random.Random(10).randbytes(900)}

pytestmark = pytest.mark.usefixtures("unhurried")


@pytest.fixture(autouse=True)
def ample_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """However full this machine's is."""
    monkeypatch.setattr(filling, "FREE_SHARE_MIN", 0.0)


@pytest.fixture
def proxy(registry: RunningRegistry) -> Iterator[Proxy]:
    with Proxy(registry.address) as started:
        yield started


@pytest.fixture(scope="module")
def pushed(registry: RunningRegistry) -> Repository:
    repository = registry.repository("filled")
    repository.push(*(tar(*(member(name, content) for name, content in files.items())) for files in (FILES, MORE)))
    return repository


@pytest.fixture
def image(tmp_path: Path, pushed: Repository, proxy: Proxy) -> Iterator[Image]:
    with closing(Image(tmp_path, pushed, proxy)) as opened:
        yield opened


def size_of_layers(image: Image) -> int:
    return sum(layer.size_bytes for layer in image.archive.info.layers)


def missing(image: Image) -> list[str]:
    keys = [image.table.row(index).key for index in range(len(image.table))]
    return [key for key in keys if not image.objects.has(key)]


async def publishing(image: Image, source: RegistrySource, whole: list[int]) -> None:
    """Be the parent, who publishes."""
    while True:
        rows, whole[:] = list(whole), []
        await source.taken(await trio.to_thread.run_sync(image.publish, *rows))
        await trio.sleep(0.01)


def fill(image: Image, parallel: int = 2, bytes_per_s: int = 0, spool_bytes_max: int = 1 << 30) -> list[str]:
    """Fill, to the end → what was said."""
    whole: list[int] = []
    said: list[str] = []
    source = image.source(completed=whole.extend, spool_bytes_max=spool_bytes_max)

    async def all_of_it() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(publishing, image, source, whole)
            await Filling(source, image.objects.descriptor, parallel, bytes_per_s, 0.0).run(said.append)
            await until(lambda: said or not missing(image))
            nursery.cancel_scope.cancel()

    running(source, all_of_it)
    return said


@pytest.mark.parametrize("writer", [estargz, zstd_chunked])
def test_layers_with_tables_of_contents_come_whole_too(
    writer: Callable[..., Tabled], tmp_path: Path, repository: Repository, proxy: Proxy
) -> None:
    layers = [writer(*(member(name, content) for name, content in files.items())) for files in (FILES, MORE)]
    repository.push(*(layer.tar for layer in layers), **images(layers))
    with closing(Image(tmp_path, repository, proxy, lazy=True)) as image:
        assert fill(image) == []
        assert missing(image) == []
        assert image.moved_bytes() <= size_of_layers(image)


def test_all_that_is_missing_is_fetched_once(image: Image) -> None:
    assert fill(image) == []
    assert missing(image) == []
    assert size_of_layers(image) <= image.moved_bytes() + 2048 and image.moved_bytes() < 1.02 * size_of_layers(image) + 4096
    image.proxy.forget()
    assert fill(image) == []
    assert image.moved_bytes() == 0


def test_a_small_spool_is_enough(image: Image) -> None:
    assert fill(image, parallel=1, spool_bytes_max=12 * MIB) == []
    assert missing(image) == []


def test_a_file_that_the_spool_does_not_hold_keeps_nothing_else_away(image: Image) -> None:
    whole: list[int] = []
    source = image.source(completed=whole.extend, spool_bytes_max=8 * MIB)

    async def all_of_it() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(publishing, image, source, whole)
            await Filling(source, image.objects.descriptor, 1, 0, 0.0).run(said.append)
            await until(lambda: missing(image) == [image.table.row(image.find(9 * MIB)).key])
            nursery.cancel_scope.cancel()

    said: list[str] = []
    running(source, all_of_it, 60.0)
    assert said == []


def test_it_comes_no_faster_than_told(image: Image) -> None:
    begun = time.monotonic()
    assert fill(image, bytes_per_s=8 * MIB) == []
    assert time.monotonic() - begun > 0.6 * size_of_layers(image) / (8 * MIB)


def test_nothing_is_begun_while_a_read_waits(image: Image) -> None:
    source, come = image.source(), threading.Event()
    image.proxy.on(image.archive.info.layers[1].digest, held(1 * MIB, come))
    seen: list[str] = []

    async def body() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, image, source, image.find(2 * MIB + 5))
            await until(lambda: image.proxy.seen("/blobs/"))
            nursery.start_soon(Filling(source, image.objects.descriptor, 2, 0, 0.0).run, seen.append)
            await trio.sleep(0.3)
            assert len({exchange.path for exchange in image.proxy.seen("/blobs/")}) == 1
            come.set()
        assert len({exchange.path for exchange in image.proxy.seen("/blobs/")}) == 2

    try:
        running(source, body)
    finally:
        come.set()


def test_a_disk_that_is_nearly_full_is_left_alone(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "FREE_SHARE_MIN", 1.01)  # more than any disk has: somebody may just be removing much
    assert fill(image) == ["not all of the image is fetched ahead: the disk is nearly full"]
    assert image.moved_bytes() == 0


def test_a_registry_that_refuses_is_said_once_and_ends_it(image: Image) -> None:
    image.proxy.on("/blobs/", status(403))
    [said] = fill(image)
    assert "refuses" in said or "403" in said or "credentials" in said
    image.proxy.behave()
    assert fill(image) == []
    assert missing(image) == []
