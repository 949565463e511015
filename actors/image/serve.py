"""The process "image mount": the LAZY layer of one mounted image.

The name of this module's entry is in the standing orders that running keepers hold, older versions' too: it stays.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import trio

from actors.image.archives.archive import Archive, hold
from actors.image.archives.trace import pack_blocks
from actors.image.lazy import spool
from actors.image.lazy.coming import Coming
from actors.image.lazy.filling import Filling
from actors.image.lazy.recording import Recorder
from actors.image.lazy.source import RegistrySource
from actors.image.registry.credentials import HELPER_TIMEOUT_S, FindLogin, HelperFailed, docker_login
from actors.image.registry.login import Login
from actors.image.registry.mirrors import host_of
from actors.image.registry.reference import Reference
from actors.image.registry.repository import Registry
from actors.image.wire import (
    TRACE_PART_BYTES,
    BeginTrace,
    Completed,
    EndTrace,
    LoginFound,
    LoginWanted,
    ServeImage,
    Taken,
    TracePart,
)
from actors.lazytree.server import drop_privileges, serve_tree
from actors.lazytree.wire import ServeTree
from supervisor.channel import Channel, ChannelClosed, ChannelTimeout
from supervisor.frames import Codec, FrameError, Message

ROWS_MAX = 4096  # in one message
SAY_AGAIN_S = 5.0
TRACE_LOOK_S = 1.0  # how often it is looked for recordings whose time is over, while there are any
LOGIN_TIMEOUT_S = HELPER_TIMEOUT_S + 1.0  # for the parent to find one

TELL_AGAIN_S = 0.05  # a failed read's reason: tasks come and go, and each is to have it


def serve(end: socket.socket, descriptors: list[int], arguments: bytes) -> None:
    """Serve a `ServeImage` on its two descriptors, FUSE connection and spool, until the mount is gone.

    Says `Ready`, `Progress`, `ReadFailed` (`lazytree.wire`), `Completed`, `LoginWanted` and `TracePart`; is told `Taken`, `LoginFound`,
    `BeginTrace` and `EndTrace`.
    Without a spool (whoever held it is dead) it makes one for itself, from which nobody publishes.
    """
    order: ServeImage = Codec(ServeImage).decode(arguments)
    fuse_descriptor = descriptors[0]
    spool_descriptor = descriptors[1] if len(descriptors) > 1 else spool.create(order.objects)
    archive = Archive.open(order.archive, checked=True)  # by who mounted it
    with contextlib.suppress(OSError):
        hold(order.archive)  # for as long as this process lives, also while whoever mounted it is being started again
    table = archive.objects()
    spans = archive.spans(table)
    reference = Reference.parse(order.reference)
    access = order.access
    logins = Logins([reference.registry, *map(host_of, access.mirrors)], {reference.registry: access.login})
    handover = Handover()
    objects = os.open(order.objects, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    kept = spool.Spool(spool_descriptor, spans)
    source = RegistrySource(
        table,
        spans,
        order.reference,
        [layer.digest for layer in archive.info.layers],
        kept,
        objects,
        lambda: Registry(reference, mirrors=access.mirrors, find_login=logins.finder()),
        order.read_timeout_s,
        order.spool_bytes_max,
        handover.add,
        Coming(spool_descriptor, kept.end) if order.traces else None,
    )
    drop_privileges(order.uid, order.gid)
    channel = Channel(end, Codec(Taken, LoginFound, BeginTrace, EndTrace))
    traces = Traces(source) if order.traces else None
    tree = ServeTree("", "", order.init_request, order.replacement, order.read_timeout_s)
    filling = None
    if order.fill_parallel:
        filling = Filling(source, objects, order.fill_parallel, order.fill_bytes_per_s, order.fill_delay_s)
    beside = partial(_run, channel, source, handover, logins, traces, filling, order.replacement)
    observer = traces.recorder if traces else None
    serve_tree(channel, fuse_descriptor, tree, table, source, beside, TELL_AGAIN_S, observer)


async def _run(
    channel: Channel,
    source: RegistrySource,
    handover: Handover,
    logins: Logins,
    traces: Traces | None,
    filling: Filling | None,
    replacement: bool,
    tell: Callable[[Message], None],
) -> None:
    logins.tell = tell
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.run)
        nursery.start_soon(handover.run, tell)
        if traces is not None:
            nursery.start_soon(traces.run, tell)
        nursery.start_soon(_listen, channel, source, handover, logins, traces)
        if replacement:
            nursery.start_soon(source.inherited)
        if filling is not None:
            nursery.start_soon(filling.run, _say)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


async def _listen(channel: Channel, source: RegistrySource, handover: Handover, logins: Logins, traces: Traces | None) -> None:
    while True:
        await trio.lowlevel.wait_readable(channel.fileno())
        try:
            message, _ = channel.receive(0)
        except (ChannelTimeout, FrameError):
            continue  # a message of another version's parent, perhaps: what it took is said again
        except ChannelClosed:
            return  # nobody publishes any more; the mount is served on
        match message:
            case LoginFound():
                logins.take(message)
            case Taken(rows):
                handover.remove(rows)
                await source.taken(rows)
            case _ if traces is not None:
                traces.take(message)


class Handover:
    """What is whole in the spool and not yet published: said to the parent, and again until it answers."""

    def __init__(self) -> None:
        self._unsaid: set[int] = set()
        self._said: set[int] = set()
        self._more = trio.Event()

    def add(self, rows: Sequence[int]) -> None:
        self._unsaid.update(rows)
        self._more.set()

    def remove(self, rows: Sequence[int]) -> None:
        self._unsaid.difference_update(rows)
        self._said.difference_update(rows)

    async def run(self, tell: Callable[[Message], None]) -> None:
        again_s = trio.current_time() + SAY_AGAIN_S
        while True:
            self._more = trio.Event()
            rows = sorted(self._unsaid)
            for first in range(0, len(rows), ROWS_MAX):
                tell(Completed(rows[first : first + ROWS_MAX]))
            self._said |= self._unsaid
            self._unsaid.clear()
            with trio.move_on_at(again_s):
                await self._more.wait()
            if trio.current_time() >= again_s:
                self._unsaid |= self._said
                again_s = trio.current_time() + SAY_AGAIN_S


class Traces:
    """The traces that are being recorded: begun and ended by the parent, which is told each when it is over."""

    def __init__(self, source: RegistrySource) -> None:
        self.recorder = Recorder(time.monotonic)
        self._source = source
        self._begun: dict[str, tuple[int, float]] = {}  # trace → what the source had fetched when it began
        self._over: list[str] = []
        self._changed = trio.Event()

    def take(self, message: BeginTrace | EndTrace) -> None:
        if isinstance(message, BeginTrace):
            self.recorder.begin(message.name)
            self._begun[message.name] = self._source.fetched
        else:
            self._over.append(message.name)
        self._changed.set()

    async def run(self, tell: Callable[[Message], None]) -> None:
        while True:
            self._changed = trio.Event()
            for name in [*self._over, *self.recorder.ended()]:
                self._tell(name, tell)
            self._over.clear()
            with trio.move_on_after(TRACE_LOOK_S if self._begun else math.inf):
                await self._changed.wait()

    def _tell(self, name: str, tell: Callable[[Message], None]) -> None:
        recorded = self.recorder.end(name)
        before = self._begun.pop(name, None)
        if recorded is None or before is None:  # an earlier server recorded it, and is dead, or it was over before
            tell(TracePart(name, b"", True))
            return
        blocks = pack_blocks(recorded)
        fetched_bytes, fetching_s = self._source.fetched
        parts = [blocks[first : first + TRACE_PART_BYTES] for first in range(0, len(blocks), TRACE_PART_BYTES)] or [b""]
        for part in parts[:-1]:
            tell(TracePart(name, part, False))
        tell(TracePart(name, parts[-1], True, fetched_bytes - before[0], fetching_s - before[1]))


class Logins:
    """The logins for some registries: what is `given` for one, or Docker's, found while that may be read; later, what the parent finds.

    Finders are for the threads of the registries' clients.  `tell` is how the parent is asked, in trio's thread.
    """

    def __init__(self, registries: Sequence[str], given: Mapping[str, Login | None]) -> None:
        self.tell: Callable[[Message], None] = lambda _: None
        self._changed = threading.Condition()
        self._version = 0
        self._found: dict[str, tuple[int, Login | HelperFailed | None]] = {}
        for registry in registries:
            login: Login | HelperFailed | None = given.get(registry)
            try:
                self._found[registry] = (0, login or docker_login(registry))
            except HelperFailed as error:
                self._found[registry] = (0, error)

    def finder(self) -> FindLogin:
        """Finds logins for one client, which asks a second time when the first login was refused.  Raises HelperFailed."""
        shown: dict[str, int] = {}

        def find(registry: str) -> Login | None:
            if registry in shown:
                self._ask(registry, shown[registry])
            shown[registry], login = self._found.get(registry, (0, None))
            if isinstance(login, HelperFailed):
                raise login
            return login

        return find

    def take(self, message: LoginFound) -> None:
        """What the parent has found."""
        with self._changed:
            self._version += 1
            found = HelperFailed(message.problem) if message.problem else message.login
            self._found[message.registry] = (self._version, found)
            self._changed.notify_all()

    def _ask(self, registry: str, version: int) -> None:
        """See to it that what is known is newer than that, unless the parent does not answer."""
        with self._changed:
            if self._found.get(registry, (0, None))[0] > version:
                return  # it was asked for another client
        trio.from_thread.run_sync(self.tell, LoginWanted(registry))
        with self._changed:
            self._changed.wait_for(lambda: self._found.get(registry, (0, None))[0] > version, LOGIN_TIMEOUT_S)
