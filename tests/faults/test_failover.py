"""A FUSE process is replaced whoever else is away: readers wait, and never see an error (`model`, invariant 1).

Keeper and root supervisor can each do it alone; the fork server may be dead or hang at that moment.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from actors.lazytree.served import KEEPER_S, SILENCE_S, SILENCE_UNKEPT_S
from supervisor.lockfile import sign_of
from supervisor.replacing import ANSWER_S
from tests.faults import victims
from tests.faults.test_kills import wait_for_lines
from tests.node.daemon import Daemon, running
from tests.supervisor.descendants import ends

FILE_BYTES = 64 << 30  # sparse
PAGE_BYTES = 4096
STRIDE_BYTES = 64 << 20  # from read to read: readahead has not brought it into the page cache
SLOW_S = 30.0  # what a loaded machine may add
FORK_SERVER_S = 4.0  # an interpreter and its imports, on such a machine
PATIENCE_S = 60.0


class Task:
    """A task that sleeps beside its workspace, and who serves that."""

    def __init__(self, daemon: Daemon, name: str) -> None:
        self.daemon, self.name = daemon, name
        self._file = os.open(daemon.run_dir / "tasks" / name / "workspace/large", os.O_RDONLY)
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)
        self._page = 0

    def read(self) -> float:
        """Read a page that its server must be asked for → how long that took, in seconds."""
        self._page += 1
        answers: list[bytes] = []
        began = time.monotonic()
        # In a thread that can be left behind: a read that is never answered cannot be ended.
        reader = threading.Thread(
            target=lambda: answers.append(os.pread(self._file, PAGE_BYTES, self._page * STRIDE_BYTES)), daemon=True
        )
        reader.start()
        reader.join(PATIENCE_S)
        assert answers == [bytes(PAGE_BYTES)], self.daemon.log.read_text()[-3000:]
        return time.monotonic() - began

    def pid(self, kind: str) -> int:
        """Of the daemon's process of that kind, found from outside: the daemon need not answer."""
        deadline = time.monotonic() + PATIENCE_S
        while len(found := self.pids(kind)) != 1:
            assert time.monotonic() < deadline, found
        return found[0]

    def pids(self, kind: str) -> list[int]:
        return [process.pid for process in victims.find(self.daemon.state) if process.kind == kind]

    def beaten(self) -> float:
        """Wait until who serves it has shown once more that it lives → a moment before that."""
        lock = self.daemon.run_dir / "served" / f"{self.name}.lock"
        before = now = time.monotonic()
        deadline = now + PATIENCE_S
        shown = sign_of(lock)
        while sign_of(lock) == shown:
            assert now < deadline, shown
            before, now = now, time.monotonic()
        return before

    def close(self) -> None:
        os.close(self._file)


@pytest.fixture
def daemon(tmp_path: Path, image: str) -> Iterator[Daemon]:
    with running(tmp_path, image) as started:
        yield started
        stopping = time.monotonic()
    assert time.monotonic() - stopping < PATIENCE_S, "who is told to end is who has the place"


@pytest.fixture
def task(daemon: Daemon) -> Iterator[Task]:
    store = daemon.state / "workspaces/work"
    store.mkdir(mode=0o755)
    with open(store / "large", "wb") as large:
        large.truncate(FILE_BYTES)
    name = daemon.submit("echo begun; sleep 1000", workspace="work")
    wait_for_lines(daemon, name, 1)
    started = Task(daemon, name)
    started.read()
    yield started
    started.close()
    assert daemon.command("stop", "--force", name).returncode == 0
    daemon.wait_nothing_left()


@pytest.mark.parametrize("away", ["keeper", victims.ROOT])
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_it_is_replaced_while_one_of_the_two_hangs(task: Task, away: str, fault: signal.Signals) -> None:
    hangs = task.pid(away)
    os.kill(hangs, signal.SIGSTOP)
    try:
        served = task.pid("workspace mount")
        os.kill(served, fault)
        took_s = task.read()
        assert task.pid("workspace mount") != served
    finally:
        with suppress(ProcessLookupError):  # on a loaded machine it has hung for so long that it was replaced as well
            os.kill(hangs, signal.SIGCONT)
    if fault is signal.SIGSTOP:
        assert took_s < (SILENCE_UNKEPT_S if away == "keeper" else SILENCE_S) + KEEPER_S + SLOW_S
    else:
        assert took_s < (KEEPER_S if away == "keeper" else 0.0) + SLOW_S
    # Whoever hung knows by now who serves: another one that dies is replaced by the two of them as ever.
    replaced_again(task)
    if away == "keeper":
        task.daemon.start("--take-over")  # on a loaded machine it has hung for so long that a stand-in has its place


@pytest.mark.parametrize("away", ["keeper", victims.ROOT])
def test_it_is_replaced_when_one_of_the_two_is_killed_with_it(task: Task, away: str) -> None:
    pids = [task.pid(kind) for kind in (away, "workspace mount")]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert task.read() < SLOW_S  # and not as long as the other one takes to come back
    replaced_again(task)
    if away == "keeper":
        task.daemon.start()  # in the stand-in's place, whose end nobody would wait for
        replaced_again(task)


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_it_is_replaced_when_the_fork_server_is_struck_with_it(task: Task, fault: signal.Signals) -> None:
    os.kill(task.pid("fork server"), fault)
    os.kill(task.pid("workspace mount"), signal.SIGKILL)
    assert task.read() < (ANSWER_S if fault is signal.SIGSTOP else 0.0) + FORK_SERVER_S + SLOW_S
    replaced_again(task)


def test_one_that_hangs_is_replaced_and_says_so(task: Task) -> None:
    served = task.pid("workspace mount")
    began = task.beaten()
    os.kill(served, signal.SIGSTOP)
    task.read()
    assert SILENCE_S < time.monotonic() - began < SILENCE_S + SLOW_S
    replaced_again(task)
    deadline = time.monotonic() + PATIENCE_S
    # Of another one that had no processor for so long it is said as well that it hung.
    while (causes := replacements(task))[:1] != ["hung"] or set(causes) != {"hung", "killed"}:
        assert time.monotonic() < deadline, causes


def test_it_is_found_when_keeper_and_root_supervisor_are_killed_with_the_fork_server(task: Task) -> None:
    """Its server is the only one left that has the connection."""
    served = task.pid("workspace mount")
    for pid in [task.pid(kind) for kind in ("keeper", victims.ROOT, "fork server")]:  # before anybody stands in for another one
        os.kill(pid, signal.SIGKILL)
    task.read()
    task.daemon.start()
    assert task.daemon.wait_pid(f"workspace mount {task.name}", other_than=served)
    task.read()
    assert ends(served, 60)
    replaced_again(task)


def replacements(task: Task) -> list[str]:
    """Why the keeper has replaced who serves the task, as the event log says."""
    events = json.loads(task.daemon.command("events", "--json").stdout)
    served = ("keeper", f"workspace mount {task.name}", "started")
    return [event["cause"] for event in events if (event["supervisor"], event["child"], event["what"]) == served]


def replaced_again(task: Task) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while [served := task.daemon.wait_pid(f"workspace mount {task.name}")] != task.pids("workspace mount"):
        assert time.monotonic() < deadline, "one, and the one that the tree shows, as soon as its supervisor has heard of it"
    os.kill(served, signal.SIGKILL)
    assert task.read() < KEEPER_S + SLOW_S
    task.daemon.wait_pid(f"workspace mount {task.name}", other_than=served)
