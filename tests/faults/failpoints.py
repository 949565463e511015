"""Every durable operation of a root supervisor, by the scenario in which it is killed there: the one table of failpoints (`armed`).

An operation that is not in it fails `test_failpoints`, and so does one that is reached no more.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from supervisor.channel import Channel
from supervisor.keeping import FROM_KEEPER, AskState, State
from tests.actors.image.images import RunningRegistry
from tests.faults.armed import operation_name
from tests.node.daemon import PATIENCE_S, Daemon, name_of

HIT_S = 60.0


class ArmedDaemon(Daemon):
    """A daemon whose root supervisor can be killed at any of its durable operations."""

    program = Path(__file__).with_name("armed.py")

    def __init__(self, home: Path, image: str, registry: RunningRegistry) -> None:
        self.points, self.logs_dir, self.registry = home / "failpoints", home / "logs", registry
        self.points.mkdir()
        settings = {
            "AERIE_OUTPUT_FILE_DIR": str(self.logs_dir),
            "AERIE_GATEWAY_PARALLEL": "1",
            "AERIE_GATEWAY_RESULTS_MAX": "3",
            "AERIE_DAEMON_DRAIN_TIMEOUT": "100ms",
        }
        super().__init__(home, image, FAILPOINTS=str(self.points), **settings)

    @contextmanager
    def killed_at(self, task: str, *points: str, keeper: bool = False) -> Iterator[None]:
        """Within this the root supervisor is killed once at each of these points of `task`'s; at its end it was, at most of them.

        (Of two operations that go on side by side, the second one may be over when the first one is armed again.)  With `keeper`
        its keeper is killed too, and started again by who started it.
        """
        (self.points / "new").write_text(json.dumps([task, points, keeper]))
        (self.points / "new").rename(self.points / "armed")
        starter = threading.Thread(target=self._start_again, daemon=True)
        if keeper:
            starter.start()
        yield
        deadline = time.monotonic() + HIT_S
        while len(self.left()) > (0 if keeper else len(points) // 3):
            assert time.monotonic() < deadline, (
                f"never reached {self.left()}, but {self.reached(task)}\n{self.log.read_text()[-2000:]}"
            )
            time.sleep(0.01)
        (self.points / "armed").unlink()
        if keeper:
            starter.join(PATIENCE_S)
            assert not starter.is_alive()

    def left(self) -> list[str]:
        """The points at which it was not killed yet."""
        return list(json.loads((self.points / "armed").read_text())[1])

    def _start_again(self) -> None:
        for _ in self.left():
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

    def reached(self, task: str) -> list[str]:
        """The operations that were begun so far, by their names, each once; those of other tasks are left out."""
        lines = (self.points / "trace").read_text().splitlines()
        return list(dict.fromkeys(operation_name(line, task) for line in lines))

    def quiet(self) -> None:
        """Wait until nothing is going on, and see that nothing is left of any task."""
        self.wait_released()
        deadline = time.monotonic() + PATIENCE_S
        while self.unreleased():
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.01)
        assert self.leavings() == []
        expected = {"keeper": 1, "fork server": 1, "output mover": 1, "syncer": 1, "python": 1}
        spare = Counter({"spare": 1})  # which the fork server makes when it has time
        while (running := Counter(name_of(pid) for pid in self.processes())) - spare != expected:
            assert time.monotonic() < deadline, running
            time.sleep(0.02)
        while (held := self.held()) != ["listener/gateway"]:
            assert time.monotonic() < deadline, held
            time.sleep(0.02)

    def unreleased(self) -> list[str]:
        with closing(sqlite3.connect(f"file:{self.state / 'aerie.db'}?mode=ro", uri=True)) as database:
            return [task for (task,) in database.execute("SELECT task FROM tasks WHERE released = 0")]

    def held(self) -> list[str]:
        """What the keeper holds."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(os.fspath(self.run_dir / "keeper.sock"))
            channel = Channel(connection, FROM_KEEPER)
            channel.send(AskState(), (), PATIENCE_S)
            answer, _ = channel.receive(PATIENCE_S)
        assert isinstance(answer, State)
        return answer.names


HELD = "attempt/TASK conmon/TASK container/TASK stderr/TASK stdout/TASK"

