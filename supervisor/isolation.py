"""Isolated processes, as their parent sees them: started through the fork server, watched by pidfd, spoken to by channel.

Whose parent dies sees its channel closed, and ends; but not if it hangs.  So each holds a lock, by which its parent's successor finds it.
"""

from __future__ import annotations

import itertools
import os
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from supervisor.channel import Channel, ChannelClosed, ChannelTimeout
from supervisor.forkprotocol import ANSWERS, Fork, Forked, ForkFailed
from supervisor.frames import Codec, FrameError, Message
from supervisor.lockfile import evict
from supervisor.sockets import connect_to


class IsolationError(Exception):
    """The process could not be started; the text says why."""


@dataclass(slots=True)
class Process:
    """An isolated process: `pidfd` and `channel` are this object's; `close` gives both back (it ends nothing).

    `lock`: path of the lock that it holds for its parent's sake; "" when there is none.
    """

    name: str
    pid: int
    pidfd: int
    channel: Channel
    lock: str = ""
    closed: bool = field(default=False)

    def signal(self, number: int) -> bool:
        """Send a signal.  False when the process is gone."""
        try:
            signal.pidfd_send_signal(self.pidfd, number)
        except ProcessLookupError:
            return False
        return True

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.channel.close()
            os.close(self.pidfd)
            if self.lock:
                with suppress(FileNotFoundError):
                    os.unlink(self.lock)


class Isolation:
    """Starts isolated processes through the fork server that listens on the Unix socket `path`.

    `locks`: a directory of this parent's and its successors' alone, for the locks of processes that are given none; None: they hold none.
    """

    def __init__(self, path: str, locks: Path | None = None) -> None:
        self.path = path
        self._locks = locks
        self._numbers = itertools.count(1)

    def end_orphans(self) -> list[str]:
        """End those that a dead predecessor of this parent has left and that did not see its end → what could not be ended, and why.

        To be called before anything is started.  Raises OSError.
        """
        left = []
        for path in sorted(self._locks.iterdir()) if self._locks else ():
            try:
                evict(path)
            except TimeoutError as error:
                left.append(str(error))
            else:
                path.unlink()
        return left

    def start(
        self,
        name: str,
        entry: str,
        arguments: Message,
        codec: Codec,
        descriptors: Sequence[int] = (),
        timeout_s: float = 10.0,
        lock: str = "",
    ) -> Process:
        """Start `entry` as the process `name`; it gets copies of `descriptors`; `codec` decodes what it will send.

        `lock`: path of a lock that it takes first, ending who holds it; "": one of its own, for `end_orphans`.

        Asked twice when the fork server dies in between: the request of the first time died with it, unless the child
        was already forked, and then that child sees its channel closed and ends.  Raises IsolationError.
        """
        own = str(self._locks / f"{os.getpid()}-{next(self._numbers)}") if self._locks and not lock else ""
        request = Fork(name, entry, msgspec.msgpack.encode(arguments), lock or own)
        for _ in range(3):
            channel, end = Channel.pair(codec)
            try:
                with end:
                    pid, pidfd = self._ask(request, [end.fileno(), *descriptors], timeout_s)
                return Process(name, pid, pidfd, channel, own)
            except ChannelClosed:
                channel.close()
            except BaseException:
                channel.close()
                raise
        raise IsolationError(f"{name}: the fork server died three times while it was asked for this process")

    def _ask(self, request: Fork, descriptors: list[int], timeout_s: float) -> tuple[int, int]:
        connection = connect_to(Path(self.path), socket.SOCK_SEQPACKET, timeout_s)
        if connection is None:
            raise IsolationError(f"{request.name}: no fork server listens on {self.path}")
        with connection:
            server = Channel(connection, ANSWERS)
            try:
                server.send(request, descriptors, timeout_s)
                answer, came = server.receive(timeout_s)
            except ChannelTimeout:
                raise IsolationError(f"{request.name}: the fork server does not answer within {timeout_s:g} s") from None
            except FrameError as error:
                raise IsolationError(f"{request.name}: {error}") from None
        match answer:
            case Forked(pid) if came:
                return pid, came[0]
            case ForkFailed(why):
                raise IsolationError(why)
        raise IsolationError(f"{request.name}: the fork server answered without a pidfd")
