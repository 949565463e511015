"""The content of an image, fetched from the registry as it is read: the Source of an image mount.

    OBJECTS → the spool → a range of an unmodified layer, by way of the spool

What is read is a *chunk* of an object (`held`); it is answered from memory in which its digest has just been found right.  What is
fetched is a *span* of a layer (`checkpoints`), or several that follow one another; all of it that belongs to
objects goes to the spool, checked or not, so nothing is fetched twice because a chunk and a span do not end together, or because
its readers wanted other parts or objects of it (`flights`).

Bounds.  A read holds no bytes before all that it needs is in the spool, and then it takes its turn (LOADS_MAX); a fetch holds little,
however long it is (`fetching`), and takes its turn, too.  Reads of what is there never wait for a fetch, and as many may wait for one
as fit into the spool.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import trio

from actors.image.layers.checkpoints import Spans
from actors.image.layers.content import LayerContent, chunk_of, decode_content, stored_bytes
from actors.image.lazy.coming import Coming
from actors.image.lazy.fetching import Fetcher
from actors.image.lazy.flights import RUN_BYTES_MAX, Flights
from actors.image.lazy.held import Held, Missing
from actors.image.lazy.readahead import Neighbours, Readahead
from actors.image.lazy.spool import Spool
from actors.image.registry.repository import Registry
from actors.lazytree.server import SourceError
from actors.lazytree.table import ObjectTable, Row

T = TypeVar("T")

LOADS_MAX = 6  # reads that are answered at once; each holds up to 3 MiB
SMALL_BYTES = 256 << 10  # an object whose neighbours in its layer are wanted with it
ROUNDS_MAX = 16  # of fetching what somebody then took away


class RegistrySource:
    """Content of the objects in `table`, which lie in `spans` of the layers with these digests of the image `reference`.

    `objects`: OBJECTS' descriptor.  `connect` makes a client for the image's repository; some of them are used at once (`flights`).
    `timeout_s` is for one range.  `completed` is told, in trio's thread, of objects that are whole in the spool.  `coming`: what
    somebody else is about to bring.  `run` it.
    """

    def __init__(
        self,
        table: ObjectTable,
        spans: Spans,
        reference: str,
        layers: Sequence[str],
        spool: Spool,
        objects: int,
        connect: Callable[[], Registry],
        timeout_s: float,
        spool_bytes_max: int,
        completed: Callable[[list[int]], None],
        coming: Coming | None = None,
    ) -> None:
        self._table = table
        self._spans = spans
        self._reference = reference
        self._layers = layers
        self._spool = spool
        self._held = Held(spans, spool, objects, reference)
        self._fetcher = Fetcher(spans, reference, layers, spool, self._held, connect, timeout_s)
        self._flights = Flights(spans, reference, spool, self._fetcher, spool_bytes_max, self._is_whole)
        self._completed = completed
        self._untaken: set[int] = set()  # of what was completed: what the parent has not had yet
        self._coming = coming
        self._loads = trio.CapacityLimiter(LOADS_MAX)
        self._readahead, self._neighbours = Readahead(), Neighbours()
        self._urgent, self._quiet = 0, trio.Event()  # reads that wait for a fetch, and when there are none any more
        self._quiet.set()
        self._freed = trio.Event()  # something in the spool has been given up for OBJECTS

    @property
    def fetched(self) -> tuple[int, float]:
        """Compressed bytes that were fetched so far, and for how many seconds something was on its way."""
        return self._flights.fetched

    async def run(self) -> None:
        """Fetch what is wanted, for as long as this is not cancelled."""
        await self._flights.run()

    # --- reading ---

    async def read(self, index: int, row: Row, offset: int, size: int) -> bytes:
        """`size` bytes at `offset` of the object, checked.  Raises SourceError."""
        content = decode_content(row)
        await self._flights.running.wait()
        looked = self._flights.landings
        found = await self._in_thread(self._held.load, row, content, offset, size)
        if isinstance(found, bytes):
            self._fetch_ahead(index, row, content, offset if content.extents is None else 0)
            return found
        async with self._flights.readers:
            came: set[int] = set()  # and is looked for once after that: it may be lost again
            while self._coming is not None and found.chunk not in came and await self._coming.arrival(index, found.chunk):
                came.add(found.chunk)
                looked = self._flights.landings
                found = await self._in_thread(self._held.load, row, content, offset, size)
                if isinstance(found, bytes):
                    return found
            with self._urgency(), ExitStack() as pins:
                damaged: set[int] = set()
                for round_ in range(ROUNDS_MAX):
                    pins.enter_context(self._flights.pinned(content.layer, found.spans))
                    await self._get(index, row, content, found, looked, round_ > 0, damaged)
                    looked = self._flights.landings
                    found = await self._in_thread(self._held.load, row, content, offset, size)
                    if isinstance(found, bytes):
                        return found
        raise SourceError(f"{self.name(row)}: what is fetched is lost again and again before it can be read")

    @contextmanager
    def _urgency(self) -> Iterator[None]:
        """Somebody waits for what is fetched now."""
        self._urgent += 1
        if self._urgent == 1:
            self._quiet = trio.Event()
            if self._coming is not None:
                self._coming.urge(True)
        try:
            yield
        finally:
            self._urgent -= 1
            if not self._urgent:
                self._quiet.set()
                if self._coming is not None:
                    self._coming.urge(False)

    async def _get(
        self,
        index: int,
        row: Row,
        content: LayerContent,
        found: Missing,
        looked: int,
        again: bool,
        damaged: set[int],
    ) -> None:
        """Have what is missing fetched; when it was looked for, there had been `looked` landings.  Raises SourceError.

        What is `damaged`, here or on its way here or by a mirror, is fetched once more for this read, from the registry; what is so
        then as well is the registry's.  `again`: something was fetched for it before.
        """
        landed = {number: self._flights.landing(content.layer, number) for number in found.spans}
        wanted = [number for number in found.spans if number in found.holes or not landed[number]]
        wanted = [number for number in wanted if landed[number] <= looked]
        flights = self._flights.fly(content.layer, wanted, found.spans)
        if flights:
            self._flights.fly_ahead(content.layer, self._readahead.missed(index, found.spans, self._spans_of(row, content)))
            if row.size_bytes <= SMALL_BYTES:
                for ahead in reversed(self._neighbours.missed(content.layer, index, found.spans.start)):
                    self._flights.fly_ahead(content.layer, ahead)
        if not flights and max(landed.values()) <= looked:
            # All of it was fetched and is there, and nobody has touched it since it was looked at.
            if damaged.issuperset(found.spans):
                raise SourceError(
                    f"{self.name(row)}: the registry's copy of {self._layers[content.layer]} is damaged: "
                    f"part {found.chunk + 1} of the file is not what its digest says"
                )
            damaged.update(found.spans)
            print(f"{self.name(row)}: what was fetched of it is damaged; it is fetched again", file=sys.stderr, flush=True)
            self._fetcher.distrust_mirrors()
            part = chunk_of(row, content, found.chunk)
            place = self._spool.place(content) + part.begin
            await self._flights.give_up(content.layer, found.spans, partial(self._spool.free, place, part.size))
        for flight in flights:
            try:
                # The first time, no longer than until what is read has come; if that was not right, the whole flight.
                await self._flights.arrival(flight, None if again else found.end)
            except SourceError:
                if not flight.unasked:
                    raise  # else it is asked for now, in the next round

    def name(self, row: Row) -> str:
        """An object, for a reason."""
        return self._held.name(row)

    def _fetch_ahead(self, index: int, row: Row, content: LayerContent, offset: int) -> None:
        """A read was answered, at that offset of what is stored of the object."""
        if index in self._readahead:
            span = self._spans.at(content.layer, content.offset + offset)
            self._flights.fly_ahead(content.layer, self._readahead.found(index, span, self._spans_of(row, content)))

    def _spans_of(self, row: Row, content: LayerContent) -> range:
        end = content.offset + stored_bytes(row, content)
        return range(self._spans.at(content.layer, content.offset), self._spans.at(content.layer, end - 1) + 1)

    # --- for whom all is wanted ---

    @property
    def layers(self) -> int:
        return len(self._layers)

    async def missing(self, layer: int) -> list[tuple[int, int]]:
        """First and last of the spans to bring, in ranges of RUN_BYTES_MAX, of objects that are not here."""
        return await trio.to_thread.run_sync(self._missing_runs, layer)

    async def bring(self, layer: int, first: int, last: int) -> None:
        """Fetch these spans, for whoever reads them later.  Raises SourceError."""
        needed = range(first, last + 1)
        for flight in self._flights.fly(layer, self._flights.unknown(layer, needed), needed, unasked=True):
            await self._flights.arrival(flight)

    async def quiet(self) -> None:
        """Wait until no read waits for something to be fetched."""
        while self._urgent:
            await self._quiet.wait()

    async def room(self) -> None:
        """Wait until half of the spool is free, as long as there is something whole in it for the parent to publish.

        Where nothing is, nothing would come of waiting: what is there waits for the rest of itself, or is larger than the spool.
        """
        while self._untaken and not self._flights.is_half_empty:
            await self._freed.wait()

    def compressed_bytes(self, layer: int, first: int, last: int) -> int:
        span = self._spans.run(layer, first, last)
        return span.stop - span.first

    def _missing_runs(self, layer: int) -> list[tuple[int, int]]:
        runs: list[tuple[int, int]] = []
        for number in range(self._spans.count(layer)):
            begin, end = self._spans.bounds(layer, number)
            if not any(
                self._held.lacks(row, content, begin, end) for _, row, content in self._spans.objects(layer, begin, end)
            ):
                continue
            if runs and runs[-1][1] == number - 1 and end - self._spans.bounds(layer, runs[-1][0])[0] <= RUN_BYTES_MAX:
                runs[-1] = (runs[-1][0], number)
            else:
                runs.append((number, number))
        return runs

    async def inherited(self) -> None:
        """An earlier server has used this spool: tell of what it has left whole in there."""
        self._flights.has_inherited = True
        whole = await self._in_thread(self._find_whole)
        if whole:
            self._is_whole(whole)

    def _is_whole(self, rows: list[int]) -> None:
        self._untaken.update(rows)
        self._completed(rows)

    def _find_whole(self) -> list[int]:
        return [index for index, row, content in self._spool.objects() if self._held.is_whole(row, content)]

    async def taken(self, rows: Sequence[int]) -> None:
        """The parent has had these objects: give up what is in the spool of those that are in OBJECTS now.

        The others were not what they should be, or it has another spool.  They stay for who reads them: a fetch may be writing there.
        """
        await self._in_thread(self._free, rows)
        self._untaken.difference_update(rows)
        freed, self._freed = self._freed, trio.Event()
        freed.set()

    def _free(self, rows: Sequence[int]) -> None:
        for index in rows:
            row = self._table.row(index)
            if self._held.has(row):
                self._spool.free_object(row, decode_content(row))

    # --- threads and their clients ---

    async def _in_thread(self, run: Callable[..., T], *arguments: Any) -> T:
        return await trio.to_thread.run_sync(run, *arguments, abandon_on_cancel=True, limiter=self._loads)