FAILPOINTS: dict[str, tuple[str, ...]] = {
    "workspace": (
        "commit INSERT tasks TASK",
        "after commit INSERT tasks TASK",
        "mkdir STATE/tasks/TASK/workspace",
        "mkdir STATE/tasks/TASK",
        "write STATE/tasks/TASK/workspace/name",
        "torn write STATE/tasks/TASK/workspace/name",
        "mkdir RUN/tasks/TASK/lazy",
        "mkdir RUN/tasks/TASK",
        "unmount RUN/tasks/TASK/lazy",
        "mount RUN/tasks/TASK/lazy",
        "after mount RUN/tasks/TASK/lazy",
        "keep fuse/TASK",
        "after keep fuse/TASK",
        "write RUN/served/.TASK.init",
        "torn write RUN/served/.TASK.init",
        "rename RUN/served/TASK.init",
        "isolate workspace mount TASK",
        "after isolate workspace mount TASK",
        "mkdir RUN/tasks/TASK/meta",
        "mkdir RUN/tasks/TASK/workspace",
        "unmount RUN/tasks/TASK/meta",
        "mount RUN/tasks/TASK/meta",
        "after mount RUN/tasks/TASK/meta",
        "mkdir STATE/tasks/TASK/workspace/work",
        "mkdir STATE/tasks/TASK/workspace/upper.new",
        "chown STATE/tasks/TASK/workspace/upper.new",
        "chmod STATE/tasks/TASK/workspace/upper.new",
        "rename STATE/tasks/TASK/workspace/upper",
        "mount RUN/tasks/TASK/workspace",
        "after mount RUN/tasks/TASK/workspace",
        "mkdir STATE/tasks/TASK/output",
        "mkdir STATE/tasks/TASK/root/upper",
        "mkdir STATE/tasks/TASK/root",
        "mkdir STATE/tasks/TASK/root/work",
        "mkdir RUN/tasks/TASK/root",
        "mkdir RUN/tasks/TASK/bundle",
        "mkdir RUN/tasks/TASK/monitor",
        "chmod STATE/tasks/TASK/root/upper",
        "mount RUN/tasks/TASK/root",
        "after mount RUN/tasks/TASK/root",
        "write RUN/tasks/TASK/bundle/config.json",
        "torn write RUN/tasks/TASK/bundle/config.json",
        "chmod RUN/tasks/TASK/bundle/config.json",
        "commit UPDATE tasks.intended_at TASK",
        "write RUN/tasks/TASK/bundle/hosts",
        "torn write RUN/tasks/TASK/bundle/hosts",
        "chmod RUN/tasks/TASK/bundle/hosts",
        "write RUN/tasks/TASK/bundle/resolv.conf",
        "torn write RUN/tasks/TASK/bundle/resolv.conf",
        "chmod RUN/tasks/TASK/bundle/resolv.conf",
        "write STATE/tasks/TASK/attempt",
        "torn write STATE/tasks/TASK/attempt",
        "mkdir RUN/tasks/TASK/monitor/exits",
        "mkdir RUN/tasks/TASK/monitor/sockets",
        "remove RUN/tasks/TASK/monitor/conmon.pid",
        "after commit UPDATE tasks.intended_at TASK",
        "write RUN/tasks/TASK/monitor/conmon.log",
        "torn write RUN/tasks/TASK/monitor/conmon.log",
        "start conmon",
        "after start conmon",
        f"keep {HELD}",
        f"after keep {HELD}",
        "write RUN/runtimes/crun/TASK.N/exec.fifo",
        "remove RUN/runtimes/crun/TASK.N/exec.fifo",
        "commit UPDATE tasks.started_at TASK",
        "after commit UPDATE tasks.started_at TASK",
        "commit INSERT positions TASK",
        "after commit INSERT positions TASK",
        "commit UPDATE tasks.result TASK",
        "after commit UPDATE tasks.result TASK",
        "unmount RUN/tasks/TASK/workspace",
        "rmtree RUN/runtimes/crun/TASK.N",
        "halfway rmtree RUN/runtimes/crun/TASK.N",
        "rmdir GROUP/TASK.N",
        "unmount RUN/tasks/TASK/root",
        "rmtree STATE/tasks/TASK/root",
        "halfway rmtree STATE/tasks/TASK/root",
        "write STATE/tasks/TASK/workspace/synced",
        "torn write STATE/tasks/TASK/workspace/synced",
        "remove STATE/tasks/TASK/workspace/listing",
        "rmtree STATE/tasks/TASK/workspace",
        "halfway rmtree STATE/tasks/TASK/workspace",
        "rmtree RUN/tasks/TASK/bundle",
        "halfway rmtree RUN/tasks/TASK/bundle",
        "rmdir RUN/tasks/TASK/workspace",
        "rmdir RUN/tasks/TASK/meta",
        "rmtree RUN/tasks/TASK/monitor",
        "halfway rmtree RUN/tasks/TASK/monitor",
        "rmdir RUN/tasks/TASK/lazy",
        "rmdir RUN/tasks/TASK",
        "drop fuse/TASK",
        "after drop fuse/TASK",
        "remove RUN/served/TASK.init",
        "remove STATE/tasks/TASK/attempt",
        "rmdir RUN/tasks/TASK/root",
        f"drop {HELD}",
        f"after drop {HELD}",
        "commit UPDATE tasks.released TASK",
        "after commit UPDATE tasks.released TASK",
    ),
    "plain": (
        "mkdir STATE/tasks/TASK/workspace/upper",
        "chown STATE/tasks/TASK/workspace/upper",
        "write RUN/runtimes/crun/TASK.N/exec.fifo",
        "commit INSERT positions TASK",
        "rmtree STATE/tasks/TASK/workspace",
    ),
    "time-out": (
        "commit UPDATE tasks.started_at TASK",
        "commit UPDATE tasks.stop_cause timeout TASK",
        "after commit UPDATE tasks.stop_cause timeout TASK",
        "signal SIGKILL",
        "commit UPDATE tasks.result TASK",
    ),
    "not found": ("start conmon", "after start conmon", "commit UPDATE tasks.result TASK", "unmount RUN/tasks/TASK/root"),
    "not executable": (
        "after commit UPDATE tasks.started_at TASK",
        "commit UPDATE tasks.result TASK",
    ),
    "stopped": (
        "commit UPDATE tasks.stop_cause cancelled TASK",
        "after commit UPDATE tasks.stop_cause cancelled TASK",
        "signal SIGTERM by pid",
    ),
    "stopped by one who left": (
        "after commit UPDATE tasks.stop_cause cancelled TASK",
        "commit UPDATE tasks.result TASK",
    ),
    "stopped before it ran": ("after commit UPDATE tasks.stop_cause cancelled TASK",),
    "stopped by force": ("signal SIGKILL", "commit UPDATE tasks.result TASK"),
    "stopped in the queue": ("commit UPDATE tasks.result TASK", "after commit UPDATE tasks.result TASK"),
    "not synced": (
        "write STATE/tasks/TASK/workspace/.unsynced",
        "torn write STATE/tasks/TASK/workspace/.unsynced",
        "rename STATE/tasks/TASK/workspace/unsynced",
        "commit UPDATE tasks.result TASK",
        "after commit UPDATE tasks.result TASK",
        "unmount RUN/tasks/TASK/workspace",
        "remove STATE/tasks/TASK/workspace/listing",
        "halfway rmtree STATE/tasks/TASK/workspace",
    ),
    "a new image": (
        "isolate image builder",
        "after isolate image builder",
        "signal SIGKILL",
        "commit INSERT resolutions",
        "after commit INSERT resolutions",
        "commit INSERT contents",
        "after commit INSERT contents",
        "mkdir RUN/images/DIGEST",
        "unmount RUN/images/DIGEST",
        "mount RUN/images/DIGEST",
        "after mount RUN/images/DIGEST",
        "unmount RUN/images/DIGEST.lazy",
        "symlink RUN/leases/task/TASK",
        "remove RUN/leases/task/TASK",
    ),
    "image mount": (
        "symlink RUN/leases/LEASE",
        "mkdir RUN/images/LEASE",
        "mount RUN/images/LEASE",
        "after mount RUN/images/LEASE",
        "unmount RUN/images/LEASE",
        "rmdir RUN/images/LEASE",
        "remove RUN/leases/LEASE",
    ),
    "forgotten": (
        "commit DELETE tasks TASK",
        "commit DELETE positions TASK",
        "after commit DELETE tasks TASK",
        "rmtree STATE/tasks/TASK",
        "halfway rmtree STATE/tasks/TASK",
    ),
}

