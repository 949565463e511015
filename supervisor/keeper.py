"""The keeper: the process that somebody starts, and the one that outlives all the others' restarts.

It is small on purpose (the standard library and the frames), for nothing restarts it but the tree it keeps.  It

- holds descriptors for the root supervisor, by name, with a little data beside each: what must survive that one's death;
- replaces the processes under a standing order as soon as they end or hang (`replacing`);
- starts the root supervisor and the fork server, and starts them again, with a growing pause, for as long as it lives; one whose
  pulse stops (`pulse`) it ends;
- is a child subreaper, and reaps what is orphaned below it;
- on SIGTERM tells the root supervisor to drain, and ends when that has ended with success.

There is one keeper to a directory (`keeper.lock`).  When it is killed, the root supervisor starts a *stand-in* and hands
over what it holds itself.  A keeper that somebody starts takes a stand-in's place; the place of one that somebody started
it takes only when told to (`take_over`): then the root supervisor and the fork server are started anew as well, which is
how a new version of the program comes in while tasks run.  A keeper whose lock has been deleted, with all of its directory most likely,
starts nothing any more: what it started would find no keeper, and call for another one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import resource
import selectors
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from supervisor.boot import name_process
from supervisor.channel import Channel, ChannelClosed, ChannelTimeout
from supervisor.frames import FrameError, Message
from supervisor.held import Held
from supervisor.keeping import (
    TO_KEEPER,
    AskState,
    Dismiss,
    Drop,
    Hello,
    Keep,
    Kept,
    KeptAll,
    Noted,
    Refused,
    Replaced,
    Stand,
    State,
    Welcome,
    Yield,
    Yielded,
    lock_beside,
)
from supervisor.lockfile import LockFile
from supervisor.parts import Part, how
from supervisor.pidfd import set_child_subreaper
from supervisor.pulse import BEAT_S, LOOK_S
from supervisor.replacements import Gone, Replacements
from supervisor.replacing import Replacing
from supervisor.sockets import listen_at
from supervisor.succession import AlreadyRunning, succeed

EXIT_REFUSES = 78  # EX_CONFIG: the root supervisor says that starting it again would end the same way
EXIT_RUNNING = 3
EXIT_FAILED = 70  # EX_SOFTWARE: the log says how
START_S = 30.0  # how long a root supervisor may take until it says Hello, when a drain waits for it
STOP_S = 5.0  # how long the fork server may take to end
ORPHANS_S, ORPHANS_LOOK_S = 20.0, 0.01  # and what was below it, once it has been killed


@dataclass(frozen=True)
class Plan:
    """What a keeper keeps: `directory` for its socket and lock; the argument vectors of its two parts.

    `drain_timeout_s` bounds a drain; a root supervisor that takes longer is killed and started again to go on with it.
    """

    directory: Path
    root_argv: Sequence[str]
    fork_server_argv: Sequence[str]
    drain_timeout_s: float

    @property
    def socket(self) -> Path:
        return self.directory / "keeper.sock"

    @property
    def lock(self) -> Path:
        return lock_beside(self.socket)

    @property
    def fork_server_socket(self) -> Path:
        return self.directory / "forkserver.sock"


class Keeper:
    """One keeper.  Its whole life is `run`."""

    def __init__(self, plan: Plan, lock: LockFile, stand_in: bool, renew: bool = False) -> None:
        self._plan = plan
        self._lock = lock
        self._stand_in = stand_in
        self._renew = renew
        self._held = Held()
        self._selector = selectors.DefaultSelector()
        self._fork_server = Part("fork server", plan.directory / "forkserver.lock", plan.fork_server_argv)
        self._root = Part("root supervisor", plan.directory / "root.lock", plan.root_argv)
        self._parts = (self._fork_server, self._root)
        self._gone: dict[Part, Gone] = {}  # how each has ended, the last time
        self._hung: set[Part] = set()  # and is being ended for that
        self._replacements = Replacements(self._tell_of)
        self._replacing = Replacing(
            self._selector,
            self._held,
            plan.fork_server_socket,
            self._tell_root,
            self._replacements,
            self._kill_fork_server,
            self._hear_root,
            say,
        )
        self._look_s = self._beat_s = 0.0
        self._told_to_drain = False
        self._draining = False
        self._drain_deadline = 0.0
        self._exit_code: int | None = None
        self._greeted: Channel | None = None  # where the root supervisor is
        self._notes = False  # and wants to know what was replaced

    def take(self, kept: Kept | Stand, descriptors: list[int]) -> None:
        """Hold what another keeper held."""
        match kept:
            case Kept(names, data):
                self._held.put(names, descriptors, data)
            case Stand():
                self._replacing.stand(kept, descriptors)

    def run(self) -> int:
        """Keep until a drain is done or the place is given up → the exit code."""
        set_child_subreaper()
        self._listen_for_signals()
        listener = listen_at(self._plan.socket, socket.SOCK_SEQPACKET)
        self._selector.register(listener, selectors.EVENT_READ, lambda: self._accept(listener))
        while self._exit_code is None:
            self._start_what_is_due()
            self._look_and_beat()
            self._replacing.work()
            for key, _ in self._selector.select(self._pause_s()):
                # Not forgotten by what an earlier event of this round did; nor has another one its number by now.
                if self._selector.get_map().get(key.fd) is key:
                    key.data()
        return self._exit_code

    # --- children ---

    def _start_what_is_due(self) -> None:
        now = time.monotonic()
        for part in self._parts:
            if part.running or part.due_s > now:
                continue
            if not self._lock.is_in_place():
                part.due_s = now + LOOK_S
                continue
            try:
                found = part.start()
            except OSError as error:  # no process to be had just now, for instance: what is held must not be lost for that
                say(f"{part.name} cannot be started, it is tried again: {error}")
                continue
            self._selector.register(part.pidfd, selectors.EVENT_READ, lambda part=part: self._part_ended(part))
            if (gone := self._gone.pop(part, None)) is not None:
                self._replacements.add(part.name, part.pid, gone)
            if found and self._renew:  # the place was taken over: what was found runs the old version of the program
                part.signal(signal.SIGKILL)
            elif found and part is self._root and self._draining:
                # It may have said Hello before the drain began, to which another one was told that had not got its place.
                part.signal(signal.SIGTERM)
        self._renew = False
        if self._draining and not self._root.running and not self._lock.is_in_place():
            say("nobody can be started to go on with the drain")
            self._finish(EXIT_FAILED)
        elif self._draining and now > self._drain_deadline:
            say("the drain takes too long: the root supervisor is killed, and started again to go on with it")
            self._drain_deadline = now + START_S + self._plan.drain_timeout_s
            self._root.signal(signal.SIGKILL)

    def _look_and_beat(self) -> None:
        now = time.monotonic()
        if now >= self._beat_s:
            self._beat_s = now + BEAT_S
            self._lock.beat()
        if now >= self._look_s:
            self._look_s = now + LOOK_S
            for part in self._parts:
                if part.look(now):
                    self._hung.add(part)
                    say(f"{part.name} (pid {part.pid}) hangs; it is ended")

    def _pause_s(self) -> float:
        """How long nothing is due, in seconds."""
        moments = [part.due_s for part in self._parts if not part.running]
        moments += [self._beat_s, self._look_s]
        if self._draining:
            moments.append(self._drain_deadline)
        if (due_s := self._replacing.due_s()) is not None:
            moments.append(due_s)
        return max(0.0, min(moments) - time.monotonic())

    def _part_ended(self, part: Part) -> None:
        self._selector.unregister(part.pidfd)
        pid, code = part.pid, part.ended()
        self._gone[part] = Gone(pid, code, part in self._hung)
        self._hung.discard(part)
        if part is self._root and self._draining and code == 0:
            self._finish(0)
        elif part is self._root and code == EXIT_REFUSES:
            self._finish(EXIT_FAILED)
        elif self._lock.is_in_place():
            say(f"{part.name} (pid {pid}) has ended, {how(code)}; it is started again")
        else:
            say(
                f"{part.name} (pid {pid}) has ended, {how(code)}; it is not started again: somebody has deleted {self._plan.lock}"
            )
        self._reap()

    def _finish(self, code: int) -> None:
        """End: the fork server first, since nobody is left who would want a process from it."""
        if self._fork_server.running:
            self._selector.unregister(self._fork_server.pidfd)
            self._fork_server.stop(STOP_S)
        for path in (self._plan.socket, self._plan.fork_server_socket):
            path.unlink(missing_ok=True)
        if code == 0:
            self._await_orphans()
        self._exit_code = code

    @staticmethod
    def _await_orphans() -> None:
        """Wait until all that was killed in a drain has ended, which who waits for a slow disk does late."""
        deadline = time.monotonic() + ORPHANS_S
        with contextlib.suppress(ChildProcessError):
            while time.monotonic() < deadline:
                if os.waitpid(-1, os.WNOHANG) == (0, 0):
                    time.sleep(ORPHANS_LOOK_S)

    # --- signals ---

    def _listen_for_signals(self) -> None:
        waker, self._wake = socket.socketpair()  # kept in an attribute: set_wakeup_fd alone would let it be closed
        for end in (waker, self._wake):
            end.setblocking(False)
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._told_to_end)
        signal.signal(signal.SIGCHLD, lambda *_: None)

        def woken() -> None:
            waker.recv(4096)
            if self._told_to_drain:
                self._drain()
            self._reap()

        self._selector.register(waker, selectors.EVENT_READ, woken)

    def _told_to_end(self, *_: object) -> None:
        self._told_to_drain = True  # no more than that: it may be called between any two instructions, those on a part included

    def _drain(self) -> None:
        if not self._draining:
            self._draining = True
            self._drain_deadline = time.monotonic() + self._plan.drain_timeout_s
            self._root.signal(signal.SIGTERM)

    def _reap(self) -> None:
        """Reap orphans (conmon, and processes whose fork server died); this is the one process that waits for them."""
        parts = {part.pid for part in self._parts}
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None or ended.si_pid in parts:
                return  # a part's end is seen on its pidfd; what ended after it is reaped then
            os.waitpid(ended.si_pid, 0)

    # --- connections ---

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        channel = Channel(connection, TO_KEEPER)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._serve(channel))

    def _serve(self, channel: Channel) -> None:
        if not channel.readable():
            return  # it has been heard already (`_hear_root`)
        try:
            self._answer(channel, *channel.receive(0))
        except (ChannelClosed, ChannelTimeout):
            self._close(channel)
        except FrameError as error:
            say(f"a client of the keeper broke the protocol: {error}")
            self._close(channel)

    def _answer(self, channel: Channel, message: Message, descriptors: list[int]) -> None:
        match message:
            case Keep(names, data):
                self._keep(names, data, descriptors)
            case Drop(names):
                self._held.drop(names)
            case Stand():
                self._replacing.stand(message, descriptors)
            case Dismiss(names):
                self._replacing.dismiss(names)
            case Noted(number):
                self._replacements.noted(number)
            case Hello(notes):
                channel.send(Welcome(os.getpid(), self._stand_in, self._draining))
                self._hand_over(channel)
                self._greeted, self._notes = channel, notes
                self._replacements.tell_again()
                if self._draining:
                    # Only now can it begin: what it took to start, on a machine with much to do, is not its drain's.
                    self._drain_deadline = time.monotonic() + self._plan.drain_timeout_s
                    self._root.signal(signal.SIGTERM)
            case AskState():
                root, fork_server = self._root, self._fork_server
                state = State(
                    os.getpid(),
                    self._stand_in,
                    root.restarts,
                    fork_server.pid,
                    fork_server.restarts,
                    self._held.names(),
                    self._replacing.replaced(),
                )
                channel.send(state)
            case Yield(take_over):
                if take_over or self._stand_in:
                    say("another keeper takes this one's place")
                    self._hand_over(channel)
                    self._tell_root(Yielded())  # lest it start a stand-in
                    self._exit_code = 0
                else:
                    channel.send(Refused(os.getpid()))

    def _tell_root(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Tell the root supervisor, if there is one.  One that does not listen is not waited for: what it misses, it finds out."""
        if self._greeted is not None:
            with contextlib.suppress(ChannelClosed, ChannelTimeout):
                self._greeted.send(message, descriptors, timeout_s=0)

    def _tell_of(self, replaced: Replaced) -> None:
        if self._notes:
            self._tell_root(replaced)

    def _hear_root(self) -> None:
        """Do all that the root supervisor has said."""
        while (channel := self._greeted) is not None and channel.readable():
            self._serve(channel)

    def _kill_fork_server(self) -> None:
        self._fork_server.signal(signal.SIGKILL)

    def _hand_over(self, channel: Channel) -> None:
        for names, data, descriptors in self._held.packets(self._held.names()):
            channel.send(Kept(names, data), descriptors)
        for stand, descriptors in self._replacing.hand_over():
            channel.send(stand, descriptors)
        channel.send(KeptAll())

    def _keep(self, names: list[str], data: dict[str, bytes], descriptors: list[int]) -> None:
        try:
            self._held.put(names, descriptors, data)
        except ValueError as error:
            for descriptor in descriptors:
                os.close(descriptor)
            raise FrameError(str(error)) from None

    def _close(self, channel: Channel) -> None:
        if self._greeted is channel:
            self._greeted = None
        self._selector.unregister(channel.socket)
        channel.close()


