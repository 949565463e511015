"""The process "workspace mount TASK": the LAZY layer of one task's workspace."""

from __future__ import annotations

import os
import socket

from actors.lazytree.server import drop_privileges, serve_tree
from actors.lazytree.table import ObjectTable
from actors.lazytree.wire import Progress, ReadFailed, Ready, ServeTree
from actors.mount.source import DirectorySource
from supervisor.channel import Channel
from supervisor.frames import Codec


def serve(end: socket.socket, descriptors: list[int], arguments: bytes) -> None:
    """Serve a `ServeTree` on the one descriptor, a FUSE connection, until its mount is gone."""
    order: ServeTree = Codec(ServeTree).decode(arguments)
    [fuse_descriptor] = descriptors
    try:
        table = ObjectTable(order.table)
    except FileNotFoundError:
        raise SystemExit(f"{order.table} is gone, and the task with it") from None
    source = DirectorySource(order.store, os.fsencode(order.aside))
    drop_privileges(order.uid, order.gid)
    serve_tree(Channel(end, Codec(Ready, Progress, ReadFailed)), fuse_descriptor, order, table, source)
