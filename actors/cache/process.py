"""The process "evictor": makes room once, and ends.  SIGKILL at any instruction leaves the sums right and no tree without what it holds."""

from __future__ import annotations

import os
import socket
import time

from actors.cache import archives
from actors.cache.evictor import evict
from actors.cache.sources import Sources
from actors.cache.wire import Evict, Evicted, Progress
from actors.lazytree.ledger import unlinked_bytes
from actors.lazytree.objects import Objects
from supervisor.channel import Channel, ChannelClosed, ChannelTimeout
from supervisor.frames import Codec, Message

ANSWER_TIMEOUT_S = 30.0
HEARTBEAT_S = 0.5


def serve(end: socket.socket, descriptors: list[int], arguments: bytes) -> None:
    """Do the `Evict` in `arguments`; say `Progress` meanwhile, and `Evicted` at the end.  Ends when nobody is at the other end."""
    for descriptor in descriptors:
        os.close(descriptor)
    channel = Channel(end, Codec(Evict))
    order: Evict = channel.codec.decode(arguments)
    said_s = 0.0

    def alive() -> None:
        nonlocal said_s
        if time.monotonic() - said_s >= HEARTBEAT_S:
            said_s = time.monotonic()
            try:
                channel.send(Progress(), timeout_s=0)
            except ChannelTimeout:
                pass

    sources = Sources(order.mirrors, alive)
    objects = Objects(order.objects)
    try:
        archives.record_trees(objects.descriptor, order.archives)
        report = evict(objects, order.object_bytes, sources.has, alive)
        gone = archives.evict(order.archives, order.archive_bytes_max, sources.has)
        answer: Message = Evicted(
            report.objects,
            report.freed_bytes,
            unlinked_bytes(objects.descriptor),
            gone.archives,
            gone.freed_bytes,
            report.short or gone.short,
            "; ".join(dict.fromkeys(sources.refusals))[:1000],
        )
        channel.send(answer, timeout_s=ANSWER_TIMEOUT_S)
    except ChannelClosed:
        return
    finally:
        objects.close()
