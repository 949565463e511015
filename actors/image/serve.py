"""The process "image mount": the LAZY layer of one mounted image."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from functools import partial

import trio

from actors.image import spool
from actors.image.archive import Archive
from actors.image.credentials import HelperFailed, docker_login
from actors.image.login import Login
from actors.image.mirrors import host_of
from actors.image.reference import Reference
from actors.image.registry import Registry
from actors.image.source import RegistrySource
from actors.image.wire import Completed, ServeImage, Taken
from actors.lazytree.server import drop_privileges, serve_tree
from actors.lazytree.wire import ServeTree
from supervisor.channel import Channel, ChannelClosed, ChannelTimeout
from supervisor.frames import Codec, FrameError, Message

ROWS_MAX = 4096  # in one message
SAY_AGAIN_S = 5.0

TELL_AGAIN_S = 0.05  # a failed read's reason: tasks come and go, and each is to have it


def serve(end: socket.socket, descriptors: list[int], arguments: bytes) -> None:
    """Serve a `ServeImage` on its two descriptors, FUSE connection and spool, until the mount is gone.

    Says `Ready`, `Progress`, `ReadFailed` (`lazytree.wire`) and `Completed`; is told `Taken`.  Without a spool (whoever held it
    is dead) it makes one for itself, from which nobody publishes.
    """
    order: ServeImage = Codec(ServeImage).decode(arguments)
    fuse_descriptor = descriptors[0]
    spool_descriptor = descriptors[1] if len(descriptors) > 1 else spool.create(order.objects)
    archive = Archive.open(order.archive, checked=True)  # by who mounted it
    table = archive.objects()
    spans = archive.spans(table)
    reference = Reference.parse(order.reference)
    access = order.access
    find_login = _logins([*([] if access.login else [reference.registry]), *map(host_of, access.mirrors)])
    handover = Handover()
    source = RegistrySource(
        table,
        spans,
        order.reference,
        [layer.digest for layer in archive.info.layers],
        spool.Spool(spool_descriptor, spans),
        os.open(order.objects, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC),
        lambda: Registry(reference, access.login, mirrors=access.mirrors, find_login=find_login),
        order.read_timeout_s,
        order.spool_bytes_max,
        handover.add,
    )
    drop_privileges(order.uid, order.gid)
    channel = Channel(end, Codec(Taken))
    tree = ServeTree("", "", order.init_request, order.replacement, order.read_timeout_s)
    beside = partial(_run, channel, source, handover, order.replacement)
    serve_tree(channel, fuse_descriptor, tree, table, source, beside, TELL_AGAIN_S)


async def _run(
    channel: Channel, source: RegistrySource, handover: Handover, replacement: bool, tell: Callable[[Message], None]
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.run)
        nursery.start_soon(handover.run, tell)
        nursery.start_soon(_listen, channel, source, handover)
        if replacement:
            nursery.start_soon(source.inherited)


async def _listen(channel: Channel, source: RegistrySource, handover: Handover) -> None:
    while True:
        await trio.lowlevel.wait_readable(channel.fileno())
        try:
            message, _ = channel.receive(0)
        except (ChannelTimeout, FrameError):
            continue  # a message of another version's parent, perhaps: what it took is said again
        except ChannelClosed:
            return  # nobody publishes any more; the mount is served on
        handover.remove(message.rows)
        await source.taken(message.rows)


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


def _logins(registries: Sequence[str]) -> Callable[[str], Login | None]:
    """Docker's logins for these registries, found while they may be read; a failure is raised when its login is asked for."""
    found: dict[str, Login | HelperFailed | None] = {}
    for registry in registries:
        try:
            found[registry] = docker_login(registry)
        except HelperFailed as error:
            found[registry] = error

    def find(registry: str) -> Login | None:
        login = found.get(registry)
        if isinstance(login, HelperFailed):
            raise login
        return login

    return find
