"""A LAZY mount and its server, for the actor that owns the tree: one connection, and one process after another on it.

The mount belongs to the kernel, its connection and each server's pidfd and channel to the keeper as well, under names that say whose
they are: the actor may be restarted at any moment, and its next incarnation adopts all of them.

Not for child processes: this imports actors.
"""

from __future__ import annotations

import itertools
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from loguru import logger

from actors.lazytree import greeting, mounts
from actors.lazytree.connection import collect, write_down
from actors.lazytree.wire import Ready
from actors.services import Services
from supervisor.actor import Actor
from supervisor.channel import Channel
from supervisor.frames import Codec, Message
from supervisor.isolation import Process
from supervisor.pidfd import pid_of
from supervisor.processes import ProcessRow
from supervisor.worker import Ended, Said, Started, Worker

BACKOFF_S = (0.0, 0.0, 0.0, 0.1, 0.2, 0.5, 1.0)  # before the n-th server in a row that never served
"""The first three at once: a reader inside the task waits for it."""
STAND_BY_S = 1.0  # how long a tree that has all of its objects does without a server, unless one is asked for

_numbers = itertools.count(1)


@dataclass(frozen=True, eq=False)
class _ServeAgain:
    server: LazyServer


@dataclass(frozen=True, eq=False)
class _Wanted:
    """Somebody asks something of a connection that has no server yet, or the time without one is over."""

    server: LazyServer


@dataclass(frozen=True)
class Program:
    """What every server of a tree runs.

    `order`: the arguments of a server of the connection with this INIT request; and whether an earlier one has lived.
    `says`: what a server may say, `lazytree.wire.Ready` among it.  `takes`: names under which the keeper holds the descriptors
    that each server is given behind its connection.
    """

    entry: str
    order: Callable[[bytes, bool], Message]
    says: Codec
    takes: Sequence[str] = ()