# with the keeper, which is started again by who started it
KEEPER_TOO: dict[str, tuple[str, ...]] = {
    "workspace": (
        "commit INSERT tasks TASK",
        "after commit INSERT tasks TASK",
        "after keep fuse/TASK",
        "after isolate workspace mount TASK",
        "after mount RUN/tasks/TASK/workspace",
        "after start conmon",
        f"keep {HELD}",
        "remove RUN/runtimes/crun/TASK.N/exec.fifo",
        "after commit UPDATE tasks.started_at TASK",
        "commit UPDATE tasks.result TASK",
        "rmtree RUN/runtimes/crun/TASK.N",
        "drop fuse/TASK",
    ),
    "stopped": ("after commit UPDATE tasks.stop_cause cancelled TASK",),
    "plain": (f"keep {HELD}",),
}

# one kill after the other in one task's life: while it recovers from one, the next one strikes
IN_A_ROW: dict[str, tuple[str, ...]] = {
    "the first start": (
        "write RUN/root.lock",
        "torn write RUN/root.lock",
        "write STATE/events",
        "torn write STATE/reserve",
        "after commit DELETE leases",
        "torn write STATE/boot",
        "mkdir RUN/leases",
        "rename RUN/aerie.sock",
        "keep listener/gateway",
    ),
    "a start": (
        "write RUN/mover.lock",
        "torn write RUN/mover.lock",
        "isolate output mover",
        "after isolate output mover",
        "write RUN/syncer.lock",
        "torn write RUN/syncer.lock",
        "isolate syncer",
        "after isolate syncer",
    ),
    "a task made anew": (
        "after mount RUN/tasks/TASK/root",
        "unmount RUN/tasks/TASK/root",
        "rmtree STATE/tasks/TASK/root",
        "halfway rmtree STATE/tasks/TASK/root",
        "rmtree RUN/tasks/TASK/bundle",
        "rmtree RUN/tasks/TASK/monitor",
        "rmdir RUN/tasks/TASK/root",
        "commit UPDATE tasks.attempt TASK",
        "after commit UPDATE tasks.attempt TASK",
    ),
    "a task released": (
        "after commit UPDATE tasks.result TASK",
        "unmount RUN/tasks/TASK/workspace",
        "rmtree RUN/runtimes/crun/TASK.N",
        "rmtree STATE/tasks/TASK/workspace",
        "halfway rmtree STATE/tasks/TASK/workspace",
        "rmtree RUN/tasks/TASK/monitor",
        "commit UPDATE tasks.released TASK",
    ),
    "a drain": (
        "commit UPDATE tasks.stop_cause cancelled TASK",
        "commit UPDATE tasks.result TASK",
        "unmount RUN/tasks/TASK/root",
        "unmount RUN/images/DIGEST",
        "rmdir RUN/images/DIGEST",
        "rmdir RUN/images/DIGEST.lazy",
        "drop listener/gateway",
        "after drop listener/gateway",
        "remove RUN/aerie.sock",
    ),
}

