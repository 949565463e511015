"""The content of an image, fetched from the registry as it is read: the Source of an image mount.

    OBJECTS → the spool → a range of an unmodified layer, by way of the spool

What is read is a *chunk* of an object (`held`); it is answered from memory in which its digest has just been found right.  What is
fetched is a *span* of a layer (`checkpoints`), or several that follow one another; all of it that belongs to
objects goes to the spool, checked or not, so nothing is fetched twice because a chunk and a span do not end together, or because
its readers wanted other parts or objects of it.  Who wants a span that is on its way waits for it.

Bounds.  A read holds no bytes before all that it needs is in the spool, and then it takes its turn (LOADS_MAX); a fetch holds little,
however long it is (`fetching`), and takes its turn, too (FETCHES_MAX).  Reads of what is there never wait for a fetch.  The spool is
held to its bound by giving up what was fetched first, except for what somebody waits for, and as many may wait as fit into it.
"""

from __future__ import annotations

import errno
import sys
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import trio

from actors.image.layers.checkpoints import Spans
from actors.image.layers.content import LayerContent, chunk_of, decode_content, stored_bytes
from actors.image.lazy.coming import Coming
from actors.image.lazy.fetching import Fetcher
from actors.image.lazy.held import Held, Missing
from actors.image.lazy.readahead import Neighbours, Readahead
from actors.image.lazy.spool import MEMORY_BYTES, Spool
from actors.image.registry.repository import Registry
from actors.lazytree.server import SourceError
from actors.lazytree.table import ObjectTable, Row

T = TypeVar("T")

LOADS_MAX = 6  # reads that are answered at once; each holds up to 3 MiB
FETCHES_MAX = 12  # ranges on their way at once; each holds 1 MiB
RUN_BYTES_MAX = 4 << 20  # decompressed bytes, about, that one range is for
WAITING_BYTES, WAITING_MIN = 8 << 20, 8  # of the spool, for each read that waits for a fetch: the spans of a mebibyte, amply
SMALL_BYTES = 256 << 10  # an object whose neighbours in its layer are wanted with it
AHEAD_SPANS, AHEAD_MAX, AHEAD_QUEUE = 2, 4, 32  # fetched ahead in one range; on their way at once; ranges that wait
ROUNDS_MAX = 16  # of fetching what somebody then took away


class _Flight:
    """Spans on their way, and how many wait for them."""

    def __init__(self, layer: int, first: int, last: int, unasked: bool) -> None:
        self.layer, self.first, self.last = layer, first, last
        self.unasked = unasked  # nobody waited when it began
        self.is_torn = False  # the spool was emptied or changed under it
        self.landed = trio.Event()
        self.through = 0  # of the layer: all of the flight before it is in the spool
        self.moved = trio.Event()  # `through` or `landed` has changed
        self.error = ""
        self.waiting = 0
        self.is_of_use = False  # some of it was read already
        self.scope = trio.CancelScope()

    @property
    def spans(self) -> list[tuple[int, int]]:
        return [(self.layer, number) for number in range(self.first, self.last + 1)]

    def move(self) -> None:
        moved, self.moved = self.moved, trio.Event()
        moved.set()

    def land(self) -> None:
        self.landed.set()
        self.moved.set()


