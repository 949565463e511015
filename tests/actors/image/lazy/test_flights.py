"""Spans on their way to the spool, while something there is given up: what is torn by that is not taken for what came."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import trio
import trio.testing

from actors.image.lazy.fetching import Fetcher
from actors.image.lazy.flights import Flights
from actors.image.lazy.held import Held
from actors.image.lazy.spool import Spool
from actors.image.registry.repository import Registry
from tests.actors.image.images import RunningRegistry, member, tar
from tests.actors.image.lazy.image import Image
from tests.actors.image.proxy import Proxy, held

MIB = 1 << 20
ONE, OTHER = range(1), range(1, 2)  # spans of the only layer

pytestmark = pytest.mark.usefixtures("unhurried")


@pytest.fixture
def proxy(registry: RunningRegistry) -> Iterator[Proxy]:
    with Proxy(registry.address) as proxy:
        yield proxy


@pytest.fixture
def image(tmp_path: Path, registry: RunningRegistry, proxy: Proxy) -> Iterator[Image]:
    """One layer of some spans."""
    repository = registry.repository("flights")
    repository.push(tar(member("file", random.Random(1).randbytes(4 * MIB))))
    with closing(Image(tmp_path, repository, proxy)) as image:
        yield image


def flights_of(image: Image, spool_bytes_max: int = 1 << 30) -> Flights:
    name, layers = str(image.reference), [layer.digest for layer in image.archive.info.layers]
    spool = Spool(image.spool, image.spans)
    held = Held(image.spans, spool, image.objects.descriptor, name)
    fetcher = Fetcher(image.spans, name, layers, spool, held, lambda: Registry(image.reference), 60.0)
    return Flights(image.spans, name, spool, fetcher, spool_bytes_max, lambda rows: None)


def test_nothing_is_brought_where_something_is_given_up(image: Image) -> None:
    flights, freed = flights_of(image), threading.Event()

    async def run() -> None:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(flights.run)
                await flights.running.wait()
                [flight] = flights.fly(0, ONE, ONE)
                await flights.arrival(flight)
                image.proxy.forget()
                nursery.start_soon(flights.give_up, 0, ONE, freed.wait)
                try:
                    await trio.testing.wait_all_tasks_blocked()
                    assert flights.landing(0, 0) == 0
                    [giving_up] = flights.fly(0, ONE, ONE)
                    await trio.sleep(0.2)
                    assert image.ranges() == [] and not giving_up.landed.is_set()
                finally:
                    freed.set()
                await flights.arrival(giving_up)
                [flight] = flights.fly(0, ONE, ONE)
                await flights.arrival(flight)
                assert len(image.ranges()) == 1 and flights.landing(0, 0) == 2
                nursery.cancel_scope.cancel()

    trio.run(run)


def test_who_waits_no_longer_does_not_end_it_for_the_others(image: Image) -> None:
    flights, freed = flights_of(image), threading.Event()

    async def run() -> None:
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(flights.run)
                await flights.running.wait()
                nursery.start_soon(flights.give_up, 0, ONE, freed.wait)
                try:
                    await trio.testing.wait_all_tasks_blocked()
                    [giving_up] = flights.fly(0, ONE, ONE)
                    with trio.move_on_after(0.01):
                        await flights.arrival(giving_up)
                    assert flights.fly(0, ONE, ONE) == [giving_up]
                finally:
                    freed.set()
                await flights.arrival(giving_up)
                nursery.cancel_scope.cancel()

    trio.run(run)


def test_a_fetch_under_which_the_spool_is_emptied_does_not_count(image: Image) -> None:
    flights, come = flights_of(image, spool_bytes_max=64 << 10), threading.Event()
    flights.has_inherited = True

    async def run() -> None:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(flights.run)
                await flights.running.wait()
                image.proxy.on("/blobs/", held(128 << 10, come), times=1)
                [slow] = flights.fly(0, ONE, ONE)
                begin = image.spans.bounds(0, 0)[0]
                await flights.arrival(slow, begin + 100_000)  # more than the spool may have, and another flight begins
                [other] = flights.fly(0, OTHER, OTHER)
                await flights.arrival(other)
                come.set()
                await flights.arrival(slow)
                assert flights.landing(0, 1) > 0
                assert flights.landing(0, 0) == 0
                nursery.cancel_scope.cancel()

    try:
        trio.run(run)
    finally:
        come.set()
