"""The root supervisor's half of what is held: descriptors by name, and standing orders, each kept by the keeper as well.

Either of the two may be killed: a new root supervisor gets everything from the keeper, a new keeper everything from the root
supervisor.  When the keeper dies and nobody takes its place at once, this class starts a stand-in.
"""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from loguru import logger

from supervisor.channel import Channel, ChannelClosed, ChannelTimeout
from supervisor.events import Event
from supervisor.exits import Cause, of_code
from supervisor.frames import FrameError
from supervisor.held import Held
from supervisor.keeping import (
    FROM_KEEPER,
    AskState,
    Dismiss,
    Drop,
    Hello,
    Keep,
    Kept,
    KeptAll,
    Noted,
    Replaced,
    Stand,
    StandingOrder,
    State,
    Welcome,
    Yielded,
    lock_beside,
)
from supervisor.lockfile import sign_of
from supervisor.orders import Orders, Standing
from supervisor.pidfd import is_stopped, open_pidfd, signal_process, wait_ended, waits_for_disk
from supervisor.pulse import Pulse
from supervisor.rules import What
from supervisor.sockets import connect_to
from supervisor.watch import Watcher

KEEPER = "keeper"  # as the event log names it
PAUSES_S = (0.0, 0.1, 0.5, 2.0)  # between tries to find or start a keeper
KEEPER_S = 10.0  # how long a keeper that takes the place of one that yielded, or a stand-in, is given to listen
END_S = 1.0  # how long one that closed its channel is given to end


class KeeperLost(Exception):
    """There is no keeper, and none could be started."""


