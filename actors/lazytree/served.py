"""A LAZY mount and its server, for the actor that owns the tree: one connection, and one process after another on it.

The mount belongs to the kernel, its connection to the keeper as well, and its server is under a standing order: the actor may be
restarted at any moment, and its next incarnation adopts all of them.

Who reads from the mount waits while it has no server, so it is the keeper that replaces one, at once, and tells.  This does it when there
is no keeper, or when the keeper has not for KEEPER_S.  Should both, one of the two servers ends the other before it serves (`boot`).

Not for child processes: this imports actors.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote

import msgspec
from loguru import logger

from actors.lazytree import greeting, mounts
from actors.lazytree.connection import collect, remove, write_init_request
from actors.lazytree.wire import Ready
from actors.services import Services
from supervisor.actor import Actor
from supervisor.channel import Channel
from supervisor.frames import Codec, Message
from supervisor.isolation import IsolationError, Process
from supervisor.keeping import StandingOrder
from supervisor.orders import Standing
from supervisor.pidfd import pid_of, signal_process, wait_ended
from supervisor.processes import ProcessRow
from supervisor.worker import Ended, Said, Started, Worker

BACKOFF_S = (0.0, 0.0, 0.0, 0.1, 0.2, 0.5, 1.0)  # before the n-th server in a row that never served
"""The first three at once: a reader inside the task waits for it."""
KEEPER_S = 0.5  # how long a keeper may take to replace a server; less would do work twice on a machine with too much of it
SILENCE_S = 1.0  # a server whose event loop has not turned for so long hangs, says the keeper
SILENCE_UNKEPT_S = 2.5  # and so say we, of its messages: later, not to do it twice
DEATH_S = 5.0
STAND_BY_S = 2.0  # how long a tree that has all of its objects does without a server, unless one is asked for

_numbers = itertools.count(1)


@dataclass(frozen=True, eq=False)
class _ServeAgain:
    """The time for a server that has ended to be replaced is over."""

    server: LazyServer


@dataclass(frozen=True, eq=False)
class _Changed:
    """The keeper has replaced the server, or there is no keeper."""

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

    `held`: the name of its standing order; the connection is held as fuse/HELD.  Methods are for the actor's own thread, `open`
    excepted; its `on_end` must `let_go`.
    """

    def __init__(self, actor: Actor, services: Services, name: str, held: str, target: Path, program: Program) -> None:
        self.name = name
        self.target = target
        self.minor = 0  # the mount's, and the number of its connection; 0 while there is none
        self.wanted = True  # a server that ends is replaced
        self._actor = actor
        self._services = services
        # With a number, so that a late word from an earlier mount of the same tree is not taken for this one's.
        self._worker = Worker(actor, services.watcher, f"{name} {next(_numbers)}", silence_s=SILENCE_UNKEPT_S)
        self._program = program
        self._held, self._fuse = held, f"fuse/{held}"
        self._lock = services.layout.served / f"{quote(held, safe='')}.lock"
        self._served = False  # a server of this connection has lived
        self._failures = 0
        self._released = False
        self._awaited: int | None = None  # the connection, while it is watched for the first request

    def find(self) -> bool:
        """Find the mount that an earlier incarnation left; `adopt` is to follow.

        → False when there is a mount and nobody holds its connection any more: it answers with errors only.
        """
        found = [mount.minor for mount in mounts.mounts_below(str(self.target)) if mount.target == str(self.target)]
        if not found:
            return True
        self.minor = found[0]
        descriptors = self._services.descriptors
        if descriptors.get(self._fuse) is None and (collected := collect(self._lock)):
            connection, init_request = collected
            descriptors.keep({self._fuse: connection}, {self._fuse: init_request})
        return descriptors.get(self._fuse) is not None

    def adopt(self) -> None:
        """Take over the server of the mount that was found, if there is one; a server that has died meanwhile is replaced at once."""
        if not self.minor:
            return
        self._served = True
        self._listen()
        standing = self._services.descriptors.standing(self._held)
        if standing is None:
            self._serve()
        else:
            self._adopt(standing)  # one that has ended too: that is heard in a moment

    def open(self) -> int:
        """Mount LAZY, which nobody serves yet → what `start` wants to know.  Blocks: for the worker pool.  Raises OSError.

        The keeper holds the connection and the kernel's INIT request.
        """
        # First what an earlier incarnation mounted and did not live to have served: a look at the directory would wait for a server.
        mounts.unmount(str(self.target), lazily=True)
        self.target.mkdir(mode=0o755, parents=True, exist_ok=True)
        connection = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        try:
            mounted = mounts.mount_fuse(str(self.target), connection)
        except OSError:
            os.close(connection)
            raise
        self._services.descriptors.keep({self._fuse: connection}, {self._fuse: mounted.init_request})
        self._listen()
        try:
            self._services.layout.served.mkdir(mode=0o700, exist_ok=True)
            write_init_request(self._lock, mounted.init_request)
        except OSError as error:  # a full disk, for instance: that costs the third holder, and not the server
            logger.warning("{}: its connection could not be written down: {}", self.name, error)
        return mounted.minor

    @contextlib.contextmanager
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
        if isinstance(message, _ServeAgain | _Changed):
            if message.server is self and self.wanted and self._awaited is None:
                self._replace(at_once=isinstance(message, _ServeAgain) or not self._services.descriptors.kept)
            return None
        if isinstance(message, _Wanted):
            if message.server is self and self.wanted and self._await_no_longer():
                with contextlib.suppress(OSError):  # it is being unmounted
                    mounts.tune_fuse(self.minor)
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
                    pause_s = BACKOFF_S[min(self._failures, len(BACKOFF_S) - 1)]
                    self._failures += 1
                    if self._services.descriptors.kept:
                        pause_s = max(pause_s, KEEPER_S)
                    self._replace(at_once=pause_s == 0.0)
                    if self._worker.vacant:
                        self._actor.after(pause_s, _ServeAgain(self))
        return None

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send a message to the server, if one runs."""
        self._worker.send(message, descriptors)

    def abort(self) -> None:
        """End the connection: who waits for an answer in the kernel gets an error."""
        if self.minor:
            mounts.abort_fuse(str(self.target), self.minor)

    def want(self, wanted: bool) -> None:
        """Whether a server that ends is to be replaced."""
        self.wanted = wanted

    def release(self) -> None:
        """Have done with the server of a mount that is gone, and hold nothing more."""
        self.wanted, self._released = False, True
        self._await_no_longer()
        self._worker.let_go()
        self._services.descriptors.dismiss(self._held)
        self._services.descriptors.drop(self._fuse)
        with contextlib.suppress(OSError):
            remove(self._lock)
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

    def _listen(self) -> None:
        mailbox, changed = self._actor.mailbox, _Changed(self)
        self._services.descriptors.listen(self._held, lambda: mailbox(changed))

    def _replace(self, at_once: bool) -> None:
        """Look whether the keeper has replaced the server; if not, and `at_once`, do it."""
        if not self._worker.vacant or not mounts.mounts_below(str(self.target)):
            return
        standing = self._services.descriptors.standing(self._held)
        if standing is not None and not standing.ended:
            self._adopt(standing)
            return
        if standing is not None:
            standing.close()
        if at_once:
            self._serve()

    def _adopt(self, standing: Standing) -> None:
        self._worker.adopt(self._process(standing))
        self._show()

    def _process(self, standing: Standing) -> Process:
        channel = Channel(socket.socket(fileno=standing.channel), self._program.says)
        return Process(self.name, pid_of(standing.pidfd) or 0, standing.pidfd, channel)

    def _serve(self) -> None:
        self._worker.start(self._make)

    def _make(self) -> Process:
        descriptors, program = self._services.descriptors, self._program
        connection = descriptors.get(self._fuse)
        assert connection is not None
        self._end_unordered()
        taken = [(name, descriptor) for name in program.takes if (descriptor := descriptors.get(name)) is not None]
        init_request = descriptors.data(self._fuse)
        process = self._services.isolation.start(
            self.name,
            program.entry,
            program.order(init_request, self._served),
            program.says,
            [connection, *(descriptor for _, descriptor in taken)],
            lock=str(self._lock),
        )
        order = StandingOrder(
            process=self.name,
            entry=program.entry,
            arguments=msgspec.msgpack.encode(program.order(init_request, True)),
            along=[self._fuse, *(name for name, _ in taken)],
            lock=str(self._lock),
            silence_s=SILENCE_S,
        )
        if not descriptors.stand(self._held, order, os.dup(process.pidfd), os.dup(process.channel.fileno())):
            process.close()
            standing = descriptors.standing(self._held)
            if standing is None:  # released meanwhile
                raise IsolationError(f"{self.name} is not wanted any more")
            process = self._process(standing)  # the keeper's, which was there before ours
        if self._released:  # meanwhile, and what stands since just now would stay for ever
            descriptors.dismiss(self._held)
        return process

    def _end_unordered(self) -> None:
        """End the server that an older version of the daemon has left: it stands under no order, and holds no lock."""
        pidfd = self._services.descriptors.get(f"server/{self._held}")
        if pidfd is not None:
            signal_process(pidfd, signal.SIGKILL)
            if not wait_ended(pidfd, DEATH_S):
                raise IsolationError(f"{self.name}: the server of an older version cannot be killed")
            self._services.descriptors.drop(f"server/{self._held}", f"channel/{self._held}")

    def _show(self) -> None:
        row = ProcessRow(self.name, self._worker.pid or 0, self._worker.restarts)
        self._services.processes.put(self._actor.name, row, self._worker.name)
