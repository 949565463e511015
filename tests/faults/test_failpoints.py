"""A root supervisor that is killed between any two durable operations of a task's life: the task ends as if it had not been.

`failpoints` has the table of these operations, `armed` how they are seen.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import count
from pathlib import Path

import pytest

from actors.gateway.messages import Stop, TaskResult
from tests.actors.image.images import RunningRegistry, member, tar
from tests.faults.failpoints import FAILPOINTS, IN_A_ROW, KEEPER_TOO, WITH_KEEPER_IN_A_ROW, ArmedDaemon, known, operations
from tests.node.test_tasks import stop, wait_for_output

CONTENT = os.urandom(200 << 10)  # too large to be fetched before the mount: the task reads it through LAZY
LINES = 20
BEGIN = "echo begin\n"
PRINT = f"i=0; while [ $i -lt {LINES} ]; do i=$((i+1)); echo out $i; echo err $i >&2; done; exit 7"
READ = f'[ "$(md5sum < big)" = "{hashlib.md5(CONTENT).hexdigest()}  -" ] || echo WRONG\necho x >> ran\n'

Kill = Callable[[str], AbstractContextManager[None]]
numbers = count(1)


# --- scenarios: each is a task's life, or a part of it, in which `kill(task)` says from where on it may strike ---


def workspace(daemon: ArmedDaemon, task: str, kill: Kill) -> None:
    store = make_store(daemon, task)
    with kill(task):
        daemon.submit(BEGIN + READ + PRINT, task=task, workspace=task, timeout_s=60.0)
        result = daemon.result(task)
    check_ended(daemon, result)
    assert result.sync == "synced"
    check_store(daemon, store)


def plain(daemon: ArmedDaemon, task: str, kill: Kill) -> None:
    with kill(task):
        daemon.submit(BEGIN + PRINT, task=task)
        result = daemon.result(task)
    check_ended(daemon, result)
    daemon.quiet()
    lines = (daemon.logs_dir / f"{task}.log").read_text().splitlines()
    assert [line for line in lines if line.startswith("out")] == [f"out {number}" for number in range(1, LINES + 1)]
    assert [line for line in lines if line.startswith("err")] == [f"err {number}" for number in range(1, LINES + 1)]
    assert lines.count("begin") == 1 and len(lines) == 2 * LINES + 1


def time_out(daemon: ArmedDaemon, task: str, kill: Kill) -> None:
    with kill(task):
        daemon.submit("echo begin; sleep 60", task=task, timeout_s=1.0)
        result = daemon.result(task)
    assert (result.state, result.reason) == ("stopped", "timeout") and result.duration_s is not None
    assert 1.0 <= result.duration_s < 20
    assert daemon.logs(task) == (b"begin\n", b"")


def not_found(daemon: ArmedDaemon, task: str, kill: Kill) -> None:
    with kill(task):
        daemon.submit(["/no/such"], task=task)
        result = daemon.result(task)
    assert (result.state, result.reason, result.failure, result.started_at) == ("failed", None, "not_found", None)
    assert "/no/such: not in the image" in str(result.error)


def not_executable(daemon: ArmedDaemon, task: str, kill: Kill) -> None:
    """That this one cannot be executed is found only in the task's place, by execve(2)."""
    image = push(daemon, task, member("broken", b"\x7fELF", mode=0o755))
    with kill(task):
        daemon.submit(["/broken"], task=task, image=image)
        result = daemon.result(task)
    assert (result.state, result.reason, result.failure) == ("failed", None, "not_executable")


def stopped(daemon: ArmedDaemon, task: str, kill: Kill) -> None:
    daemon.submit("trap 'echo bye; exit 9' TERM; echo ready; while :; do sleep 0.05; done", task=task)
    wait_for_output(daemon, task, b"ready\n")
    with kill(task):
        result = stop(daemon, task)
    assert (result.state, result.reason, result.exit_code) == ("stopped", "cancelled", 9)
    assert daemon.logs(task)[0] == b"ready\nbye\n"