class RegistrySource:
    """Content of the objects in `table`, which lie in `spans` of the layers with these digests of the image `reference`.

    `objects`: OBJECTS' descriptor.  `connect` makes a client for the image's repository; up to FETCHES_MAX of them are used at once.
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
        self._spool_bytes_max = self._disk_bytes_max = spool_bytes_max
        self._completed = completed
        self._coming = coming
        self._loads = trio.CapacityLimiter(LOADS_MAX)
        self._fetches = trio.CapacityLimiter(FETCHES_MAX)
        self._flights: dict[tuple[int, int], _Flight] = {}
        self._landings = 0
        # The spans that were fetched, the longest ago first: which landing it was; 0 if what came need not be what is there.
        self._landed: dict[tuple[int, int], int] = {}
        self._nursery: trio.Nursery | None = None
        self._running = trio.Event()
        self._giving_up = trio.Lock()
        self._pins: Counter[tuple[int, int]] = Counter()  # the spans that somebody waits for or is about to read
        self._waiting = trio.CapacityLimiter(max(WAITING_MIN, spool_bytes_max // WAITING_BYTES))
        self._has_inherited = False
        self._fetching_s = 0.0
        self._in_the_air, self._began_s = 0, 0.0
        self._readahead, self._neighbours = Readahead(), Neighbours()
        self._ahead: deque[tuple[int, range]] = deque(maxlen=AHEAD_QUEUE)
        self._flying_ahead = 0
        self._urgent, self._quiet = 0, trio.Event()  # reads that wait for a fetch, and when there are none any more
        self._quiet.set()
        self._freed = trio.Event()  # something in the spool has been given up for OBJECTS

    @property
    def fetched(self) -> tuple[int, float]:
        """Compressed bytes that were fetched so far, and for how many seconds something was on its way."""
        now = trio.current_time()
        return self._fetcher.fetched_bytes, self._fetching_s + (now - self._began_s if self._in_the_air else 0.0)

    @contextmanager
    def _fetching(self) -> Iterator[None]:
        if not self._in_the_air:
            self._began_s = trio.current_time()
        self._in_the_air += 1
        try:
            yield
        finally:
            self._in_the_air -= 1
            if not self._in_the_air:
                self._fetching_s += trio.current_time() - self._began_s

    async def run(self) -> None:
        """Fetch what is wanted, for as long as this is not cancelled."""
        self._trio = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as self._nursery:
            self._running.set()
            await trio.sleep_forever()

    # --- reading ---

    async def read(self, index: int, row: Row, offset: int, size: int) -> bytes:
        """`size` bytes at `offset` of the object, checked.  Raises SourceError."""
        content = decode_content(row)
        await self._running.wait()
        looked = self._landings
        found = await self._in_thread(self._loads, self._held.load, row, content, offset, size)
        if isinstance(found, bytes):
            self._fetch_ahead(index, row, content, offset if content.extents is None else 0)
            return found
        async with self._waiting:
            while self._coming is not None and await self._coming.arrival(index, found.chunk):
                looked = self._landings
                found = await self._in_thread(self._loads, self._held.load, row, content, offset, size)
                if isinstance(found, bytes):
                    return found
            with self._urgency(), ExitStack() as pins:
                damaged: set[int] = set()
                for round_ in range(ROUNDS_MAX):
                    pins.enter_context(self._pinned(content.layer, found.spans))
                    await self._get(index, row, content, found, looked, round_ > 0, damaged)
                    looked = self._landings
                    found = await self._in_thread(self._loads, self._held.load, row, content, offset, size)
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
        landed = {number: self._landed.get((content.layer, number), 0) for number in found.spans}
        wanted = [number for number in found.spans if number in found.holes or not landed[number]]
        wanted = [number for number in wanted if landed[number] <= looked]
        flights = self._fly(content.layer, wanted, found.spans)
        if flights:
            self._fly_ahead(content.layer, self._readahead.missed(index, found.spans, self._spans_of(row, content)))
            if row.size_bytes <= SMALL_BYTES:
                for ahead in reversed(self._neighbours.missed(content.layer, index, found.spans.start)):
                    self._fly_ahead(content.layer, ahead)
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
            await self._give_up(content.layer, found.spans, partial(self._spool.free, place, part.size))
        for flight in flights:
            try:
                # The first time, no longer than until what is read has come; if that was not right, the whole flight.
                await self._arrival(flight, None if again else found.end)
            except SourceError:
                if not flight.unasked:
                    raise  # else it is asked for now, in the next round

    @contextmanager
    def _pinned(self, layer: int, spans: range) -> Iterator[None]:
        """Nothing of these spans is given up meanwhile."""
        pins = [(layer, number) for number in spans]
        self._pins.update(pins)
        try:
            yield
        finally:
            self._pins.subtract(pins)
            for span in pins:
                if not self._pins[span]:
                    del self._pins[span]

    def name(self, row: Row) -> str:
        """An object, for a reason."""
        return self._held.name(row)

    # --- fetching ---

    def _fly(self, layer: int, wanted: Sequence[int], needed: range, unasked: bool = False) -> list[_Flight]:
        """Who brings the spans `wanted`, and those of `needed` that are on their way already."""
        flights: list[_Flight] = []
        begun: list[_Flight] = []
        for number in needed:
            flight = self._flights.get((layer, number))
            if flight is None:
                if number not in wanted:
                    continue
                if begun and begun[-1].last == number - 1 and self._fits(begun[-1], number):
                    flight, begun[-1].last = begun[-1], number
                else:
                    flight = _Flight(layer, number, number, unasked)
                    begun.append(flight)
                self._flights[layer, number] = flight
            if flight not in flights:
                flights.append(flight)
        assert self._nursery is not None
        for flight in begun:
            self._nursery.start_soon(self._bring, flight)
        return flights

    def _fetch_ahead(self, index: int, row: Row, content: LayerContent, offset: int) -> None:
        """A read was answered, at that offset of what is stored of the object."""
        if index in self._readahead:
            span = self._spans.at(content.layer, content.offset + offset)
            self._fly_ahead(content.layer, self._readahead.found(index, span, self._spans_of(row, content)))

    def _fly_ahead(self, layer: int, ahead: range) -> None:
        """Bring spans for which nobody waits yet, a few at a time: who comes to wait for one of them waits for those with it, too."""
        for first in reversed(range(ahead.start, ahead.stop, AHEAD_SPANS)):
            self._ahead.append((layer, range(first, min(first + AHEAD_SPANS, ahead.stop))))
        self._go_ahead()

    def _go_ahead(self) -> None:
        """The newest first; with what is wanted more urgently they share the link."""
        while self._ahead and self._flying_ahead < AHEAD_MAX and self._nursery is not None:
            layer, ahead = self._ahead.pop()
            is_full = not self._spool.has_ample_room or self._spool.used_bytes > self._spool_bytes_max // 2
            if is_full or ahead.start >= self._spans.count(layer):
                continue
            ahead = range(ahead.start, min(ahead.stop, self._spans.count(layer)))
            wanted = [
                number for number in ahead if not self._landed.get((layer, number)) and (layer, number) not in self._flights
            ]
            if wanted:
                self._flying_ahead += 1
                self._nursery.start_soon(
                    self._bring_ahead, self._fly(layer, wanted, range(wanted[0], wanted[-1] + 1), unasked=True)
                )

    async def _bring_ahead(self, flights: Sequence[_Flight]) -> None:
        try:
            for flight in flights:
                await flight.landed.wait()
        finally:
            self._flying_ahead -= 1
            self._go_ahead()

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
        wanted = [number for number in needed if not self._landed.get((layer, number))]
        for flight in self._fly(layer, wanted, needed, unasked=True):
            await self._arrival(flight)

    async def quiet(self) -> None:
        """Wait until no read waits for something to be fetched."""
        while self._urgent:
            await self._quiet.wait()

    async def room(self) -> None:
        """Wait until half of the spool is free: the parent publishes what is whole in it."""
        while self._spool.used_bytes > self._spool_bytes_max // 2:
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

    def _fits(self, flight: _Flight, number: int) -> bool:
        return self._spans.bounds(flight.layer, number)[1] - self._spans.bounds(flight.layer, flight.first)[0] <= RUN_BYTES_MAX

    async def _arrival(self, flight: _Flight, end: int | None = None) -> None:
        """Wait for a flight, or until it has brought all before the layer's byte `end`.  Raises SourceError.

        When the last one who waits has gone, and nobody has got what he waited for, it is given up.
        """
        flight.waiting += 1
        try:
            while not flight.landed.is_set():
                if end is not None and flight.through >= end:
                    flight.is_of_use = True
                    return
                await flight.moved.wait()
        finally:
            flight.waiting -= 1
            if not (flight.waiting or flight.is_of_use or flight.landed.is_set()):
                flight.scope.cancel()
                self._forget(flight)
        if flight.error:
            raise SourceError(flight.error)

    def _forget(self, flight: _Flight) -> None:
        for span in flight.spans:
            if self._flights.get(span) is flight:
                del self._flights[span]

    def _followed(self, flight: _Flight, through: int) -> None:
        """It has come so far.  In the thread that brings it."""
        flight.through = through  # before `waiting` is looked at: who begins to wait now looks at it after that
        if flight.waiting:
            self._trio.run_sync_soon(flight.move)

    async def _bring(self, flight: _Flight) -> None:
        rows: list[int] = []
        try:
            with flight.scope, self._fetching():
                self._use_disk_again()
                await self._make_room(self._spool_bytes_max)
                distrusted = self._fetcher.mirrors_distrusted
                for make_room in (partial(self._make_room, 0), self._use_memory, None):
                    try:
                        flight.through, flight.is_torn = 0, False
                        rows = await self._in_thread(
                            self._fetches,
                            self._fetcher.transfer,
                            flight.layer,
                            flight.first,
                            flight.last,
                            partial(self._followed, flight),
                        )
                        break
                    except OSError as error:
                        is_waited_for = flight.waiting or not flight.unasked
                        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or make_room is None or not is_waited_for:
                            raise
                        await make_room()
                self._landings += 1
                is_right = (
                    not flight.is_torn and distrusted == self._fetcher.mirrors_distrusted
                )  # else a mirror may have sent it
                for span in flight.spans:
                    self._landed.pop(span, None)
                    self._landed[span] = self._landings if is_right else 0
        except SourceError as error:
            flight.error = error.reason
        except OSError as error:
            flight.error = f"{self._reference}: what is fetched cannot be kept on this node: {error.strerror}"
        except Exception as error:  # noqa: BLE001 (a fault of one fetch must not be the end of the mount)
            traceback.print_exc()
            flight.error = f"{self._reference}: {type(error).__name__}: {error}"
        finally:
            self._forget(flight)
            flight.land()
        if rows:
            self._completed(rows)

    # --- the spool's room ---

    async def _make_room(self, bytes_max: int) -> None:
        """Give up what was fetched first, until the spool has no more than that, or only what somebody waits for."""
        async with self._giving_up:
            while self._spool.used_bytes > bytes_max:
                if self._has_inherited:
                    self._has_inherited = False
                    self._forget_all()
                    self._spool.clear()
                    return
                oldest = next((span for span in self._landed if span not in self._pins and span not in self._flights), None)
                if oldest is None:
                    return  # those who wait for it are few
                layer, number = oldest
                await self._give_up(layer, range(number, number + 1), partial(self._free_span, layer, number))
                self._landed.pop(oldest, None)

    async def _use_memory(self) -> None:
        """The disk is full, and nothing of it is ours to give up: a little is kept in memory, so that who reads has what it asks for."""
        if not self._spool.in_memory:
            print(
                f"{self._reference}: the disk of its content is full; it is read without being kept",
                file=sys.stderr,
                flush=True,
            )
            self._spool.to_memory()
            self._forget_all()
            self._spool_bytes_max = min(self._disk_bytes_max, MEMORY_BYTES)
            longest_bytes = await trio.to_thread.run_sync(lambda: self._spans.longest_bytes)
            self._waiting.total_tokens = min(WAITING_MIN, max(1, MEMORY_BYTES // (2 * longest_bytes)))

    def _use_disk_again(self) -> None:
        if self._spool.in_memory and self._spool.disk_has_room:
            self._spool.to_disk()
            self._forget_all()
            self._spool_bytes_max = self._disk_bytes_max
            self._waiting.total_tokens = max(WAITING_MIN, self._disk_bytes_max // WAITING_BYTES)

    def _forget_all(self) -> None:
        """Nothing of what was fetched is there any more."""
        self._landed.clear()
        for flight in self._flights.values():
            flight.is_torn = True

    async def _give_up(self, layer: int, numbers: range, free: Callable[[], None]) -> None:
        """Give up what `free` does of these spans, none of which is on its way.

        Nobody brings them meanwhile: a page that is half written when it is given up is no hole, and not right.
        """
        flight = _Flight(layer, numbers.start, numbers.stop - 1, unasked=True)
        for span in flight.spans:
            self._flights[span] = flight
            self._landed[span] = 0
        try:
            with trio.CancelScope(shield=True):
                await self._in_thread(self._loads, free)
        finally:
            self._forget(flight)
            flight.land()

    def _free_span(self, layer: int, number: int) -> None:
        begin, end = self._spans.bounds(layer, number)
        for _, row, content in self._spans.objects(layer, begin, end):
            first, stop = max(begin, content.offset), min(end, content.offset + stored_bytes(row, content))
            self._spool.free(self._spool.place(content) + first - content.offset, stop - first)

    async def inherited(self) -> None:
        """An earlier server has used this spool: tell of what it has left whole in there."""
        self._has_inherited = True
        whole = await self._in_thread(self._loads, self._find_whole)
        if whole:
            self._completed(whole)

    def _find_whole(self) -> list[int]:
        return [index for index, row, content in self._spool.objects() if self._held.is_whole(row, content)]

    async def taken(self, rows: Sequence[int]) -> None:
        """The parent has had these objects: give up what is in the spool of those that are in OBJECTS now.

        The others were not what they should be, or it has another spool.  They stay for who reads them: a fetch may be writing there.
        """
        await self._in_thread(self._loads, self._free, rows)
        freed, self._freed = self._freed, trio.Event()
        freed.set()

    def _free(self, rows: Sequence[int]) -> None:
        for index in rows:
            row = self._table.row(index)
            if self._held.has(row):
                self._spool.free_object(row, decode_content(row))

    # --- threads and their clients ---

    async def _in_thread(self, limiter: trio.CapacityLimiter, run: Callable[..., T], *arguments: Any) -> T:
        return await trio.to_thread.run_sync(run, *arguments, abandon_on_cancel=True, limiter=limiter)