class LazyServer:
    """The server of the LAZY mount at `target`, a process by the name of `name`.

    `held`: what the keeper's names end in: fuse/HELD, channel/HELD, server/HELD.  `directory`: the tree's own, where it is
    written down who serves.  Methods are for the actor's own thread, `open` excepted; its `on_end` must `let_go`.
    """

    def __init__(
        self, actor: Actor, services: Services, name: str, held: str, target: Path, directory: Path, program: Program
    ) -> None:
        self.name = name
        self.target = target
        self.minor = 0  # the mount's, and the number of its connection; 0 while there is none
        self.wanted = True  # a server that ends is replaced
        self._writing = threading.Lock()  # held while it is written down who serves
        self._actor = actor
        self._services = services
        # With a number, so that a late word from an earlier mount of the same tree is not taken for this one's.
        self._worker = Worker(actor, services.watcher, f"{name} {next(_numbers)}")
        self._directory = directory
        self._program = program
        self._fuse, self._channel, self._pidfd = f"fuse/{held}", f"channel/{held}", f"server/{held}"
        self._served = False  # a server of this connection has lived
        self._failures = 0
        self._released = False
        self._awaited: int | None = None  # the connection, while it is watched for the first request

    def adopt(self) -> bool:
        """Find the mount and the server that an earlier incarnation left; a server that has died meanwhile is replaced at once.

        → False when there is a mount and nobody holds its connection any more: it answers with errors only.
        """
        found = [mount.minor for mount in mounts.mounts_below(str(self.target)) if mount.target == str(self.target)]
        if not found:
            return True
        self.minor = found[0]
        descriptors = self._services.descriptors
        if descriptors.get(self._fuse) is None and (collected := collect(self._directory)):
            connection, init_request = collected
            descriptors.keep({self._fuse: connection}, {self._fuse: init_request})
        if descriptors.get(self._fuse) is None:
            return False
        self._served = True
        pidfd, channel = descriptors.get(self._pidfd), descriptors.get(self._channel)
        if pidfd is None or channel is None:
            self._serve()
            return True
        end = Channel(socket.socket(fileno=os.dup(channel)), self._program.says)
        self._worker.adopt(Process(self.name, pid_of(pidfd) or 0, os.dup(pidfd), end))
        self._show()
        return True

    def open(self) -> int:
        """Mount LAZY, which nobody serves yet → what `start` wants to know.  Blocks: for the worker pool.  Raises OSError.

        The keeper holds the connection and the kernel's INIT request.
        """
        self.target.mkdir(mode=0o755, parents=True, exist_ok=True)
        mounts.unmount(str(self.target), lazily=True)
        connection = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        try:
            mounted = mounts.mount_fuse(str(self.target), connection)
        except OSError:
            os.close(connection)
            raise
        self._services.descriptors.keep({self._fuse: connection}, {self._fuse: mounted.init_request})
        return mounted.minor

    @contextmanager
    def greeting(self) -> Iterator[None]:
        """Mount LAZY, and answer for it as long as the block runs, which mounts the tree over it; `stand_by` is to follow.

        For a tree that has all of its objects, and so need not wait for a server.  Blocks: for the worker pool.  Raises OSError.
        """
        self.minor = self.open()
        connection = self._services.descriptors.get(self._fuse)
        assert connection is not None
        os.write(connection, greeting.init_reply(self._services.descriptors.data(self._fuse)))
        self._served = True  # as far as the next server is concerned
        with greeting.answering(connection):
            yield

    def stand_by(self) -> None:
        """Start a server of a mount that was greeted: as soon as somebody asks something, or after STAND_BY_S.

        A task that is over by then has cost none.
        """
        self._awaited = self._services.descriptors.get(self._fuse)
        if self._awaited is not None:
            self._services.watcher.readable(self._awaited, partial(self._actor.mailbox, _Wanted(self)))
            self._actor.after(STAND_BY_S, _Wanted(self))

    def start(self, minor: int) -> None:
        """Serve the mount that `open` has made."""
        self.minor = minor
        self._serve()

    def take(self, message: object) -> Message | None:
        """What a message that arrived at the actor means for it: what the server says, `Ready` once for the mount; or None."""
        if isinstance(message, _ServeAgain):
            if message.server is self and self.wanted and mounts.mounts_below(str(self.target)):
                self._serve()
            return None
        if isinstance(message, _Wanted):
            if message.server is self and self.wanted and self._await_no_longer():
                self._serve()
            return None
        match self._worker.take(message):
            case Started():
                self._show()
            case Said(_, _, Ready() as ready):
                self._failures = 0
                if not self._served:
                    self._served = True
                    return ready
            case Said(_, _, said):
                return said
            case Ended(_, _, how):
                self._services.processes.remove(self._actor.name, self._worker.name)
                if self.wanted:
                    logger.warning("{} has ended ({}); another one takes its place", self.name, how)
                    self._actor.after(BACKOFF_S[min(self._failures, len(BACKOFF_S) - 1)], _ServeAgain(self))
                    self._failures += 1
        return None

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send a message to the server, if one runs."""
        self._worker.send(message, descriptors)

    def abort(self) -> None:
        """End the connection: who waits for an answer in the kernel gets an error."""
        if self.minor:
            mounts.abort_fuse(self.minor)

    def want(self, wanted: bool) -> None:
        """Whether a server that ends is to be replaced.  Once none is, nothing more is written into the tree's directory."""
        with self._writing:
            self.wanted = wanted

    def release(self) -> None:
        """Have done with the server of a mount that is gone, and hold nothing more."""
        self.wanted, self._released = False, True
        self._await_no_longer()
        self._worker.let_go()
        self._services.descriptors.drop(self._fuse, self._channel, self._pidfd)
        self._services.processes.remove(self._actor.name, self._worker.name)

    def let_go(self) -> None:
        """The actor ends; another incarnation adopts what there is."""
        self._await_no_longer()
        self._worker.let_go(alive=True)

    def _await_no_longer(self) -> bool:
        """Watch the connection no longer for its first request → whether that was being done."""
        if self._awaited is None:
            return False
        self._services.watcher.forget(self._awaited)
        self._awaited = None
        return True

    def _serve(self) -> None:
        self._worker.start(self._make)

    def _make(self) -> Process:
        descriptors, program = self._services.descriptors, self._program
        connection = descriptors.get(self._fuse)
        assert connection is not None
        taken = [descriptor for name in program.takes if (descriptor := descriptors.get(name)) is not None]
        init_request = descriptors.data(self._fuse)
        order = program.order(init_request, self._served)
        process = self._services.isolation.start(self.name, program.entry, order, program.says, [connection, *taken])
        # Kept as well, so that the next root supervisor can watch and hear it.
        descriptors.keep({self._pidfd: os.dup(process.pidfd), self._channel: os.dup(process.channel.fileno())})
        if self._released:  # meanwhile, and what was kept just now would stay for ever
            descriptors.drop(self._channel, self._pidfd)
        with self._writing:
            try:
                if self.wanted:
                    write_down(self._directory, process, init_request)
            except OSError as error:  # a full disk, for instance: that costs the third holder, and not the server
                logger.warning("{}: it could not be written down who serves: {}", self.name, error)
        return process

    def _show(self) -> None:
        row = ProcessRow(self.name, self._worker.pid or 0, self._worker.restarts)
        self._services.processes.put(self._actor.name, row, self._worker.name)
