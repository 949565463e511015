"""Fetching all of an image that is not here, behind whatever is read of it.

One layer after another, in long ranges, some at once; never while a read waits for something to be fetched, never more of what could be
published and is not yet than half the spool holds, no faster than told, and not so much that the disk of OBJECTS becomes full.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

import trio

from actors.image.lazy.source import RegistrySource
from actors.lazytree.server import SourceError

FREE_SHARE_MIN = 0.1  # of the file system of OBJECTS

_libc = ctypes.CDLL(None)


class Filling:
    """`parallel`: ranges at once.  `bytes_per_s`: compressed ones, 0 for as fast as they come.  `delay_s`: before the first."""

    def __init__(self, source: RegistrySource, objects: int, parallel: int, bytes_per_s: int, delay_s: float) -> None:
        self._source = source
        self._objects = objects
        self._places = trio.CapacityLimiter(parallel)
        self._bytes_per_s = bytes_per_s
        self._delay_s = delay_s
        self._free_at = 0.0

    async def run(self, say: Callable[[str], None]) -> None:
        """Until all is here, or something is wrong with it, which is said: what is read later is tried again."""
        await trio.sleep(self._delay_s)
        await self._fill(say)
        _libc.malloc_trim(0)  # an image that is all here needs no more of its server than that it is there

    async def _fill(self, say: Callable[[str], None]) -> None:
        try:
            for layer in range(self._source.layers):
                async with trio.open_nursery() as nursery:
                    for first, last in await self._source.missing(layer):
                        await self._turn(layer, first, last)
                        await self._places.acquire_on_behalf_of((layer, first))
                        nursery.start_soon(self._bring, layer, first, last)
        except* _Enough as enough:
            say(str(enough.exceptions[0]))
        except* SourceError as errors:
            say(str(errors.exceptions[0]))

    async def _turn(self, layer: int, first: int, last: int) -> None:
        """Wait until it is this range's turn.  Raises _Enough."""
        now = trio.current_time()
        begins_at = max(now, self._free_at)
        if self._bytes_per_s:
            self._free_at = begins_at + self._source.compressed_bytes(layer, first, last) / self._bytes_per_s
        await trio.sleep_until(begins_at)
        await self._source.quiet()
        await self._source.room()
        disk = os.fstatvfs(self._objects)
        if disk.f_bavail < FREE_SHARE_MIN * disk.f_blocks:
            raise _Enough("not all of the image is fetched ahead: the disk is nearly full")

    async def _bring(self, layer: int, first: int, last: int) -> None:
        try:
            await self._source.bring(layer, first, last)
        finally:
            self._places.release_on_behalf_of((layer, first))


class _Enough(Exception):
    pass
