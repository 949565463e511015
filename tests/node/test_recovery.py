"""A daemon that starts: adopts what is alive, finishes what was pending, removes what is nobody's, and says so."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from actors.lazytree import mounts
from supervisor.keeper import EXIT_FAILED
from tests.node.daemon import PATIENCE_S, PROGRAM, Daemon, in_place_of, name_of, running
from tests.node.test_tasks import stop, wait_for_output

WAIT = "trap 'exit 9' TERM; echo ready; while :; do sleep 0.05; done"
GHOST = "ghost"


@pytest.fixture
def own(tmp_path: Path, image: str) -> Iterator[Daemon]:
    """A daemon of the test's own."""
    with running(tmp_path, image) as started:
        yield started


def account(daemon: Daemon) -> str:
    """What the root supervisor that runs now says it found and did."""
    accounts: list[str] = re.findall(r"recovered in [\d.]+ s: (.*)", daemon.log.read_text())
    return accounts[-1]


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start_again(daemon: Daemon, meanwhile: Callable[[], object] = lambda: None) -> str:
    """Kill keeper and root supervisor, do something, start the daemon again → its account."""
    daemon.kill_supervisors()
    eventually(daemon.root_is_gone)
    meanwhile()
    accounts = daemon.log.read_text().count("recovered in")
    daemon.start()
    eventually(lambda: daemon.log.read_text().count("recovered in") > accounts)
    return account(daemon)


def in_the_store(daemon: Daemon, sql: str, *values: object) -> None:
    with closing(
        sqlite3.connect(daemon.state / "aerie.db", timeout=PATIENCE_S)
    ) as database:  # the daemon may be at a slow write
        database.execute(sql, values)
        database.commit()


def ready(daemon: Daemon, **changes: object) -> str:
    """A task that runs until it is stopped, and then exits with 9."""
    task = daemon.submit(WAIT, **changes)
    wait_for_output(daemon, task, b"ready\n")
    return task


def test_the_first_start_finds_nothing(own: Daemon) -> None:
    eventually(lambda: "recovered in" in own.log.read_text())  # tasks are taken before that is said
    assert account(own) == "tasks: 0 adopted, 0 finished, 0 begun anew, 0 lost, 0 queued; cleaned away: nothing"


def test_each_task_is_dealt_with_as_it_stands(tmp_path: Path, image: str) -> None:
    with running(tmp_path, image, AERIE_GATEWAY_PARALLEL="3") as daemon:
        alive, ending = ready(daemon), daemon.submit("trap 'echo bye; exit 8' TERM; echo ready; while :; do sleep 0.05; done")
        wait_for_output(daemon, ending, b"ready\n")
        lost = ready(daemon)
        queued = daemon.submit("exit 7")

        def meanwhile() -> None:
            # One ends while nobody looks; of one all who could know of it are gone.
            for number, pids in (
                (signal.SIGTERM, container_processes(daemon, ending)),
                (signal.SIGKILL, [*conmons(daemon, lost), *container_processes(daemon, lost)]),
            ):
                for pid in pids:
                    with suppress(ProcessLookupError):
                        os.kill(pid, number)
            eventually(lambda: not conmons(daemon, ending) and not conmons(daemon, lost))

        assert start_again(daemon, meanwhile) == (
            "tasks: 1 adopted, 1 finished, 0 begun anew, 1 lost, 1 queued; cleaned away: nothing"
        )
        ended = daemon.result(ending)
        assert (ended.reason, ended.exit_code, daemon.logs(ending)[0]) == ("exited", 8, b"ready\nbye\n")
        assert (daemon.result(lost).state, daemon.result(lost).reason) == ("failed", "lost")
        assert daemon.result(queued).exit_code == 7
        assert stop(daemon, alive).exit_code == 9
        daemon.wait_released()


