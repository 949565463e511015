"""Spans of an image's layers on their way to the spool, and the spool's room for them.

Each span has at most one *flight*, which brings it with others that follow one another, or gives up what is there of it.  Who wants a
span that is on its way waits for it.  The spool is held to its bound by giving up what was fetched first, except for what somebody waits
for.
"""

from __future__ import annotations

import errno
import sys
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import trio

from actors.image.layers.checkpoints import Spans
from actors.image.layers.content import stored_bytes
from actors.image.lazy.fetching import Fetcher
from actors.image.lazy.spool import MEMORY_BYTES, Spool
from actors.lazytree.server import SourceError

FETCHES_MAX = 12  # ranges on their way at once; each holds 1 MiB
AHEAD_SPANS, AHEAD_MAX, AHEAD_QUEUE = 2, 4, 32  # brought ahead in one range; on their way at once; ranges that wait
RUN_BYTES_MAX = 4 << 20  # decompressed bytes, about, that one range is for
WAITING_BYTES, WAITING_MIN = 8 << 20, 8  # of the spool, for each read that waits for a fetch: the spans of a mebibyte, amply


class Flight:
    """Spans of a layer on their way, the `first` to the `last`."""

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


class Flights:
    """All of a mount's.

    `reference`: the image's.  `completed` is told, in trio's thread, of objects that are whole in the spool.  `run` it.
    """

    def __init__(
        self,
        spans: Spans,
        reference: str,
        spool: Spool,
        fetcher: Fetcher,
        spool_bytes_max: int,
        completed: Callable[[list[int]], None],
    ) -> None:
        self.running = trio.Event()
        self.landings = 0
        self.readers = trio.CapacityLimiter(max(WAITING_MIN, spool_bytes_max // WAITING_BYTES))  # as many may wait for flights
        self.has_inherited = False  # something of an earlier server's, of which it is not known when it came, is in the spool
        self._spans = spans
        self._reference = reference
        self._spool = spool
        self._fetcher = fetcher
        self._spool_bytes_max = self._disk_bytes_max = spool_bytes_max
        self._completed = completed
        self._fetches = trio.CapacityLimiter(FETCHES_MAX)
        self._flights: dict[tuple[int, int], Flight] = {}
        # The spans that were fetched, the longest ago first: which landing it was; 0 if what came need not be what is there.
        self._landed: dict[tuple[int, int], int] = {}
        self._pins: Counter[tuple[int, int]] = Counter()  # the spans that somebody waits for or is about to read
        self._ahead: deque[tuple[int, range]] = deque(maxlen=AHEAD_QUEUE)
        self._flying_ahead = 0
        self._nursery: trio.Nursery | None = None
        self._making_room = trio.Lock()
        self._fetching_s = 0.0
        self._in_the_air, self._began_s = 0, 0.0

    async def run(self) -> None:
        """Fetch what is wanted, for as long as this is not cancelled."""
        self._trio = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as self._nursery:
            self.running.set()
            await trio.sleep_forever()

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

    # --- for who wants a span ---

    def landing(self, layer: int, number: int) -> int:
        """Which landing has brought the span; 0 if none has, or what came need not be what is there."""
        return self._landed.get((layer, number), 0)

    def unknown(self, layer: int, numbers: Iterable[int]) -> list[int]:
        """Those of the spans that were not fetched, and are not on their way."""
        return [number for number in numbers if not self.landing(layer, number) and (layer, number) not in self._flights]

    def fly(self, layer: int, wanted: Sequence[int], needed: range, unasked: bool = False) -> list[Flight]:
        """Who brings the spans `wanted`, and those of `needed` that are on their way already."""
        flights: list[Flight] = []
        begun: list[Flight] = []
        for number in needed:
            flight = self._flights.get((layer, number))
            if flight is None:
                if number not in wanted:
                    continue
                if begun and begun[-1].last == number - 1 and self._fits(begun[-1], number):
                    flight, begun[-1].last = begun[-1], number
                else:
                    flight = Flight(layer, number, number, unasked)
                    begun.append(flight)
                self._flights[layer, number] = flight
            if flight not in flights:
                flights.append(flight)
        assert self._nursery is not None
        for flight in begun:
            self._nursery.start_soon(self._bring, flight)
        return flights

    def fly_ahead(self, layer: int, ahead: range) -> None:
        """Bring spans for which nobody waits yet, a few at a time: who comes to wait for one of them waits for those with it, too."""
        for first in reversed(range(ahead.start, ahead.stop, AHEAD_SPANS)):
            self._ahead.append((layer, range(first, min(first + AHEAD_SPANS, ahead.stop))))
        self._go_ahead()

    def _go_ahead(self) -> None:
        """The newest first; with what is wanted more urgently they share the link."""
        assert self._nursery is not None
        while self._ahead and self._flying_ahead < AHEAD_MAX:
            layer, ahead = self._ahead.pop()
            if not (self._spool.has_ample_room and self.is_half_empty):
                continue
            wanted = self.unknown(layer, range(ahead.start, min(ahead.stop, self._spans.count(layer))))
            if wanted:
                self._flying_ahead += 1
                flights = self.fly(layer, wanted, range(wanted[0], wanted[-1] + 1), unasked=True)
                self._nursery.start_soon(self._bring_ahead, flights)

    async def _bring_ahead(self, flights: Sequence[Flight]) -> None:
        try:
            for flight in flights:
                await flight.landed.wait()
        finally:
            self._flying_ahead -= 1
            self._go_ahead()

    async def arrival(self, flight: Flight, end: int | None = None) -> None:
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

    @contextmanager
    def pinned(self, layer: int, spans: range) -> Iterator[None]:
        """Nothing of these spans is given up meanwhile to make room."""
        pins = [(layer, number) for number in spans]
        self._pins.update(pins)
        try:
            yield
        finally:
            self._pins.subtract(pins)
            for span in pins:
                if not self._pins[span]:
                    del self._pins[span]

    # --- bringing them ---

    def _fits(self, flight: Flight, number: int) -> bool:
        return self._spans.bounds(flight.layer, number)[1] - self._spans.bounds(flight.layer, flight.first)[0] <= RUN_BYTES_MAX

    def _forget(self, flight: Flight) -> None:
        for span in flight.spans:
            if self._flights.get(span) is flight:
                del self._flights[span]

    def _followed(self, flight: Flight, through: int) -> None:
        """It has come so far.  In the thread that brings it."""
        flight.through = through  # before `waiting` is looked at: who begins to wait now looks at it after that
        if flight.waiting:
            self._trio.run_sync_soon(flight.move)

    async def _bring(self, flight: Flight) -> None:
        rows: list[int] = []
        try:
            with flight.scope, self._fetching():
                self._use_disk_again()
                await self._make_room(self._spool_bytes_max)
                distrusted = self._fetcher.mirrors_distrusted
                rows = await self._transfer(flight)
                self.landings += 1
                is_right = (
                    not flight.is_torn and distrusted == self._fetcher.mirrors_distrusted
                )  # else a mirror may have sent it
                for span in flight.spans:
                    self._landed.pop(span, None)
                    self._landed[span] = self.landings if is_right else 0
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

    async def _transfer(self, flight: Flight) -> list[int]:
        """→ the objects that are whole now.  On a full disk there is room to be made, twice.  Raises SourceError, OSError."""
        for make_room in (partial(self._make_room, 0), self._use_memory, None):
            flight.through, flight.is_torn = 0, False
            try:
                return await trio.to_thread.run_sync(
                    self._fetcher.transfer,
                    flight.layer,
                    flight.first,
                    flight.last,
                    partial(self._followed, flight),
                    abandon_on_cancel=True,
                    limiter=self._fetches,
                )
            except OSError as error:
                is_waited_for = flight.waiting or not flight.unasked
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or make_room is None or not is_waited_for:
                    raise
                await make_room()
        raise AssertionError("the last try returns or raises")

    # --- the spool's room ---

    @property
    def is_half_empty(self) -> bool:
        """Whether there is room also for what nobody has asked for yet."""
        return self._spool.used_bytes <= self._spool_bytes_max // 2

    async def give_up(self, layer: int, numbers: range, free: Callable[[], None]) -> None:
        """Give up what `free` does of these spans, none of which is on its way.

        Nobody brings them meanwhile: a page that is half written when it is given up is no hole, and not right.
        """
        flight = Flight(layer, numbers.start, numbers.stop - 1, unasked=True)
        flight.is_of_use = True  # it does not end when the last one who waits for it goes
        for span in flight.spans:
            self._flights[span] = flight
            self._landed[span] = 0
        try:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(free)
        finally:
            self._forget(flight)
            flight.land()

    async def _make_room(self, bytes_max: int) -> None:
        """Give up what was fetched first, until the spool has no more than that, or only what somebody waits for."""
        async with self._making_room:
            while self._spool.used_bytes > bytes_max:
                if self.has_inherited:
                    self.has_inherited = False
                    self._forget_all()
                    self._spool.clear()
                    return
                oldest = next((span for span in self._landed if span not in self._pins and span not in self._flights), None)
                if oldest is None:
                    return  # those who wait for it are few
                layer, number = oldest
                await self.give_up(layer, range(number, number + 1), partial(self._free_span, layer, number))
                self._landed.pop(oldest, None)

    def _free_span(self, layer: int, number: int) -> None:
        begin, end = self._spans.bounds(layer, number)
        for _, row, content in self._spans.objects(layer, begin, end):
            first, stop = max(begin, content.offset), min(end, content.offset + stored_bytes(row, content))
            self._spool.free(self._spool.place(content) + first - content.offset, stop - first)

    def _forget_all(self) -> None:
        """Nothing of what was fetched is there any more."""
        self._landed.clear()
        for flight in self._flights.values():
            flight.is_torn = True

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
            self.readers.total_tokens = min(WAITING_MIN, max(1, MEMORY_BYTES // (2 * longest_bytes)))

    def _use_disk_again(self) -> None:
        if self._spool.in_memory and self._spool.disk_has_room:
            self._spool.to_disk()
            self._forget_all()
            self._spool_bytes_max = self._disk_bytes_max
            self.readers.total_tokens = max(WAITING_MIN, self._disk_bytes_max // WAITING_BYTES)
