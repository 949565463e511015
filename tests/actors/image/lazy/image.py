"""An image whose archive is on this node and whose content is not: its source and its mount, over a proxy to a real registry."""

from __future__ import annotations

import copy
import http.client
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import trio

from actors.image.archives.archive import Archive
from actors.image.archives.builder import Build
from actors.image.layers.content import decode_content
from actors.image.lazy import spool
from actors.image.lazy.coming import Coming
from actors.image.lazy.source import RegistrySource
from actors.image.registry.reference import Reference
from actors.image.registry.repository import Registry
from actors.image.wire import BuildImage, Built
from actors.lazytree.objects import Objects
from tests.actors.image.images import Repository
from tests.actors.image.proxy import Exchange, Proxy

T = TypeVar("T")
DAMAGED_BYTES = 32 << 10

_given_up: list[int] = []  # descriptors


class Image:
    """An image of a repository: its archive in `home`, an empty OBJECTS, and a reference that leads through the proxy.

    `lazy`: its tables of contents are used, if it has any.
    """

    def __init__(self, home: Path, repository: Repository, proxy: Proxy, lazy: bool = False) -> None:
        self.archive_directory, self.objects_directory = str(home / "archives"), str(home / "objects")
        order = BuildImage(repository.reference(), self.archive_directory, str(home / "builder's"), lazy=lazy)
        built = Build(order).run()
        assert isinstance(built, Built)
        self.path = built.archive
        self.proxy = proxy
        self.reference = Reference.parse(repository.reference().replace(repository.registry.address, proxy.address))
        self._open()

    def _open(self) -> None:
        self.archive = Archive.open(self.path)
        self.table = self.archive.objects()
        self.spans = self.archive.spans(self.table)
        self.objects = Objects(self.objects_directory)
        self.spool = spool.create(self.objects_directory)

    def elsewhere(self, home: Path) -> Image:
        """The same archive, on another node, so to say: with OBJECTS and spool of its own in `home`."""
        other = copy.copy(self)
        other.objects_directory = str(home / "objects")
        other._open()
        return other

    def source(
        self,
        timeout_s: float = 60.0,
        spool_bytes_max: int = 1 << 30,
        completed: Callable[[list[int]], None] = lambda _: None,
        mirrors: Sequence[str] = (),
        coming: Coming | None = None,
    ) -> RegistrySource:
        return RegistrySource(
            self.table,
            self.spans,
            str(self.reference),
            [layer.digest for layer in self.archive.info.layers],
            spool.Spool(self.spool, self.spans),
            self.objects.descriptor,
            lambda: Registry(self.reference, mirrors=mirrors),
            timeout_s,
            spool_bytes_max,
            completed,
            coming,
        )

    def find(self, size: int) -> int:
        """The object of that size."""
        [index] = [index for index in range(len(self.table)) if self.table.row(index).size_bytes == size]
        return index

    def in_layer(self, layer: int) -> list[int]:
        return [index for index in range(len(self.table)) if decode_content(self.table.row(index)).layer == layer]

    def publish(self, *rows: int) -> list[int]:
        return spool.publish(self.path, self.spool, self.objects, rows)

    def moved_bytes(self) -> int:
        """Of layers, since the last `proxy.forget`."""
        return self.proxy.body_bytes("/blobs/")

    def ranges(self) -> list[tuple[int, int]]:
        """(begin, end) of the ranges of layers that were asked for, sorted."""
        asked = [exchange.range for exchange in self.proxy.seen("/blobs/")]
        return sorted((place[0], place[0] + place[1]) for place in asked if place)

    def close(self) -> None:
        self.spans.close()
        self.table.close()
        self.objects.close()
        give_up(self.spool)


def give_up(spool: int) -> None:
    """Close a spool.

    A thread that was left alone with its fetch may still write there.  Until it has, no other file must get the number.
    """
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), spool, inheritable=False)
    _given_up.append(spool)
    if len(_given_up) > 50:
        os.close(_given_up.pop(0))


def running(
    source: RegistrySource, body: Callable[[], Awaitable[T]], timeout_s: float = 120.0, clock: trio.abc.Clock | None = None
) -> T:
    """What `body` returns, while the source runs."""

    async def run() -> T:
        with trio.fail_after(timeout_s):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(source.run)
                try:
                    return await body()
                finally:
                    nursery.cancel_scope.cancel()
        raise AssertionError

    return trio.run(run, clock=clock)


async def until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        await trio.to_thread.run_sync(time.sleep, 0.005)  # by no clock of trio's: a test may have stopped it


async def landed(source: RegistrySource) -> None:
    """Wait until nothing is on its way: what comes ahead asks for something later than who reads, and what is whole is said later."""
    await until(lambda: not source._flights._flights and not source._flights._ahead)


def read(image: Image, source: RegistrySource, index: int, offset: int = 0, size: int | None = None) -> Awaitable[bytes]:
    row = image.table.row(index)
    return source.read(index, row, offset, row.size_bytes - offset if size is None else size)


def damaged(exchange: Exchange) -> None:
    """Pass the request on, and change a byte in each piece of the answer: no chunk of what it has is right."""
    with closing(http.client.HTTPConnection(exchange.proxy.upstream, timeout=60)) as upstream:
        upstream.request("GET", exchange.path, headers={"Range": exchange.headers["Range"]})
        answer = upstream.getresponse()
        body = bytearray(answer.read())
        for at in range(len(body) // 2 % DAMAGED_BYTES, len(body), DAMAGED_BYTES):
            body[at] ^= 0x55
        exchange.answer(answer.status, bytes(body), Content_Range=answer.headers["Content-Range"])
