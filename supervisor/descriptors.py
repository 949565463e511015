"""The root supervisor's half of what is held: descriptors by name, each kept by the keeper as well.

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
from pathlib import Path

from loguru import logger

from supervisor.channel import Channel, ChannelClosed, ChannelTimeout
from supervisor.frames import FrameError
from supervisor.held import Held
from supervisor.keeping import FROM_KEEPER, AskState, Drop, Hello, Keep, Kept, KeptAll, State, Welcome, Yielded
from supervisor.sockets import connect_to
from supervisor.watch import Watcher

PAUSES_S = (0.0, 0.1, 0.5, 2.0)  # between tries to find or start a keeper
KEEPER_S = 10.0  # how long a keeper that takes the place of one that yielded, or a stand-in, is given to listen


class KeeperLost(Exception):
    """There is no keeper, and none could be started."""


class Descriptors:
    """The descriptors held, by name.  Thread-safe.

    `keeper_socket`: where the keeper listens.  `stand_in_argv`: the program that stands in for a dead one.
    """

    def __init__(self, keeper_socket: Path, stand_in_argv: Sequence[str], watcher: Watcher) -> None:
        self._path = keeper_socket
        self._stand_in_argv = stand_in_argv
        self._watcher = watcher
        self._lock = threading.Lock()
        self._held = Held()
        self._complete = False  # everything that the first keeper held is here, and what this process says counts
        self._keeper: Channel | None = None
        self._yielded = False
        self.welcome = Welcome(0, False, False)

    def connect(self) -> None:
        """Find the keeper and take what it holds.  Raises KeeperLost, OSError."""
        self._connect()

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
            theirs = self._take_over(channel)
        except (ChannelClosed, ChannelTimeout, FrameError) as error:
            channel.close()
            raise KeeperLost(f"the keeper on {self._path} does not hand over: {str(error) or type(error).__name__}") from None
        with self._lock:
            self._keeper = channel
            # All of it, and not only what is missing there: while one took another's place, some of it was replaced or dropped.
            self._send_all(name for name in self._held.names() if complete or name not in theirs)
            self._send_drop([name for name in theirs if name not in self._held])
        self._watcher.channel(channel, self._said, self._lost)

    def _find(self) -> Channel:
        """A keeper that listens.  One that was killed is stood in for at once: until then this process is the only holder."""
        connection = connect_to(self._path, socket.SOCK_SEQPACKET, KEEPER_S if self._yielded else 0.0)
        self._yielded = False
        if connection is None:
            stand_in = self._start_stand_in()
            try:
                connection = connect_to(self._path, socket.SOCK_SEQPACKET, KEEPER_S, stand_in)
            finally:
                os.close(stand_in)
        if connection is None:
            raise KeeperLost(f"no keeper listens on {self._path}, and none could be started")
        return Channel(connection, FROM_KEEPER)

    def _take_over(self, channel: Channel) -> list[str]:
        """Take what the keeper holds, unless it is held here already → the names of all that it holds."""
        theirs = []
        channel.send(Hello())
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
                case KeptAll():
                    self._complete = True
                    return theirs

    def _start_stand_in(self) -> int:
        """→ its pidfd."""
        logger.warning("the keeper is gone; a stand-in takes its place")
        child = subprocess.Popen(self._stand_in_argv, stdin=subprocess.DEVNULL, start_new_session=True)
        pidfd = os.pidfd_open(child.pid)  # not reaped yet, for the thread that does it is started below
        child_ended: Callable[[], object] = child.wait
        threading.Thread(target=child_ended, name="stand-in", daemon=True).start()  # reaps it when it yields
        return pidfd

    def _said(self, message: object, descriptors: list[int]) -> None:
        self._yielded = isinstance(message, Yielded)

    def _lost(self) -> None:
        # In the watcher's thread, which must not wait for a new keeper.
        threading.Thread(target=self._find_again, name="keeper lost", daemon=True).start()

    def _find_again(self) -> None:
        with self._lock:
            if self._keeper is not None:
                self._keeper.close()
                self._keeper = None
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

    def _send(self, message: Keep | Drop, descriptors: Sequence[int] = ()) -> None:
        if self._keeper is None:
            return  # everything is sent to the next one
        try:
            self._keeper.send(message, descriptors)
        except (ChannelClosed, ChannelTimeout):
            pass  # the watcher sees it die, and the next one gets everything
