"""What a pack is about to bring, announced to an image's server by the process that streams it, in the image's spool.

    behind the spool's content    a number for this announcement, how many chunks, how many of them are through
    a page on                     whether the server fetches something that somebody waits for
    a page on                     the chunks, in the order in which they come

Both have the spool, and neither has anything of the other: either may be killed at any instruction, and the other goes on.  A chunk is
through when it is in the spool or in OBJECTS, or will not come.  A server that lacks a chunk which is announced waits for it, as long
as others come: each is a write to the spool, of which the kernel tells it (inotify).  When none has come for STALL_S, whoever should
bring them is dead or hangs, and the server fetches by itself what it lacks, until one comes again.
"""

from __future__ import annotations

import os
import secrets
import struct
import time
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from inotify_simple import INotify, flags

from actors.image.archives.pack import CHUNKS_MAX, Chunk
from actors.image.lazy.spool import PAGE_BYTES

if TYPE_CHECKING:
    import trio  # loaded by the server alone, when it waits: the root supervisor, which starts sooner without it, loads this module too

STALL_S = 0.5
YIELD_S, YIELD_LOOK_S = 0.1, 0.005  # how long a pack waits for more urgent things before each piece: well below STALL_S
_HEAD = struct.Struct("<QII")
_URGENT = struct.Struct("<I")


class Announced:
    """The announcement in the spool `descriptor`, behind its content (`Spool.end`), as the process that makes it sees it."""

    def __init__(self, descriptor: int, end: int) -> None:
        self._descriptor = descriptor
        self._end = end
        self._count = self._through = 0

    def begin(self, chunks: Sequence[Chunk]) -> None:
        """Announce these.  Raises OSError."""
        self._count, self._through = len(chunks), 0
        os.pwrite(self._descriptor, _HEAD.pack(0, 0, 0), self._end)  # nobody takes half of it for all
        index = array("I", [number for chunk in chunks for number in chunk]).tobytes()
        os.pwrite(self._descriptor, index, self._end + 2 * PAGE_BYTES)
        self._number = secrets.randbits(63) + 1
        self._write()

    def through(self) -> None:
        """One more is through.  Raises OSError."""
        self._through += 1
        self._write()

    def end(self) -> None:
        """No more come.  Raises OSError."""
        if self._count:
            self._through = self._count
            self._write()

    def give_way(self) -> None:
        """Wait while the server fetches something that somebody waits for, YIELD_S at most.  Raises OSError."""
        deadline = time.monotonic() + YIELD_S
        while time.monotonic() < deadline and _URGENT.unpack(_read(self._descriptor, self._end + PAGE_BYTES, _URGENT.size))[0]:
            time.sleep(YIELD_LOOK_S)

    def _write(self) -> None:
        os.pwrite(self._descriptor, _HEAD.pack(self._number, self._count, self._through), self._end)


def end_announcement(descriptor: int, end: int) -> None:
    """Whoever made the announcement in that spool has ended.  Raises OSError."""
    number, count, _ = _HEAD.unpack(_read(descriptor, end, _HEAD.size))
    if number:
        os.pwrite(descriptor, _HEAD.pack(number, count, count), end)


class Coming:
    """The same as the server sees it.  For trio's thread alone."""

    def __init__(self, descriptor: int, end: int) -> None:
        """Before privileges are dropped: the spool is root's.  Raises OSError."""
        self._descriptor = descriptor
        self._end = end
        self._number = 0
        self._places: dict[Chunk, int] = {}
        self._changed: trio.Event | None = None  # while somebody waits
        self._stalled_at: tuple[int, int] | None = None  # this announcement, at this chunk
        self._inotify = INotify()
        self._inotify.add_watch(f"/proc/self/fd/{descriptor}", flags.MODIFY)
        self.urge(False)  # whatever a predecessor has left

    async def arrival(self, row: int, number: int) -> bool:
        """Wait for a chunk if it is announced → whether it is, and is through by now: perhaps since somebody looked for it."""
        through = self._through()
        place = self._places.get(Chunk(row, number))
        if place is None:
            return False
        while through <= place:
            if self._stalled_at == (self._number, through):
                return False
            announcement = self._number
            if not await self._progress(through):
                self._stalled_at = (announcement, through)
                return False
            through = self._through()
            if self._number != announcement:
                return False
        return True

    def urge(self, urgent: bool) -> None:
        """Whether something is fetched that somebody waits for."""
        os.pwrite(self._descriptor, _URGENT.pack(urgent), self._end + PAGE_BYTES)

    def close(self) -> None:
        self._inotify.close()

    def _through(self) -> int:
        number, count, through = _HEAD.unpack(_read(self._descriptor, self._end, _HEAD.size))
        if number != self._number:
            self._number = number
            count = min(count, CHUNKS_MAX)
            numbers = array("I", _read(self._descriptor, self._end + 2 * PAGE_BYTES, 8 * count))
            self._places = {Chunk(*pair): at for at, pair in enumerate(zip(numbers[::2], numbers[1::2], strict=True))}
        return int(through)

    async def _progress(self, before: int) -> bool:
        """Wait until not only `before` are through; False when that is so for STALL_S."""
        import trio

        if self._changed is not None:
            return await _within(STALL_S, self._changed)
        self._changed = trio.Event()
        try:
            with trio.move_on_after(STALL_S) as waited:
                while self._through() == before:
                    await trio.lowlevel.wait_readable(self._inotify.fd)
                    self._inotify.read(timeout=0)
            return not waited.cancelled_caught
        finally:
            self._changed.set()
            self._changed = None


async def _within(time_s: float, event: trio.Event) -> bool:
    import trio

    with trio.move_on_after(time_s) as waited:
        await event.wait()
    return not waited.cancelled_caught


def _read(descriptor: int, place: int, size: int) -> bytes:
    """The bytes there; zeros where nothing was written."""
    return os.pread(descriptor, size, place).ljust(size, b"\0")
