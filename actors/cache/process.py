"""The processes "evictor", which makes room once, and "checker", which looks for what is damaged; then they end.

SIGKILL at any instruction leaves the sums right and no tree without what it holds.
"""

from __future__ import annotations

import ctypes
import os
import socket
import time
from collections.abc import Callable

from actors.cache import archives, checking
from actors.cache.evictor import evict
from actors.cache.messages import Checked
from actors.cache.sources import Sources
from actors.cache.wire import CheckObjects, Evict, Evicted, Progress
from actors.lazytree.ledger import note_short, unlinked_bytes
from actors.lazytree.objects import Objects
from supervisor.channel import Channel, ChannelClosed, ChannelTimeout
from supervisor.frames import Codec, Message

NICE = 15  # and not SCHED_IDLE: who never ran would be taken for hung
ANSWER_TIMEOUT_S = 30.0
HEARTBEAT_S = 0.5
TEXTS_MAX = 50
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}.get(os.uname().machine, -1)
_IOPRIO_WHO_PROCESS, _IOPRIO_CLASS_IDLE = 1, 3 << 13

_libc = ctypes.CDLL(None, use_errno=True)


def serve(end: socket.socket, descriptors: list[int], arguments: bytes) -> None:
    """Do the `Evict` in `arguments`; say `Progress` meanwhile, and `Evicted` at the end.  Ends when nobody is at the other end."""
    for descriptor in descriptors:
        os.close(descriptor)
    channel = Channel(end, Codec(Evict))
    order: Evict = channel.codec.decode(arguments)
    alive = _heartbeat(channel)
    sources = Sources(order.mirrors, alive)
    objects = Objects(order.objects)
    try:
        archives.record_trees(objects.descriptor, order.archives)
        report = evict(objects, order.object_bytes, sources.has, alive)
        if not order.pruning:
            note_short(objects.descriptor, report.short)
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


def check(end: socket.socket, descriptors: list[int], arguments: bytes) -> None:
    """Do the `CheckObjects` in `arguments`, behind all who want processor and disk; say `Progress`, and `Checked` at the end."""
    for descriptor in descriptors:
        os.close(descriptor)
    channel = Channel(end, Codec(CheckObjects))
    order: CheckObjects = channel.codec.decode(arguments)
    os.nice(NICE)
    _libc.syscall(_IOPRIO_SET, _IOPRIO_WHO_PROCESS, 0, _IOPRIO_CLASS_IDLE)  # no error where there is none
    objects = Objects(order.objects)
    try:
        report = checking.check(objects, order.archives, order.prefixes, order.mirrors, _heartbeat(channel))
        if report.repaired:
            objects.sync()
        answer = Checked(report.checked, report.damaged, report.repaired, report.texts[:TEXTS_MAX])
        channel.send(answer, timeout_s=ANSWER_TIMEOUT_S)
    except ChannelClosed:
        return
    finally:
        objects.close()


def _heartbeat(channel: Channel) -> Callable[[], None]:
    """To be called again and again; says `Progress` now and then.  Raises ChannelClosed when nobody is there any more."""
    said_s = 0.0

    def alive() -> None:
        nonlocal said_s
        if time.monotonic() - said_s >= HEARTBEAT_S:
            said_s = time.monotonic()
            try:
                channel.send(Progress(), timeout_s=0)
            except ChannelTimeout:
                pass

    return alive
