"""Whoever waits for a task at its daemon goes on where it was when the daemon dies and is started again: no line lost, none doubled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.faults.test_kills import wait_for_lines
from tests.node.daemon import PATIENCE_S, PROGRAM, Daemon, running

LINES = 130
WAIT = "until [ -e go ]; do sleep 0.02; done"  # lest it ends before its followers are there
SCRIPT = f"i=0; while [ $i -lt {LINES} ]; do i=$((i+1)); echo out $i; echo err $i >&2; sleep 0.03; [ $i -ne 30 ] || {WAIT}; done; exit 7"
OUT, ERR = ("".join(f"{word} {number}\n" for number in range(1, LINES + 1)).encode() for word in ("out", "err"))


@pytest.fixture
def own(tmp_path: Path, image: str) -> Iterator[Daemon]:
    """A daemon of the test's own, with no more places than the task that is followed, `submit --wait` and half a batch need."""
    with running(tmp_path, image, AERIE_GATEWAY_PARALLEL="4", AERIE_SANDBOX_STOP_GRACE="60s") as started:
        yield started


def let_go(daemon: Daemon, task: str) -> None:
    """Let a task go on that waits."""
    (daemon.state / "tasks" / task / "workspace/upper/go").touch()


class Clients:
    """Commands that are run at the same time."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *arguments: str, stdin: bytes = b"") -> None:
        process = subprocess.Popen(
            [sys.executable, PROGRAM, *arguments],
            env=self._daemon.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdin is not None
        process.stdin.write(stdin)
        process.stdin.close()
        process.stdin = None
        self._running[name] = process

    def wait_connected(self) -> None:
        """Wait until each has a socket, which is the daemon's."""
        deadline = time.monotonic() + PATIENCE_S
        for process in self._running.values():
            while not any(is_socket(link) for link in Path(f"/proc/{process.pid}/fd").iterdir()):
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.01)

    def has_ended(self, name: str) -> bool:
        return self._running[name].poll() is not None

    def end(self, name: str) -> tuple[bytes, bytes, int]:
        process = self._running.pop(name)
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
        return stdout, stderr, process.returncode


def is_socket(link: Path) -> bool:
    try:
        return os.readlink(link).startswith("socket:")
    except FileNotFoundError:
        return False


def lines(image: str) -> bytes:
    """A batch: the later half of it waits."""
    scripts = [f"{'sleep 0.7' if number <= 3 else WAIT}; exit {number}" for number in range(1, 7)]
    rows = [
        {"image": image, "command": ["/bin/sh", "-c", script], "id": f"line-{number}"}
        for number, script in enumerate(scripts, 1)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize("away_s", [0.0, 1.5])
def test_they_outlast_keeper_and_root_supervisor(own: Daemon, away_s: float) -> None:
    clients, task = Clients(own), own.submit(SCRIPT, task="followed")
    wait_for_lines(own, task, 10)
    clients.start("logs", "logs", "-f", task)
    clients.start("json", "logs", "-f", "--json", task)
    clients.start("result", "result", "--wait", "60s", "--json", task)
    clients.start("submit", "submit", "--wait", "--id", "submitted", own.image, "--", "/bin/sh", "-c", SCRIPT)
    own.submit(f"trap '{WAIT}; exit 4' TERM; echo ready; while :; do sleep 0.05; done", task="stopped")
    wait_for_lines(own, "stopped", 1)  # one that had not begun would not have been cancelled
    clients.start("stop", "stop", "--json", "stopped")
    wait_for_lines(own, "submitted", 5)
    clients.start("batch", "batch", "--parallel", "3", "-", stdin=lines(own.image))  # with the one place that is left
    clients.wait_connected()
    for waiting in (task, "submitted", "stopped"):
        let_go(own, waiting)
    own.kill_supervisors()
    time.sleep(away_s)  # how long nobody starts it
    own.start()
    assert clients.end("logs") == (OUT, ERR, 0)
    stdout, stderr, code = clients.end("json")
    shown: dict[str, str] = {"stdout": "", "stderr": ""}
    for row in map(json.loads, stdout.splitlines()):
        shown[row["stream"]] += row["text"]
    assert (shown["stdout"].encode(), shown["stderr"].encode(), stderr, code) == (OUT, ERR, b"", 0)
    stdout, stderr, code = clients.end("result")
    assert (json.loads(stdout)["exit_code"], stderr, code) == (7, b"", 0)
    assert clients.end("submit") == (OUT, ERR, 7)
    deadline = time.monotonic() + PATIENCE_S
    while not clients.has_ended("batch"):
        assert time.monotonic() < deadline
        for number in range(4, 7):
            with suppress(FileNotFoundError):  # it has not begun yet, or is over
                let_go(own, f"line-{number}")
        time.sleep(0.05)
    stdout, stderr, code = clients.end("batch")
    results = [json.loads(line) for line in stdout.splitlines()]
    assert ({row["task"]: row["exit_code"] for row in results}, len(results)) == ({f"line-{n}": n for n in range(1, 7)}, 6)
    assert (stderr, code) == (b"", 0)
    stdout, stderr, code = clients.end("stop")
    ended = json.loads(stdout)
    assert (ended["reason"], ended["exit_code"], stderr, code) == ("cancelled", 4, b"", 0)


def test_a_task_that_ends_while_nobody_is_there_is_followed_to_its_end(own: Daemon) -> None:
    clients = Clients(own)
    task = own.submit(
        f"i=0; while [ $i -lt 100 ]; do i=$((i+1)); echo out $i; sleep 0.02; [ $i -ne 30 ] || {WAIT}; done; printf end; exit 3"
    )
    wait_for_lines(own, task, 5)
    clients.start("logs", "logs", "-f", task)
    clients.start("result", "result", "--wait", "60s", "--json", task)
    clients.wait_connected()
    own.kill_supervisors()
    let_go(own, task)
    journal = own.state / "tasks" / task / "output" / "journal"
    deadline = time.monotonic() + PATIENCE_S
    while b" P end" not in journal.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    own.start()
    expected = b"".join(b"out %d\n" % number for number in range(1, 101)) + b"end"
    assert clients.end("logs") == (expected, b"", 0)
    stdout, _, code = clients.end("result")
    assert (json.loads(stdout)["exit_code"], code) == (3, 0)