def stopped_by_one_who_left(daemon: ArmedDaemon, task: str, kill: Kill) -> None:
    """Nobody asks again: what was asked for is on record."""
    daemon.submit("trap 'echo bye; exit 9' TERM; echo ready; while :; do sleep 0.05; done", task=task)
    wait_for_output(daemon, task, b"ready\n")
    with kill(task):
        daemon.client.send(Stop(daemon.client.number(), task, False))
        daemon.close_client()
    result = daemon.result(task)
    assert (result.state, result.reason, result.exit_code) == ("stopped", "cancelled", 9)


def stopped_before_it_ran(daemon: ArmedDaemon, task: str, kill: Kill) -> None:
    image = push(daemon, task, member("bin/busybox", Path("/bin/busybox").read_bytes(), mode=0o755))
    with kill(task):
        daemon.submit(["/bin/busybox", "echo", "ran"], task=task, image=image)
        daemon.client.send(Stop(daemon.client.number(), task, False))
        daemon.close_client()
    result = daemon.result(task)
    assert (result.state, result.reason, result.started_at) == ("failed", None, None)
    assert not (daemon.state / "tasks" / task / "output" / "journal").exists()


def stopped_by_force(daemon: ArmedDaemon, task: str, kill: Kill) -> None:
    daemon.submit("trap '' TERM; echo ready; while :; do sleep 0.05; done", task=task)
    wait_for_output(daemon, task, b"ready\n")
    with kill(task):
        result = stop(daemon, task, force=True)
    assert (result.state, result.reason, result.signal) == ("stopped", "cancelled", signal.SIGKILL)


def stopped_in_the_queue(daemon: ArmedDaemon, task: str, kill: Kill) -> None:
    first = daemon.submit("trap 'exit 0' TERM; while :; do sleep 0.05; done", task=f"{task}-first")
    daemon.wait_running(first)
    daemon.submit(BEGIN + PRINT, task=task)
    with kill(task):
        result = stop(daemon, task)
    assert (result.state, result.reason, result.started_at) == ("failed", None, None)
    assert stop(daemon, first).reason == "cancelled"
    assert not (daemon.state / "tasks" / task / "output").exists()


def not_synced(daemon: ArmedDaemon, task: str, kill: Kill) -> None:
    """What could not be brought to its store is kept until it can."""
    store = make_store(daemon, task)
    daemon.submit("trap 'echo x >> ran; exit 7' TERM; echo ready; while :; do sleep 0.05; done", task=task, workspace=task)
    wait_for_output(daemon, task, b"ready\n")
    aside = store.rename(store.with_name(f"{task}-aside"))
    store.write_text("in the way")
    with kill(task):
        result = stop(daemon, task)
        assert (result.reason, result.exit_code, result.sync) == ("cancelled", 7, "sync_failed")
        store.unlink()
        aside.rename(store)
        eventually(lambda: not (daemon.state / "tasks" / task / "workspace").exists())
    check_store(daemon, store)


def a_new_image(daemon: ArmedDaemon, task: str, kill: Kill) -> None:
    image = push(
        daemon, task, member("bin/busybox", Path("/bin/busybox").read_bytes(), mode=0o755), member("name", task.encode())
    )
    with kill(task):
        daemon.submit(["/bin/busybox", "cat", "/name"], task=task, image=image)
        result = daemon.result(task)
    assert result.exit_code == 0 and daemon.logs(task)[0] == task.encode()


def image_mount(daemon: ArmedDaemon, task: str, kill: Kill) -> None:
    """A mount is there as long as its lease is, and not longer."""
    with kill(task):
        mounted = daemon.command("image", "mount", "--json", daemon.image)
        listed = json.loads(daemon.command("image", "ls", "--json").stdout)
        leases = [lease for image in listed for lease in image["leases"]]
        assert leases == ([json.loads(mounted.stdout)["lease"]] if mounted.returncode == 0 else leases[:1])
        for lease in leases:
            assert (daemon.run_dir / "images" / lease / "etc/passwd").exists()
            assert daemon.command("image", "unmount", lease).returncode in (0, 4)
    eventually(lambda: not list((daemon.run_dir / "images").glob("mount-*")))


