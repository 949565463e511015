"""Unix sockets with a name: listening in a dead process's place, and connecting to who is just being started."""

from __future__ import annotations

import os
import select
import socket
import time
from pathlib import Path

from inotify_simple import INotify, flags


def listen_at(path: Path, kind: int) -> socket.socket:
    """A socket of that kind that listens at `path`, for root only, in place of one that a dead process left there.

    It listens before it has that name: who waits for the name to appear is never refused.
    """
    listener = socket.socket(socket.AF_UNIX, kind)
    unnamed = path.with_name(f".{os.getpid()}")  # short: an address has 108 bytes, and `path` may need all of them
    unnamed.unlink(missing_ok=True)
    listener.bind(str(unnamed))
    unnamed.chmod(0o600)
    listener.listen(128)
    unnamed.rename(path)
    return listener


def connect_to(path: Path, kind: int, timeout_s: float, server: int | None = None) -> socket.socket | None:
    """A connection to who listens at `path`, as soon as somebody does; None when nobody does in time.

    `server`: the pidfd of who is expected to; nothing is waited for any longer when that process has ended.
    """
    # First without a watch: closing one waits for a grace period of the kernel, ten milliseconds or many more.
    connection = _connect(path, kind)
    if connection is not None or timeout_s <= 0:
        return connection
    deadline = time.monotonic() + timeout_s
    with INotify() as appearing:
        # Watched before it is tried: a name that appears in between is an event.
        appearing.add_watch(str(path.parent), flags.MOVED_TO)
        waiting = select.poll()
        waiting.register(appearing.fileno(), select.POLLIN)
        if server is not None:
            waiting.register(server, select.POLLIN)
        while (connection := _connect(path, kind)) is None:
            left_s = deadline - time.monotonic()
            ready = [descriptor for descriptor, _ in waiting.poll(left_s * 1000)] if left_s > 0 else []
            if appearing.fileno() not in ready:
                return None
            appearing.read()
        return connection


def _connect(path: Path, kind: int) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX, kind)
    try:
        connection.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    return connection
