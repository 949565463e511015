"""A daemon of test programs (`programs_under_test`) in a directory, as the tests of the keeper see it from outside."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from supervisor.channel import Channel, ChannelClosed
from supervisor.frames import Message
from supervisor.keeping import FROM_KEEPER, AskState, State
from supervisor.lockfile import sign_of
from supervisor.sockets import connect_to
from tests.supervisor.descendants import descendants, ends, kill
from tests.supervisor.programs_under_test import FROM_ROOT, Ask, Holds, argv

TIMEOUT_S = 60.0


class Daemon:
    """`started`: the keepers that somebody started.  `end` ends every process of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.started: list[subprocess.Popen[bytes]] = []
        self._before = descendants()  # other tests' registries, for instance

    def start(self, what: str = "keeper") -> subprocess.Popen[bytes]:
        with open(self.directory / "log", "ab") as log:
            keeper = subprocess.Popen(argv(what, self.directory), stdin=subprocess.DEVNULL, stderr=log)
        self.started.append(keeper)
        return keeper

    def state(self, until: Callable[[State], bool] = lambda state: True) -> State:
        """How the keeper says that it is, as soon as there is one of which `until` is true; it is asked again until then."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            channel = self.connect("keeper.sock")
            try:
                channel.send(AskState())
                state, _ = channel.receive(TIMEOUT_S)
            except ChannelClosed:
                continue  # it was killed before it could answer
            finally:
                channel.close()
            assert isinstance(state, State)
            if until(state):
                return state
            assert time.monotonic() < deadline, state

    def fork_server(self) -> int:
        """The fork server's pid, as soon as it has its lock: whoever takes the keeper's place finds it by that."""
        pid = self.state(lambda state: state.fork_server_pid > 0).fork_server_pid
        deadline = time.monotonic() + TIMEOUT_S
        while sign_of(self.directory / "forkserver.lock").pid != pid:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return pid

    def patient(self) -> None:
        """To be said before anything is started: nobody of it is taken for hung, however long a test stops it."""
        (self.directory / "patient").touch()

    def kept(self, *names: str) -> State:
        """The same, as soon as it holds just what has these names."""
        return self.state(lambda state: state.names == sorted(names))

    def connect(self, name: str) -> Channel:
        connection = connect_to(self.directory / name, socket.SOCK_SEQPACKET, TIMEOUT_S)
        assert connection is not None
        return Channel(connection, FROM_KEEPER)

    def ask(self, message: Message | None = None) -> Holds:
        """Tell the root supervisor, as soon as there is one → what it holds then.

        Who is only asked, and was being killed just then, is not the one: its successor is.
        """
        while True:
            connection = connect_to(self.directory / "root.sock", socket.SOCK_SEQPACKET, TIMEOUT_S)
            assert connection is not None
            channel = Channel(connection, FROM_ROOT)
            try:
                channel.send(message or Ask())
                answer, _ = channel.receive(TIMEOUT_S)
            except ChannelClosed:
                if message is not None:
                    raise
                continue
            finally:
                channel.close()
            assert isinstance(answer, Holds)
            return answer

    def log(self) -> str:
        return (self.directory / "log").read_text()

    def end(self) -> None:
        """Whoever is started again meanwhile is ended in the next round."""
        while living := [pid for pid in descendants() if pid not in self._before and not ends(pid, 0)]:
            for pid in living:
                kill(pid)
        for keeper in self.started:
            keeper.wait()