def test_a_task_that_was_let_go_before_that_was_on_record_does_not_run_twice(own: Daemon) -> None:
    """Daemon, conmon and task killed between the opening of the gate and the durable mark of the start."""
    task = own.submit(f"echo once >> ran; {WAIT}", workspace="work")
    wait_for_output(own, task, b"ready\n")

    def meanwhile() -> None:
        in_the_store(own, "UPDATE tasks SET started_at = NULL, started_boot_s = NULL WHERE task = ?", task)
        for pid in [*conmons(own, task), *container_processes(own, task)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        eventually(lambda: not conmons(own, task))

    start_again(own, meanwhile)
    result = own.result(task)
    assert (result.state, result.reason, result.sync) == ("failed", "lost", "synced")
    assert (own.state / "workspaces/work/ran").read_text() == "once\n"


def test_a_task_whose_record_is_gone_is_ended_and_all_of_it_removed(own: Daemon) -> None:
    """conmon, container, control group, FUSE server, every mount, directories, held descriptors: one of each, and each for real."""
    for name in (GHOST, "kept"):
        store = own.state / "workspaces" / name
        store.mkdir(mode=0o755)
        (store / "big").write_bytes(os.urandom(200 << 10))
        os.chown(store, 1000, 1000)
    ghost, kept = ready(own, task=GHOST, workspace=GHOST), ready(own, task="kept", workspace="kept")
    assert {Path(mount.target).name for mount in mounts.mounts_below(str(own.run_dir / "tasks" / ghost))} == {
        "root",
        "workspace",
        "meta",
        "lazy",
    }
    monitors, server = conmons(own, ghost), own.wait_pid(f"workspace mount {ghost}")
    said = start_again(own, lambda: in_the_store(own, "DELETE FROM tasks WHERE task = ?", ghost))
    assert re.fullmatch(
        r"tasks: 1 adopted, 0 finished, 0 begun anew, 0 lost, 0 queued; cleaned away: 1 container, 1 control group, "
        r"2 directories, [34] mounts, [23] processes",
        said,
    ), said
    eventually(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in [server, *monitors]))
    assert {group.name for group in own.groups()} == {f"{kept}.1"}
    assert not mounts.mounts_below(str(own.run_dir / "tasks" / ghost))
    assert not list(own.state.glob(f"tasks/{ghost}")) and not list(own.run_dir.glob(f"tasks/{ghost}"))
    assert [entry.name for entry in (own.run_dir / "runtimes" / "crun").iterdir()] == [f"{kept}.1"]
    assert (own.state / "workspaces" / ghost / "big").stat().st_size == 200 << 10  # what is in its store is its user's
    result = stop(own, kept)
    assert (result.exit_code, result.sync) == (9, "synced")
    own.wait_released()


def test_a_control_group_that_was_left_is_emptied_and_removed(own: Daemon) -> None:
    own.run("true")
    own.wait_released()
    parents = own.group_parents()
    assert parents
    sleeper = subprocess.Popen(["sleep", "300"])
    try:
        for parent in parents:
            (parent / "ghost.1").mkdir()
            with suppress(OSError):  # a cpuset takes nobody as long as it has no processor
                (parent / "ghost.1" / "cgroup.procs").write_text(str(sleeper.pid))
        assert start_again(own).endswith("cleaned away: 1 control group, 1 process")
        assert sleeper.wait(60) == -signal.SIGKILL
        assert own.groups() == []
    finally:
        sleeper.kill()
        sleeper.wait()


def test_a_call_of_a_runtime_whose_caller_is_dead_is_ended(tmp_path: Path, image: str) -> None:
    """It hangs, and nobody would ever wait for it again."""
    called = tmp_path / "called"
    act = f"[ -e {called} ] || {{ echo $$ > {called}; kill -STOP $$; }}"
    path = in_place_of("runc", tmp_path, f'case " $* " in *" delete "*) {act};; esac\nexec $program "$@"')
    (tmp_path / "node").mkdir()
    with running(tmp_path / "node", image, PATH=path) as daemon:
        assert daemon.run("exit 7", runtime="runc").exit_code == 7
        eventually(called.exists)
        assert "1 process" in start_again(daemon)
        eventually(lambda: not Path(f"/proc/{called.read_text().strip()}").exists())
        daemon.wait_nothing_left()


