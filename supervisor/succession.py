"""How a keeper comes into another one's place, with all that it held.

There is one to a directory, by its lock.  A stand-in yields to whoever asks; one that somebody started yields to who says `take_over`.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from supervisor.channel import Channel, ChannelClosed, ChannelTimeout
from supervisor.frames import FrameError
from supervisor.keeping import FROM_KEEPER, Kept, KeptAll, Refused, Stand, Yield, lock_beside
from supervisor.lockfile import LockFile, evict, sign_of
from supervisor.pidfd import open_pidfd
from supervisor.sockets import connect_to

TAKE_S = 10.0  # how long a living keeper may take to give up its place


class AlreadyRunning(Exception):
    """A keeper that somebody started lives; the text names its pid."""


def succeed(path: Path, lock: LockFile, take_over: bool, say: Callable[[str], None]) -> list[tuple[Kept | Stand, list[int]]]:
    """Acquire the keeper's lock, from nobody or from a living keeper that gives up its place → what that one held.

    `path`: where a keeper listens.  `take_over`: also from one that somebody started.  `say`: writes to the daemon's log.
    Raises AlreadyRunning.
    """
    deadline = time.monotonic() + TAKE_S
    sign = sign_of(lock_beside(path))
    while not lock.acquire():
        pid = lock.holder()
        taken = _ask_for_place(path, pid, take_over, deadline)
        if taken is not None:
            lock.acquire(wait=True)  # the other one has said its last word and ends
            return taken
        if pid and time.monotonic() > deadline:
            if sign.beats and sign_of(lock_beside(path)) == sign:
                say(f"the keeper, pid {pid}, hangs; it is killed")
                evict(lock_beside(path))
                continue
            raise AlreadyRunning(f"already running, pid {pid}, but it does not answer on {path}: end it first")
    return []


def _ask_for_place(path: Path, pid: int, take_over: bool, deadline: float) -> list[tuple[Kept | Stand, list[int]]] | None:
    """What the keeper `pid` hands over, which may be only beginning to listen; None when it ended, or says nothing."""
    try:
        keeper = open_pidfd(pid) if pid else None
    except ProcessLookupError:
        return None
    if keeper is None:
        return None
    try:
        connection = connect_to(path, socket.SOCK_SEQPACKET, deadline - time.monotonic(), keeper)
    finally:
        os.close(keeper)
    if connection is None:
        return None
    taken: list[tuple[Kept | Stand, list[int]]] = []
    with connection:
        channel = Channel(connection, FROM_KEEPER)
        try:
            channel.send(Yield(take_over))
            while True:
                message, descriptors = channel.receive(max(0.0, deadline - time.monotonic()))
                match message:
                    case Kept() | Stand():
                        taken.append((message, descriptors))
                    case KeptAll():
                        return taken
                    case Refused(running):
                        raise AlreadyRunning(f"already running, pid {running}: stop it first, or say --take-over")
        except (OSError, ChannelClosed, ChannelTimeout):
            return None
        except FrameError as error:
            raise AlreadyRunning(f"already running, pid {pid}, but it is not understood ({error}): end it first") from None
