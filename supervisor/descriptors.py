"""The root supervisor's half of what is held: descriptors by name, each kept by the keeper as well.

Either of the two may be killed: a new root supervisor gets everything from the keeper, a new keeper everything from the root
supervisor.  When the keeper dies and nobody takes its place at once, this class starts a stand-in.
"""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from loguru import logger

from supervisor.channel import DESCRIPTORS_MAX, Channel, ChannelClosed, ChannelTimeout
from supervisor.frames import FrameError
from supervisor.keeping import FROM_KEEPER, AskState, Drop, Hello, Keep, Kept, KeptAll, State, Welcome, Yielded
from supervisor.sockets import connect_to
from supervisor.watch import Watcher

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
        self._held: dict[str, int] = {}
        self._data: dict[str, bytes] = {}
        self._keeper: Channel | None = None
        self._yielded = False
        self.welcome = Welcome(0, False, False)

    def connect(self) -> None:
        """Find the keeper and take what it holds.  Raises KeeperLost."""
        with self._lock:
            self._connect()

    def keep(self, descriptors: Mapping[str, int], data: Mapping[str, bytes] | None = None) -> None:
        """Hold the descriptors, which now belong to this object; one with the same name is closed and replaced."""
        with self._lock:
            for name, descriptor in descriptors.items():
                if self._held.get(name, descriptor) != descriptor:
                    os.close(self._held[name])
                self._held[name] = descriptor
            self._data.update(data or {})
            self._send_all(list(descriptors))

    def drop(self, *names: str) -> None:
        """Hold them no longer, and close them; a name that is not held is no error."""
        with self._lock:
            known = [name for name in names if name in self._held]
            for name in known:
                os.close(self._held.pop(name))
                self._data.pop(name, None)
            for start in range(0, len(known), 256):
                self._send(Drop(known[start : start + 256]))

    def get(self, name: str) -> int | None:
        """The descriptor of that name, which stays this object's."""
        return self._held.get(name)

    def data(self, name: str) -> bytes:
        return self._data.get(name, b"")

    def names(self, prefix: str = "") -> list[str]:
        return sorted(name for name in list(self._held) if name.startswith(prefix))

    def keeper_state(self, timeout_s: float = 2.0) -> State | None:
        """How the keeper's own children fare; None while there is no keeper."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
                connection.connect(str(self._path))
                channel = Channel(connection, FROM_KEEPER)
                channel.send(AskState(), (), timeout_s)
                answer, _ = channel.receive(timeout_s)
        except (OSError, ChannelClosed, ChannelTimeout, FrameError):
            return None
        return answer if isinstance(answer, State) else None

    # --- with the lock held ---

    def _connect(self) -> None:
        # A keeper that was killed says nothing, and is stood in for at once: until then this process is the only holder.
        channel = self._reach(KEEPER_S if self._yielded else 0.0)
        self._yielded = False
        if channel is None:
            self._start_stand_in()
            channel = self._reach(KEEPER_S)
        if channel is None:
            raise KeeperLost(f"no keeper listens on {self._path}, and none could be started")
        known = set()
        channel.send(Hello())
        while True:
            message, descriptors = channel.receive(10.0)
            match message:
                case Welcome():
                    self.welcome = message
                case Kept(names, data):
                    known |= set(names)
                    for name, descriptor in zip(names, descriptors, strict=True):
                        if name in self._held:
                            os.close(descriptor)  # a copy of what is held here already
                            continue
                        self._held[name] = descriptor
                        self._data.update({name: data[name]} if name in data else {})
                case KeptAll():
                    break
        self._keeper = channel
        self._watcher.channel(channel, self._said, self._lost)
        self._send_all([name for name in self._held if name not in known])

    def _reach(self, timeout_s: float) -> Channel | None:
        """A connection to the keeper, as soon as it listens; None when it does not in time."""
        connection = connect_to(self._path, socket.SOCK_SEQPACKET, timeout_s)
        return Channel(connection, FROM_KEEPER) if connection else None

    def _start_stand_in(self) -> None:
        logger.warning("the keeper is gone; a stand-in takes its place")
        child = subprocess.Popen(self._stand_in_argv, stdin=subprocess.DEVNULL, start_new_session=True)
        child_ended: Callable[[], object] = child.wait
        threading.Thread(target=child_ended, name="stand-in", daemon=True).start()  # reaps it when it yields

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
            while self._keeper is None:
                try:
                    self._connect()
                except (KeeperLost, ChannelClosed, ChannelTimeout, FrameError) as error:
                    logger.error("{}; trying again", str(error) or type(error).__name__)

    def _send_all(self, names: list[str]) -> None:
        for start in range(0, len(names), DESCRIPTORS_MAX // 2):
            batch = names[start : start + DESCRIPTORS_MAX // 2]
            data = {name: self._data[name] for name in batch if name in self._data}
            self._send(Keep(batch, data), [self._held[name] for name in batch])

    def _send(self, message: Keep | Drop, descriptors: Sequence[int] = ()) -> None:
        if self._keeper is None:
            return  # everything is sent to the next one
        try:
            self._keeper.send(message, descriptors)
        except (ChannelClosed, ChannelTimeout):
            pass  # the watcher sees it die, and the next one gets everything