def run_keeper(plan: Plan, take_over: bool = False, stand_in: bool = False) -> int:
    """Be the keeper of `plan.directory` → the exit code: 0 after a drain or when another keeper took the place, 3 when one runs.

    `stand_in`: the tree starts this process in place of a dead keeper.
    """
    name_process("keeper")
    faulthandler.enable()  # SIGABRT, which the root supervisor sends to a keeper that hangs, tells where
    raise_descriptor_limit()
    plan.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = LockFile(plan.lock)
    taken: list[tuple[Kept | Stand, list[int]]] = []
    if stand_in:
        if not lock.acquire():
            return EXIT_RUNNING  # somebody was faster
    else:
        try:
            taken = succeed(plan.socket, lock, take_over, say)
        except AlreadyRunning as error:
            say(str(error))
            return EXIT_RUNNING
    keeper = Keeper(plan, lock, stand_in, renew=take_over)
    for kept, descriptors in taken:
        keeper.take(kept, descriptors)
    return keeper.run()


def raise_descriptor_limit() -> None:
    """Let this process, and all below it, hold as many descriptors as it may: a keeper holds half a dozen for each task."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def say(text: str) -> None:
    # Whatever becomes of the log (a full disk, a pipe that nobody reads any more), this process goes on.
    with contextlib.suppress(OSError):
        os.write(2, f"{time.strftime('%Y-%m-%dT%H:%M:%S')} keeper: {text}\n".encode(errors="backslashreplace"))