def forgotten(daemon: ArmedDaemon, task: str, kill: Kill) -> None:
    """A task of which no more than RESULTS_MAX later ones are to be kept."""
    daemon.result(daemon.submit(BEGIN + PRINT, task=task))
    with kill(task):
        for number in range(4):
            check_ended(daemon, daemon.result(daemon.submit(BEGIN + PRINT, task=f"{task}-{number}")))
    daemon.result(daemon.submit(BEGIN + PRINT, task=f"{task}-last"))  # when one ends, it is looked what may be forgotten
    eventually(lambda: not (daemon.state / "tasks" / task).exists())
    assert daemon.command("result", task).returncode == 4


SCENARIOS: dict[str, Callable[[ArmedDaemon, str, Kill], None]] = {
    "workspace": workspace,
    "plain": plain,
    "time-out": time_out,
    "not found": not_found,
    "not executable": not_executable,
    "stopped": stopped,
    "stopped by one who left": stopped_by_one_who_left,
    "stopped before it ran": stopped_before_it_ran,
    "stopped by force": stopped_by_force,
    "stopped in the queue": stopped_in_the_queue,
    "not synced": not_synced,
    "a new image": a_new_image,
    "image mount": image_mount,
    "forgotten": forgotten,
}


# --- kills in a row ---


def a_start(daemon: ArmedDaemon, task: str, kill: Kill) -> None:
    daemon.submit("trap 'exit 9' TERM; echo ready; while :; do sleep 0.05; done", task=task)
    wait_for_output(daemon, task, b"ready\n")
    root = daemon.pid_of("root supervisor")
    with kill(task):
        os.kill(root, signal.SIGKILL)
    result = stop(daemon, task)
    assert (result.reason, result.exit_code) == ("cancelled", 9) and daemon.logs(task)[0] == b"ready\n"


IN_A_ROW_SCENARIOS: dict[str, Callable[[ArmedDaemon, str, Kill], None]] = {
    "a start": a_start,
    "a task made anew": workspace,
    "a task released": workspace,
}


# --- what they are made of ---


def make_store(daemon: ArmedDaemon, name: str) -> Path:
    store = daemon.state / "workspaces" / name
    store.mkdir(mode=0o755)
    (store / "big").write_bytes(CONTENT)
    os.chown(store, 1000, 1000)
    return store


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def push(daemon: ArmedDaemon, tag: str, *members: bytes) -> str:
    """A new image → its reference."""
    repository = daemon.registry.repository("other")
    repository.push(tar(*members), tag=tag)
    return repository.reference(tag)


def check_store(daemon: ArmedDaemon, store: Path) -> None:
    """What the task wrote is in the store, once; and the store is removed."""
    daemon.quiet()
    assert {entry.name for entry in store.iterdir()} - {".aerie-sync"} == {"big", "ran"}
    assert (store / "ran").read_text() == "x\n" and (store / "big").read_bytes() == CONTENT
    shutil.rmtree(store)


def check_ended(daemon: ArmedDaemon, result: TaskResult) -> None:
    """It ran once, to its end, and printed each line once."""
    assert (result.state, result.reason, result.exit_code, result.error) == ("stopped", "exited", 7, None)
    assert (result.gaps, result.conflicts) == (0, [])
    assert result.started_at is not None and result.finished_at is not None and result.duration_s is not None
    assert result.created_at <= result.started_at <= result.finished_at
    stdout, stderr = daemon.logs(result.task)
    assert stdout.decode().splitlines() == ["begin", *(f"out {number}" for number in range(1, LINES + 1))]
    assert stderr.decode().splitlines() == [f"err {number}" for number in range(1, LINES + 1)]