def test_directories_and_an_image_mount_of_nobody_are_removed(own: Daemon) -> None:
    own.run("true")
    own.wait_released()
    for place in (own.state / "tasks" / GHOST / "output", own.run_dir / "tasks" / GHOST / "bundle"):
        place.mkdir(parents=True)
    (own.state / "tasks" / GHOST / "output" / "journal").write_text("x")
    stale = own.run_dir / "images" / "mount-of-nobody"
    stale.mkdir()
    mounts.bind(str(own.state / "workspaces"), str(stale))
    assert start_again(own).endswith("cleaned away: 2 directories, 1 mount")
    assert not stale.exists() and not (own.state / "tasks" / GHOST).exists() and not (own.run_dir / "tasks" / GHOST).exists()


def test_a_creation_that_goes_on_behind_a_dead_daemons_back_leaves_nothing(tmp_path: Path, image: str) -> None:
    """The runtime takes longer than the root supervisor needs to be there again: the task runs once, as a second attempt."""
    path = in_place_of("crun", tmp_path, 'case "$*" in *create*) sleep 2;; esac\nexec $program "$@"')
    with running(tmp_path, image, PATH=path) as daemon:
        task = daemon.submit("echo ran; exit 7", task="slow")
        eventually(lambda: bool(conmons(daemon, task)))
        first = conmons(daemon, task)
        os.kill(daemon.pid_of("root supervisor"), signal.SIGKILL)
        assert daemon.result(task).exit_code == 7 and daemon.logs(task)[0] == b"ran\n"
        daemon.wait_nothing_left()
        assert not set(first) & set(conmons(daemon, task))
        eventually(lambda: "1 begun anew" in account(daemon))


def conmons(daemon: Daemon, task: str) -> list[int]:
    """The pids of a task's conmon."""
    found = []
    for pid in daemon.processes():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            if name_of(pid) == "conmon" and f"{task}.1".encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                found.append(pid)
    return found


def container_processes(daemon: Daemon, task: str) -> set[int]:
    return {
        int(pid)
        for group in daemon.groups()
        if group.name == f"{task}.1"
        for pid in (group / "cgroup.procs").read_text().split()
    }


def test_a_stop_in_the_queue_that_cannot_be_recorded_is_recorded_when_it_can(tmp_path: Path, image: str) -> None:
    with running(tmp_path, image, AERIE_GATEWAY_PARALLEL="1") as daemon:
        first, queued = ready(daemon), daemon.submit("exit 7")
        refuse = "CREATE TRIGGER refuse BEFORE UPDATE OF result ON tasks BEGIN SELECT RAISE(ABORT, 'not now'); END"
        in_the_store(daemon, refuse)
        asked = subprocess.Popen(
            [sys.executable, PROGRAM, "stop", "--json", queued], env=daemon.environment, stdout=subprocess.PIPE
        )
        eventually(lambda: "trying again: not now" in daemon.log.read_text())
        in_the_store(daemon, "DROP TRIGGER refuse")
        stdout, _ = asked.communicate(timeout=60)
        assert json.loads(stdout)["error"] == "stopped before it was started" and asked.returncode == 0
        assert stop(daemon, first).exit_code == 9
        daemon.wait_released()


@pytest.mark.parametrize("something_is_mounted", [False, True])
@pytest.mark.parametrize("root_supervisor_is_killed", [False, True])
def test_a_daemon_whose_run_directory_somebody_has_deleted_ends_when_it_is_told_to(
    tmp_path: Path, image: str, root_supervisor_is_killed: bool, something_is_mounted: bool
) -> None:
    daemon = Daemon(tmp_path, image)
    daemon.start()
    if something_is_mounted:  # an image, and so the directory cannot be deleted
        daemon.run("true")
        daemon.wait_released()
    root = daemon.pid_of("root supervisor")
    daemon.close_client()
    shutil.rmtree(daemon.run_dir, ignore_errors=True)
    if root_supervisor_is_killed:  # nobody can be started in its place
        os.kill(root, signal.SIGKILL)
    assert daemon.stop() == (EXIT_FAILED if root_supervisor_is_killed else 0), daemon.log.read_text()
    eventually(lambda: not daemon.processes())
    if something_is_mounted and root_supervisor_is_killed:
        daemon.start()  # the next one gives it back
        assert daemon.stop() == 0
    assert not mounts.mounts_below(str(tmp_path))
