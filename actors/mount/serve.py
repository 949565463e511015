"""The process "workspace mount TASK": the LAZY layer of one task's workspace."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import trio

from actors.lazytree.server import drop_privileges, serve_tree
from actors.lazytree.table import ObjectTable
from actors.lazytree.wire import Progress, ReadFailed, Ready, ServeTree
from actors.mount.source import DirectorySource
from actors.mount.wire import ReadWhole
from supervisor.channel import Channel
from supervisor.frames import Codec, Message

GATHERED_S = 0.2
ROWS_MAX = 4096  # in one message


def serve(end: socket.socket, descriptors: list[int], arguments: bytes) -> None:
    """Serve a `ServeTree` on the one descriptor, a FUSE connection, until its mount is gone."""
    order: ServeTree = Codec(ServeTree).decode(arguments)
    [fuse_descriptor] = descriptors
    try:
        table = ObjectTable(order.table)
    except FileNotFoundError:
        raise SystemExit(f"{order.table} is gone, and the task with it") from None
    readings = Readings()
    source = DirectorySource(order.store, os.fsencode(order.aside), readings.add)
    drop_privileges(order.uid, order.gid)
    channel = Channel(end, Codec(Ready, Progress, ReadFailed))
    serve_tree(channel, fuse_descriptor, order, table, source, beside=readings.tell_on)


class Readings:
    """Which objects have been read as a whole: said to the parent, some at a time, so that the next task finds them in OBJECTS.

    What is lost with a killed server is cached another time.
    """

    def __init__(self) -> None:
        self._untold: set[int] = set()
        self._more = trio.Event()

    def add(self, index: int) -> None:
        self._untold.add(index)
        self._more.set()

    async def tell_on(self, tell: Callable[[Message], None]) -> None:
        while True:
            await self._more.wait()
            await trio.sleep(GATHERED_S)
            self._more = trio.Event()
            rows = sorted(self._untold)
            self._untold.clear()
            for first in range(0, len(rows), ROWS_MAX):
                tell(ReadWhole(rows[first : first + ROWS_MAX]))