class Shared:
    """One daemon for all tests here, and another one after a test that failed."""

    def __init__(self, homes: Iterator[Path], image: str, registry: RunningRegistry) -> None:
        self._homes, self._image, self._registry = homes, image, registry
        self._daemon: ArmedDaemon | None = None
        self.seen: set[str] = set()

    def get(self) -> ArmedDaemon:
        if self._daemon is None:
            self._daemon = ArmedDaemon(next(self._homes), self._image, self._registry)
            self._daemon.start()
        return self._daemon

    def spoil(self) -> None:
        if self._daemon is not None:
            self._daemon.close_client()
            self._daemon.clear_away()
            self._daemon.reap()
            self._daemon = None

    def end(self) -> None:
        if self._daemon is not None:
            assert self._daemon.stop() == 0
            assert self._daemon.leavings_after_stop() == []


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, image: str, registry: RunningRegistry) -> Iterator[Shared]:
    made = Shared((tmp_path_factory.mktemp("armed") for _ in count()), image, registry)
    yield made
    made.end()


def run(shared: Shared, scenario: Callable[[ArmedDaemon, str, Kill], None], *points: str, keeper: bool = False) -> None:
    daemon, task = shared.get(), f"task-{next(numbers)}"
    try:
        scenario(daemon, task, lambda about: daemon.killed_at(about, *points, keeper=keeper))
        daemon.quiet()
        shared.seen.update(name for name in daemon.reached(task) if "task-" not in name)
    except BaseException:
        shared.spoil()
        raise


def pairs(table: dict[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    return [(scenario, point) for scenario, points in table.items() for point in points]


@pytest.mark.parametrize(("scenario", "point"), pairs(FAILPOINTS))
def test_killed_at(shared: Shared, scenario: str, point: str) -> None:
    run(shared, SCENARIOS[scenario], point)


@pytest.mark.parametrize(("scenario", "point"), pairs(KEEPER_TOO))
def test_killed_with_its_keeper_at(shared: Shared, scenario: str, point: str) -> None:
    run(shared, SCENARIOS[scenario], point, keeper=True)


@pytest.mark.parametrize("scenario", IN_A_ROW_SCENARIOS)
def test_killed_again_while_it_recovers(shared: Shared, scenario: str) -> None:
    run(shared, IN_A_ROW_SCENARIOS[scenario], *IN_A_ROW[scenario])


def test_killed_again_with_its_keeper_while_it_recovers(shared: Shared) -> None:
    [(scenario, points)] = WITH_KEEPER_IN_A_ROW.items()
    run(shared, IN_A_ROW_SCENARIOS[scenario], *points, keeper=True)


def test_killed_again_and_again_at_its_first_start_and_in_its_drain(
    tmp_path: Path, image: str, registry: RunningRegistry, shared: Shared
) -> None:
    daemon = ArmedDaemon(tmp_path, image, registry)
    try:
        with daemon.killed_at("task-one", *IN_A_ROW["the first start"]):
            daemon.start()
            check_ended(daemon, daemon.result(daemon.submit(BEGIN + PRINT, task="task-one")))
        daemon.submit("trap 'exit 9' TERM; echo ready; while :; do sleep 0.05; done", task="task-two")
        wait_for_output(daemon, "task-two", b"ready\n")
        with daemon.killed_at("task-two", *IN_A_ROW["a drain"]):
            assert daemon.stop() == 0
        assert daemon.leavings_after_stop() == []
        names = {*daemon.reached("task-one"), *daemon.reached("task-two")}
        shared.seen.update(name for name in names if "task-" not in name)
    finally:
        daemon.close_client()
        daemon.clear_away()
        daemon.reap()


def test_every_durable_operation_is_in_the_table(shared: Shared) -> None:
    """The last one here: what was seen in all the others."""
    missing = operations(shared.seen) - known()
    assert not missing, f"give each of these a place in the table of failpoints: {sorted(missing)}"
