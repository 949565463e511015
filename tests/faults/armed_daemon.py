"""A real daemon whose processes can be killed at any of their durable operations (`armed`), for the tests."""

from __future__ import annotations

import fcntl
import json
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from supervisor.channel import Channel
from supervisor.keeping import FROM_KEEPER, AskState, State
from supervisor.sockets import connect_to
from tests.actors.image.images import RunningRegistry
from tests.faults.armed import HANG, KILL, WITH_ITS_KEEPER, operation_name
from tests.node.daemon import PATIENCE_S, Daemon, name_of

HIT_S = 60.0


class ArmedDaemon(Daemon):
    """Its root supervisor and isolated processes are armed, but those that serve a mount."""

    program = Path(__file__).with_name("armed.py")

    def __init__(self, home: Path, image: str, registry: RunningRegistry, **more: str) -> None:
        self.points, self.logs_dir, self.registry = home / "failpoints", home / "logs", registry
        self.points.mkdir()
        self._heard_bytes = 0  # of the trace
        settings = {
            "AERIE_OUTPUT_FILE_DIR": str(self.logs_dir),
            "AERIE_GATEWAY_PARALLEL": "1",
            "AERIE_GATEWAY_RESULTS_MAX": "3",
            "AERIE_DAEMON_DRAIN_TIMEOUT": "100ms",
            "AERIE_MOUNT_SYNC_INTERVAL": "500ms",
        }
        super().__init__(home, image, FAILPOINTS=str(self.points), **settings | more)

    @contextmanager
    def killed_at(self, task: str, *points: str, keeper: bool = False, hangs: bool = False) -> Iterator[None]:
        """Within this the process that comes there is killed once at each of these points of `task`'s; at its end it was, at most of
        them.

        (Of two operations that go on side by side, the second one may be over when the first one is armed again.)  With `keeper`
        its keeper is killed too, and started again by who started it.  With `hangs` it is not killed: the thread goes on no more.
        """
        how = HANG if hangs else WITH_ITS_KEEPER if keeper else KILL
        (self.points / "new").write_text(json.dumps([task, points, how]))
        (self.points / "new").rename(self.points / "armed")
        starter = threading.Thread(target=self._start_again, args=(len(points),), daemon=True)
        if keeper:
            starter.start()
        yield
        deadline = time.monotonic() + HIT_S
        while len(self.left()) > (0 if keeper else len(points) // 3):
            assert time.monotonic() < deadline, (
                f"never reached {self.left()}, but {self.reached(task)}\n{self.log.read_text()[-2000:]}"
            )
            time.sleep(0.01)
        with open(self.points / "lock", "w") as lock:
            # One that is about to die takes its name out, and so puts the file there anew: not after this.
            fcntl.flock(lock, fcntl.LOCK_EX)
            (self.points / "armed").unlink()
        if keeper:
            starter.join(PATIENCE_S)
            assert not starter.is_alive()

    def left(self) -> list[str]:
        """The points at which it was not killed yet."""
        return list(json.loads((self.points / "armed").read_text())[1])

    def _start_again(self, times: int) -> None:
        for _ in range(times):
            assert self._process is not None
            self._process.wait(PATIENCE_S)
            with open(self.log, "ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, self.program, "daemon"],
                    env=self.environment,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )

    def reached(self, *tasks: str) -> list[str]:
        """The operations that were begun since this was asked last, by their names, each once; TASK in them is any of these tasks."""
        with open(self.points / "trace") as trace:
            trace.seek(self._heard_bytes)
            text = trace.read()
            text = text[: text.rfind("\n") + 1]  # the last one may be just being written
            self._heard_bytes += len(text.encode())
        names = dict.fromkeys(text.splitlines())
        for task in tasks:
            names = dict.fromkeys(operation_name(name, task) for name in names)
        return list(names)

    def quiet(self) -> None:
        """Wait until nothing is going on, and see that nothing is left of any task."""
        self.wait_released()
        deadline = time.monotonic() + PATIENCE_S
        while self.unreleased():
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.01)
        while left := self.leavings():  # one that was just started again asks each runtime for its version
            assert time.monotonic() < deadline, left
            time.sleep(0.01)
        expected = {"keeper": 1, "fork server": 1, "output mover": 1, "syncer": 1, "python": 1}
        spare = Counter({"spare": 1})  # which the fork server makes when it has time
        while (running := Counter(name_of(pid) for pid in self.processes())) - spare != expected:
            assert time.monotonic() < deadline, running
            time.sleep(0.02)
        while (held := self.held()) != ["listener/gateway"]:
            assert time.monotonic() < deadline, held
            time.sleep(0.02)

    def unreleased(self) -> list[str]:
        with closing(sqlite3.connect(f"file:{self.state / 'aerie.db'}?mode=ro", uri=True, timeout=PATIENCE_S)) as database:
            return [task for (task,) in database.execute("SELECT task FROM tasks WHERE released = 0")]

    def held(self) -> list[str]:
        """What the keeper holds."""
        connection = connect_to(self.run_dir / "keeper.sock", socket.SOCK_SEQPACKET, PATIENCE_S)
        assert connection is not None, self.log.read_text()[-3000:]
        with connection:
            channel = Channel(connection, FROM_KEEPER)
            channel.send(AskState(), (), PATIENCE_S)
            answer, _ = channel.receive(PATIENCE_S)
        assert isinstance(answer, State)
        return answer.names