# as above, with the keeper each time: nobody who held anything is left but the task's own processes
WITH_KEEPER_IN_A_ROW: dict[str, tuple[str, ...]] = {
    "a start": (
        "isolate output mover",
        "keep conmon/TASK container/TASK stderr/TASK stdout/TASK",
        "after keep conmon/TASK container/TASK stderr/TASK stdout/TASK",
    ),
}

# a directory that every start makes if it is missing, a name on the way to another: a kill before one of them is as one before the next
AT_EVERY_START = (
    *(f"mkdir {place}" for place in ("STATE/tasks", "STATE/workspaces", "STATE/images", "STATE/images/archives")),
    *(f"mkdir STATE/images/{place}" for place in ("cache", "cache/PREFIX")),
    *(f"mkdir RUN/{place}" for place in ("tasks", "runtimes", "runtimes/crun", "served", "images")),
    "remove RUN/.PID",
    "chmod RUN/.PID",
    "write STATE/reserve",
    "write STATE/boot",
    "commit DELETE leases",
)

# only when processes of a task outlive its first one for a moment, a container was half made, an image was not whole or has two names
SOMETIMES = (
    "write GROUP/TASK.N/cgroup.kill",
    "start crun delete",
    "remove RUN/served/TASK.lock",
    "write RUN/served/TASK.lock",
    "commit UPDATE contents.reference",
    "drop fuse/image/DIGEST",
    "drop spool/image/DIGEST",
    "remove RUN/served/image/DIGEST.init",
    "remove RUN/served/image/DIGEST.lock",
)


def operations(names: Iterable[str]) -> set[str]:
    """The operations of points, without the words before them that only say when."""
    return {re.sub("^(after|torn|halfway) ", "", name) for name in names}


def known() -> set[str]:
    """Every operation in the table."""
    tables = (FAILPOINTS, KEEPER_TOO, IN_A_ROW, WITH_KEEPER_IN_A_ROW)
    return operations([*AT_EVERY_START, *SOMETIMES]) | operations(
        name for table in tables for names in table.values() for name in names
    )