class Descriptors:
    """The descriptors held, and the standing orders, by name.  Thread-safe.

    `keeper_socket`: where the keeper listens.  `stand_in_argv`: the program that stands in for a dead one.  `events`: is told which
    processes the keeper has replaced.
    """

    def __init__(
        self,
        keeper_socket: Path,
        stand_in_argv: Sequence[str],
        watcher: Watcher,
        events: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self._path = keeper_socket
        self._stand_in_argv = stand_in_argv
        self._watcher = watcher
        self._events = events
        self._lock = threading.Lock()
        self._held = Held()
        self._orders = Orders(ours_first=True)
        self._listeners: dict[str, Callable[[], None]] = {}
        self._complete = False  # everything that the first keeper held is here, and what this process says counts
        self._keeper: Channel | None = None
        self._keeper_pidfd = -1
        self._pulse: Pulse | None = None  # the keeper's
        self._yielded = False
        self.welcome = Welcome(0, False, False)

    def connect(self) -> None:
        """Find the keeper, take what it holds, and look after it from now on.  Raises KeeperLost, OSError.

        One that dies while it hands over is stood in for: there is nobody else who could.
        """
        for pause_s in PAUSES_S:
            time.sleep(pause_s)
            try:
                self._connect()
                break
            except KeeperLost as error:
                if pause_s == PAUSES_S[-1]:
                    raise
                logger.warning("{}; trying again", error)
        self._watcher.every_beat(self._look)

    def keep(self, descriptors: Mapping[str, int], data: Mapping[str, bytes] | None = None) -> None:
        """Hold the descriptors, which now belong to this object; one with the same name is closed and replaced.

        Raises ValueError when more than DATA_BYTES_MAX are to be held beside one.
        """
        with self._lock:
            self._held.put(list(descriptors), list(descriptors.values()), data or {})
            self._send_all(descriptors)

    def drop(self, *names: str) -> None:
        """Hold them no longer, and close them; a name that is not held is no error."""
        with self._lock:
            self._send_drop(self._held.drop(names))

    def get(self, name: str) -> int | None:
        """The descriptor of that name, which stays this object's."""
        return self._held.get(name)

    def data(self, name: str) -> bytes:
        return self._held.data(name)

    def names(self, prefix: str = "") -> list[str]:
        return [name for name in self._held.names() if name.startswith(prefix)]

    # --- standing orders ---

    @property
    def kept(self) -> bool:
        """Whether there is a keeper, as far as is known: one that has just died, or hangs, is one still."""
        return self._keeper is not None

    def stand(self, name: str, order: StandingOrder, pidfd: int, channel: int) -> bool:
        """Leave a standing order with the keeper, of which this process is under it; both descriptors now belong to this object.

        False: there is a living one already, for the keeper was faster; this one is killed then.
        """
        with self._lock:
            taken = self._orders.put(name, Standing(order, pidfd, channel))
            if taken:
                self._send(Stand(name, order), [pidfd, channel])
            return taken

    def standing(self, name: str) -> Standing | None:
        """The order and the process under it, as far as is known: copies of its descriptors, which are the caller's."""
        with self._lock:
            found = self._orders.get(name)
            return found and Standing(found.order, os.dup(found.pidfd), os.dup(found.channel))

    def dismiss(self, name: str) -> None:
        """The order stands no longer, and its process is ended.  An order that is not known is no error."""
        with self._lock:
            self._listeners.pop(name, None)
            self._orders.dismiss(name)
            self._send(Dismiss([name]))

    def listen(self, name: str, changed: Callable[[], None]) -> None:
        """Call `changed`, which must only tell somebody, whenever the keeper has replaced the process under this order, or is lost."""
        with self._lock:
            self._listeners[name] = changed

    def orders(self) -> list[str]:
        return self._orders.names()

    def keeper_state(self, timeout_s: float = 2.0) -> State | None:
        """How the keeper's own children fare; None while there is no keeper.  It waits for the answer: not for an actor's thread."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
                connection.connect(str(self._path))
                channel = Channel(connection, FROM_KEEPER)
                channel.send(AskState(), (), timeout_s)
                answer, _ = channel.receive(timeout_s)
        except (OSError, ChannelClosed, ChannelTimeout, FrameError):
            return None
        return answer if isinstance(answer, State) else None

    # --- finding a keeper, without the lock: who keeps or drops something meanwhile need not wait ---

    def _connect(self) -> None:
        channel = self._find()
        complete = self._complete
        try:
            theirs, their_orders = self._take_over(channel)
            pidfd = open_pidfd(self.welcome.pid)
        except (ChannelClosed, ChannelTimeout, FrameError, ProcessLookupError) as error:
            channel.close()
            raise KeeperLost(f"the keeper on {self._path} does not hand over: {str(error) or type(error).__name__}") from None
        with self._lock:
            self._keeper, self._yielded = channel, False
            if self._keeper_pidfd >= 0:
                os.close(self._keeper_pidfd)
            self._keeper_pidfd, self._pulse = pidfd, Pulse(self.welcome.pid, time.monotonic())
            # All of it, and not only what is missing there: while one took another's place, some of it was replaced or dropped.
            self._send_all(name for name in self._held.names() if complete or name not in theirs)
            self._send_drop([name for name in theirs if name not in self._held])
            for name in self._orders.names():
                if (standing := self._orders.get(name)) is not None:
                    self._send(Stand(name, standing.order), [standing.pidfd, standing.channel])
            if strange := [name for name in their_orders if self._orders.get(name) is None]:
                self._send(Dismiss(strange))
        self._watcher.channel(channel, self._said, self._lost)

    def _find(self) -> Channel:
        """A keeper that listens.  One that was killed is stood in for at once: until then this process is the only holder."""
        connection = connect_to(self._path, socket.SOCK_SEQPACKET, KEEPER_S if self._yielded else 0.0)
        if connection is None:
            self._yielded = False  # to nobody who lives, as it seems
            stand_in = self._start_stand_in()
            try:
                connection = connect_to(self._path, socket.SOCK_SEQPACKET, KEEPER_S, stand_in)
            finally:
                os.close(stand_in)
        if connection is None:
            raise KeeperLost(f"no keeper listens on {self._path}, and none could be started")
        return Channel(connection, FROM_KEEPER)

    def _take_over(self, channel: Channel) -> tuple[list[str], list[str]]:
        """Take what the keeper holds, unless it is held here already → the names of all that it holds, and of its orders."""
        theirs, their_orders = [], []
        channel.send(Hello(notes=True))
        while True:
            message, descriptors = channel.receive(KEEPER_S)
            match message:
                case Welcome():
                    self.welcome = message
                case Kept(names, data):
                    theirs += names
                    for name, descriptor in zip(names, descriptors, strict=True):
                        if self._complete or name in self._held:
                            os.close(descriptor)
                        else:
                            with self._lock:
                                self._held.put([name], [descriptor], {name: data[name]} if name in data else {})
                case Stand(name, order):
                    their_orders.append(name)
                    self._replaced(name, order, descriptors)
                case KeptAll():
                    self._complete = True
                    return theirs, their_orders

    def _start_stand_in(self) -> int:
        """→ its pidfd."""
        logger.warning("the keeper is gone; a stand-in takes its place")
        child = subprocess.Popen(self._stand_in_argv, stdin=subprocess.DEVNULL, start_new_session=True)
        pidfd = os.pidfd_open(child.pid)  # not reaped yet, for the thread that does it is started below
        child_ended: Callable[[], object] = child.wait
        threading.Thread(target=child_ended, name="stand-in", daemon=True).start()  # reaps it when it yields
        return pidfd

    def _said(self, message: object, descriptors: list[int]) -> None:
        match message:
            case Yielded():
                self._yielded = True
            case Stand(name, order):
                self._replaced(name, order, descriptors)
            case Replaced(number):
                self._events(event_of(message))
                with self._lock:
                    self._send(Noted(number))

    def _replaced(self, name: str, order: StandingOrder, descriptors: list[int]) -> None:
        """The keeper has a process under that order."""
        pidfd, channel = descriptors
        standing = Standing(order, pidfd, channel)
        with self._lock:
            if self._complete and self._orders.get(name) is None:
                standing.end()  # dismissed here; the keeper will hear of it
                return
            self._orders.put(name, standing)
            changed = self._listeners.get(name)
        if changed is not None:
            changed()

    def _lost(self) -> None:
        with self._lock:
            self._keeper, lost = None, self._keeper
            if lost is not None:
                lost.close()
            listeners = list(self._listeners.values())
        for changed in listeners:  # nobody but this process replaces anything now
            changed()
        # Not in the watcher's thread, which must not wait for a new keeper.
        threading.Thread(target=self._find_again, name="keeper lost", daemon=True).start()

    def _look(self) -> None:
        """End a keeper that hangs; its channel then closes, and what follows is the same as if it had been killed."""
        with self._lock:
            if self._keeper is None or self._pulse is None or not lock_beside(self._path).exists():
                return  # in the last case somebody has deleted the lock: where it beats now, nobody sees
            stopped = not self._pulse.begun and is_stopped(self._keeper_pidfd)
            at_disk = partial(waits_for_disk, self._keeper_pidfd)
            number = self._pulse.look(sign_of(lock_beside(self._path)), time.monotonic(), stopped, at_disk)
            if number is not None:
                logger.warning("the keeper hangs; it is ended")
                signal_process(self._keeper_pidfd, number)

    def _find_again(self) -> None:
        # The kernel closes what an ending process had one after the other: who finds its listener still there would take it for another
        # one's, and a stand-in that finds its lock held ends.
        wait_ended(self._keeper_pidfd, END_S)
        for pause_s in itertools.chain(PAUSES_S, itertools.repeat(PAUSES_S[-1])):
            try:
                self._connect()
                return
            except (KeeperLost, OSError) as error:
                logger.error("{}; trying again", error)
            time.sleep(pause_s)

    # --- with the lock held ---

    def _send_all(self, names: Iterable[str]) -> None:
        for batch, data, descriptors in self._held.packets(names):
            self._send(Keep(batch, data), descriptors)

    def _send_drop(self, names: Sequence[str]) -> None:
        for start in range(0, len(names), 256):
            self._send(Drop(list(names[start : start + 256])))

    def _send(self, message: Keep | Drop | Stand | Dismiss | Noted, descriptors: Sequence[int] = ()) -> None:
        if self._keeper is None:
            return  # everything is sent to the next one
        try:
            self._keeper.send(message, descriptors)
        except (ChannelClosed, ChannelTimeout):
            pass  # the watcher sees it die, and the next one gets everything


def event_of(replaced: Replaced) -> Event:
    """What the keeper has replaced, for the event log."""
    exit = of_code(replaced.code)
    how = f"hung, {exit}" if replaced.hung else str(exit)
    return Event(
        replaced.at_s,
        KEEPER,
        replaced.process,
        replaced.number,
        What.STARTED.value,
        (Cause.HUNG if replaced.hung else exit.cause).value,
        f"pid {replaced.pid} in place of {replaced.before}: {how}",
    )
