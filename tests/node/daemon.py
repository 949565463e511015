"""A real daemon for the tests, in directories of its own, and a look at what it leaves."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from actors.gateway.client import Client
from actors.gateway.messages import Ended, Submit, TaskResult, TaskSpec, Tree, TreeShown, Wait
from actors.lazytree.mounts import mounts_below, unmount
from actors.output.follower import Follower
from supervisor.lockfile import holder_of

PROGRAM = Path(__file__).resolve().parents[2] / "run.py"
PATIENCE_S = 60.0


class Daemon:
    """`run.py daemon` with its state below `home`; tasks run `image` unless they say otherwise.  `program`: another one in its place."""

    program = PROGRAM

    def __init__(self, home: Path, image: str, **settings: str) -> None:
        self.state, self.run_dir, self.image = home / "state", home / "run", image
        self.log = home / "daemon.log"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("AERIE_")},
            "AERIE_STATE_DIR": str(self.state),
            "AERIE_RUN_DIR": str(self.run_dir),
            "AERIE_IMAGE_PREFETCH": "off",
            **settings,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._client: Client | None = None
        self._count = 0

    # --- its life ---

    def start(self, *options: str) -> None:
        """Start it, and wait until it takes tasks."""
        earlier = self._process
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, self.program, "daemon", *options],
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        waited = self.command("wait", "--timeout", "60s")
        assert waited.returncode == 0, (waited, self.log.read_text()[-3000:])
        # Where a daemon lives already, tasks are taken before this process is its keeper.
        deadline = time.monotonic() + PATIENCE_S
        while self.tree()["pid"] != self.pid:
            assert time.monotonic() < deadline and self._process.poll() is None, self.log.read_text()[-3000:]
        if earlier is not None:
            earlier.wait(PATIENCE_S)  # it gave up its place, or was killed

    def stop(self) -> int:
        """SIGTERM → its exit code."""
        assert self._process is not None
        self.close_client()
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    # --- as its users see it ---

    def command(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
        """Run run.py."""
        return subprocess.run(
            [sys.executable, PROGRAM, *arguments],
            env=self.environment,
            capture_output=True,
            timeout=PATIENCE_S,
            check=False,
            **options,
        )

    @property
    def client(self) -> Client:
        if self._client is None:
            self._client = Client(self.run_dir)
        return self._client

    def close_client(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def spec(self, script: str | list[str], **changes: Any) -> TaskSpec:
        command = ["/bin/sh", "-c", script] if isinstance(script, str) else script
        fields: dict[str, Any] = {
            "image": self.image,
            "command": command,
            "env": {},
            "workspace": None,
            "cpu_cores": 1.0,
            "memory_bytes": 256 << 20,
            "timeout_s": None,
            "runtime": "crun",
        }
        return TaskSpec(**fields | changes)

    def submit(self, script: str | list[str], task: str = "", **changes: Any) -> str:
        """Submit a task, and do not wait for it → its id."""
        if not task:
            self._count += 1
            task = f"task-{self._count}"
        self.client.ask(Submit(self.client.number(), task, self.spec(script, **changes), wait=False))
        return task

    def result(self, task: str) -> TaskResult:
        """Wait for a task's end."""
        answer = self.client.ask(Wait(self.client.number(), task, None), timeout_s=PATIENCE_S)
        assert isinstance(answer, Ended), answer
        return answer.result

    def run(self, script: str | list[str], **changes: Any) -> TaskResult:
        return self.result(self.submit(script, **changes))

    def logs(self, task: str) -> tuple[bytes, bytes]:
        """What an ended task printed to stdout and stderr."""
        follower = Follower(self.state / "tasks" / task / "output")
        try:
            chunks = follower.finish()
        finally:
            follower.close()
        return tuple(b"".join(chunk.data for chunk in chunks if chunk.stream == stream) for stream in ("stdout", "stderr"))  # type: ignore[return-value]

    def tree(self) -> dict[str, Any]:
        answer = self.client.ask(Tree(self.client.number()))
        assert isinstance(answer, TreeShown)
        return dict(msgspec.to_builtins(answer.keeper))

    def pid_of(self, name: str) -> int:
        """The pid of one of its processes, by the name that `tree` shows.  Raises LookupError when there is none."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            todo = [self.tree()]
            while todo:
                node = todo.pop()
                if (node["kind"], node["name"]) == ("process", name) and node["pid"] is not None:  # None: being replaced
                    return int(node["pid"])
                todo += node["children"]
            # These there always are, but the tree lacks them when the keeper has not answered it within two seconds.
            if name not in ("keeper", "fork server") or time.monotonic() > deadline:
                raise LookupError(name)

    def wait_pid(self, name: str, other_than: int = 0) -> int:
        """Wait for a process of that name, which may be starting, or being replaced → its pid."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            try:
                pid = self.pid_of(name)
            except LookupError:
                continue
            if pid != other_than:
                return pid
        raise TimeoutError(name)

    def wait_running(self, task: str) -> None:
        """Wait until a task's command has been started."""
        deadline = time.monotonic() + PATIENCE_S
        while b'"running"' not in (shown := self.command("result", "--json", task)).stdout:
            assert time.monotonic() < deadline, shown

    def wait_printed(self, task: str, text: bytes) -> None:
        """Wait until the task has printed it, in one piece."""
        journal = self.state / "tasks" / task / "output/journal"
        deadline = time.monotonic() + PATIENCE_S
        while not journal.exists() or text not in journal.read_bytes():
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL to every process of its, until there is none.  First they are stopped: one starts another in place of one that ends."""
        deadline = time.monotonic() + PATIENCE_S
        while pids := self.processes():
            assert time.monotonic() < deadline, [(pid, name_of(pid), state_of(pid)) for pid in pids]
            for number in (signal.SIGSTOP, signal.SIGKILL):
                for pid in pids:
                    with suppress(ProcessLookupError):
                        os.kill(pid, number)

    def kill_supervisors(self) -> None:
        """SIGKILL to keeper and root supervisor, neither of which lives to start another one in the other's place."""
        keeper, root = self.wait_pid("keeper"), self.wait_pid("root supervisor")
        os.kill(keeper, signal.SIGSTOP)
        for pid in (root, keeper):
            os.kill(pid, signal.SIGKILL)
        self.close_client()

    def clear_away(self) -> None:
        """End and unmount everything, after a failure that left it in no state to do so itself."""
        self.kill()
        for mount in mounts_below(str(self.state.parent)):
            unmount(mount.target, lazily=True)

    def reap(self) -> None:
        """Wait for the end of a daemon that was killed."""
        if self._process is not None:
            self._process.wait(PATIENCE_S)

    # --- what it leaves ---

    def processes(self) -> set[int]:
        """Every process on the host that has this daemon's state directory in its environment."""
        mark = f"AERIE_STATE_DIR={self.state}".encode()
        found = set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    if mark in (entry / "environ").read_bytes().split(b"\0"):
                        found.add(int(entry.name))
                except OSError:
                    pass
        return found

    def group_parents(self) -> list[Path]:
        """The directory of its control groups, in every hierarchy."""
        name = f"aerie-{hashlib.sha256(str(self.state).encode()).hexdigest()[:8]}"
        # Not through all of the tree: other daemons' groups come and go while it is walked.
        hierarchies = [Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").glob("*/")]
        return [parent for hierarchy in hierarchies if (parent := hierarchy / name).is_dir()]

    def groups(self) -> list[Path]:
        """Its control groups, in every hierarchy."""
        return [group for parent in self.group_parents() for group in parent.glob("*/")]

    def root_is_gone(self) -> bool:
        """Whether no root supervisor of its lives."""
        return holder_of(self.run_dir / "root.lock") == 0

    def wait_released(self) -> None:
        """Wait until everything that tasks had is given back: their mount points first, what they had on the state disk last."""
        deadline = time.monotonic() + PATIENCE_S
        # Looked for, not waited for by inotify: closing that takes the kernel longer than all of this.
        while left := [*(self.run_dir / "tasks").iterdir(), *self.task_directories()]:
            assert time.monotonic() < deadline, f"left: {left}\n{self.log.read_text()[-3000:]}"
            time.sleep(0.005)

    def wait_nothing_left(self) -> None:
        """Wait until nothing of tasks is left, nor is just looked at: who was started again asks each runtime for its version."""
        self.wait_released()
        deadline = time.monotonic() + PATIENCE_S
        while left := self.leavings():
            assert time.monotonic() < deadline, left

    def task_directories(self) -> list[Path]:
        """What tasks have on the state disk, beside the output that stays, and what is being deleted."""
        found = []
        for task in (self.state / "tasks").iterdir():
            with suppress(FileNotFoundError):  # it is forgotten just now
                found += [entry for entry in task.iterdir() if entry.name != "output"]
        return found + [entry for home in (self.state, self.run_dir) for entry in (home / "removed").glob("*")]

    def leavings(self) -> list[str]:
        """What is left of tasks: mounts, directories, control groups, monitors.  For when no task runs."""
        found = [f"mount {mount.target}" for mount in mounts_below(str(self.run_dir / "tasks"))]
        found += [f"control group {group}" for group in self.groups()]
        found += [f"directory {entry}" for entry in (self.run_dir / "tasks").iterdir()]
        found += [f"directory {entry}" for entry in self.task_directories()]
        for pid in self.processes():
            if (name := name_of(pid)) in ("conmon", "crun", "runc"):
                found.append(f"process {name} {pid}")
        return found

    def own_faults(self) -> list[str]:
        """What the log tells of faults of the daemon's own, if nobody has damaged anything."""
        return [line for line in self.log.read_text().splitlines() if line.startswith("Traceback") or "is damaged" in line]

    def leavings_after_stop(self) -> list[str]:
        """What is left of a daemon that has ended."""
        found = [f"mount {mount.target}" for mount in mounts_below(str(self.state.parent))]
        return self.leavings() + found + [f"process {pid} {name_of(pid)}" for pid in self.processes()]


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):  # it ended before the file was opened, or before it was read
        return ""


def state_of(pid: int) -> str:
    """A process's state as proc_pid_stat(5) names it; "" when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def in_place_of(program: str, home: Path, script: str) -> str:
    """Put a shell script in a program's place, which is `$program` in it → the PATH on which it is found."""
    place = home / "bin" / program
    place.parent.mkdir()
    place.write_text(f"#!/bin/sh\nprogram={shutil.which(program)}\n{script}\n")
    place.chmod(0o755)
    return f"{place.parent}:{os.environ['PATH']}"


@contextmanager
def running(home: Path, image: str, **settings: str) -> Iterator[Daemon]:
    """A daemon that is stopped at the end, and must leave nothing."""
    daemon = Daemon(home, image, **settings)
    try:
        daemon.start()
        yield daemon
    finally:
        code = daemon.stop()
    assert code == 0, daemon.log.read_text()[-3000:]
    left = daemon.leavings_after_stop()
    assert not left, (left, daemon.log.read_text()[-3000:])
