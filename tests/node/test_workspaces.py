"""Workspaces through the whole daemon: synced while their task runs, read from a store that changes, too large, and in conflict."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from actors.gateway.messages import Stop, TaskResult
from tests.node.daemon import PATIENCE_S, Daemon, running

READY = "echo >> /dev/stderr; until [ -e go ]; do sleep 0.02; done; rm go; "
"""What a task does to wait for the test's word, `go`."""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, image: str) -> Iterator[Daemon]:
    """Its tasks are synced five times a second."""
    with running(tmp_path_factory.mktemp("node"), image, AERIE_MOUNT_SYNC_INTERVAL="200ms") as started:
        yield started


def make_store(daemon: Daemon, name: str, files: dict[str, bytes] | None = None) -> Path:
    """A store with files, as its owner would have left it."""
    store = daemon.state / "workspaces" / name
    store.mkdir(parents=True)
    for path, content in (files or {}).items():
        (store / path).parent.mkdir(parents=True, exist_ok=True)
        (store / path).write_bytes(content)
    for path in (store, *store.rglob("*")):
        os.chown(path, 1000, 1000)
    return store


def eventually(holds: Callable[[], bool], what: str) -> None:
    # A sync of a running task that took three seconds, on a slow disk, is followed by the next one after a minute.
    deadline = time.monotonic() + 5 * PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def begun(daemon: Daemon, script: str, workspace: str, **changes: Any) -> str:
    """Submit a task, and wait until it runs."""
    task = daemon.submit(script, workspace=workspace, **changes)
    mount = daemon.run_dir / "tasks" / task / "workspace"
    eventually(
        lambda: b'"running"' in daemon.command("result", "--json", task).stdout and os.path.ismount(mount), f"{task} runs"
    )
    return task


def go(daemon: Daemon, task: str) -> None:
    (daemon.run_dir / "tasks" / task / "workspace" / "go").touch()


def stopped(daemon: Daemon, task: str) -> TaskResult:
    daemon.client.ask(Stop(daemon.client.number(), task, force=True), timeout_s=PATIENCE_S)
    return daemon.result(task)


def read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


# --- synced while the task runs ---


def test_what_a_task_writes_comes_to_its_store_while_it_runs(daemon: Daemon) -> None:
    store = make_store(daemon, "live", {"old": b"old", "removed": b"x"})
    script = (
        READY
        + "echo 1 > old; mkdir d; echo deep > d/new; rm removed; until [ -e go ]; do sleep 0.02; done; echo 2 > old; sleep 100"
    )
    task = begun(daemon, script, "live")
    go(daemon, task)
    eventually(lambda: read(store / "old") == b"1\n" and read(store / "d/new") == b"deep\n", "the first version is there")
    assert (store / "removed").exists(), "what is gone for the task goes when it has ended"
    go(daemon, task)
    eventually(lambda: read(store / "old") == b"2\n", "the second version is there")
    result = stopped(daemon, task)
    assert (result.reason, result.sync, result.conflicts) == ("cancelled", "synced", [])
    assert {path.name for path in store.rglob("*")} == {"old", "d", "new", "go"}


def test_without_an_interval_nothing_comes_before_the_end(tmp_path: Path, image: str) -> None:
    with running(tmp_path, image, AERIE_MOUNT_SYNC_INTERVAL="0") as daemon:
        task = begun(daemon, "echo x > file; " + READY, "late")
        eventually((daemon.run_dir / "tasks" / task / "workspace/file").exists, "it is written")
        time.sleep(0.5)
        assert not (daemon.state / "workspaces/late/file").exists()
        go(daemon, task)
        assert daemon.result(task).sync == "synced"
        assert read(daemon.state / "workspaces/late/file") == b"x\n"


def test_a_conflict_found_while_the_task_runs(daemon: Daemon) -> None:
    """The task's version goes beside the other at once, and is kept up to date there."""
    store = make_store(daemon, "contested", {"file": b"old"})
    task = begun(
        daemon, READY + "echo 1 > file; until [ -e go ]; do sleep 0.02; done; rm go; echo 2 > file; exit 3", "contested"
    )
    (store / "file").write_bytes(b"theirs")
    go(daemon, task)
    beside = store / f"file.aerie-conflict-{task}"
    eventually(lambda: read(beside) == b"1\n", "the task's first version lies beside")
    assert (store / "file").read_bytes() == b"theirs"
    go(daemon, task)
    result = daemon.result(task)
    assert (result.exit_code, result.sync) == (3, "conflict")
    assert result.conflicts == [f"file (now file.aerie-conflict-{task}): changed by the task and in the store"]
    assert (beside.read_bytes(), (store / "file").read_bytes()) == (b"2\n", b"theirs")


def test_a_busy_writer_and_its_syncer_and_supervisor_killed(daemon: Daemon) -> None:
    """Each version in the store is one that the task had; in the end it is the last, and a sync's own work is no conflict."""
    store = make_store(daemon, "busy", {"log": b""})
    script = (
        "i=0; while [ ! -e go ]; do i=$((i+1)); echo line $i >> log; echo $i > new; mv new last; mkdir -p d/$((i % 7)); "
        "echo $i > d/$((i % 7))/f; sleep 0.02; done; rm go; echo $i > last"  # at times it holds still for long enough to be copied
    )
    task = begun(daemon, script, "busy")
    kills = 0
    for number in range(12):
        eventually(lambda: (store / "log").stat().st_size > 0, "a sync has come through")
        content = (store / "log").read_bytes()
        assert content == b"".join(b"line %d\n" % line for line in range(1, content.count(b"\n") + 1)), "no hole, no torn line"
        victim = "root supervisor" if number % 4 == 3 else "syncer"
        pid = daemon.wait_pid(victim)
        time.sleep(0.05 * (number % 5))
        with suppress(ProcessLookupError):  # it was replaced meanwhile
            os.kill(pid, signal.SIGKILL)
        daemon.wait_pid(victim, other_than=pid)
        kills += 1
    go(daemon, task)
    result = daemon.result(task)
    assert (result.exit_code, result.sync, result.conflicts, result.error) == (0, "synced", [], None)
    lines = (store / "log").read_bytes().splitlines()
    assert lines == [b"line %d" % line for line in range(1, len(lines) + 1)]
    assert (store / "last").read_bytes() == b"%d\n" % len(lines)
    assert {path.name for path in store.iterdir()} == {"log", "last", "d"}
    assert kills == 12


def test_a_file_that_is_open_since_before_it_was_synced_is_read_as_it_was(daemon: Daemon) -> None:
    """The sync puts the task's new version in the place of the one that it still has open, and its server is killed besides."""
    old = b"".join(b"%15d\n" % number for number in range(1 << 19))
    store = make_store(daemon, "open", {"file": old})
    script = (
        "exec 3< file; head -c 16 <&3 > /dev/null; " + "echo new > other; mv other file; until [ -e go ]; do sleep 0.02; done; "
    )
    task = begun(daemon, script + "rm go; tail -c 4194304 <&3", "open")
    eventually(lambda: read(store / "file") == b"new\n", "the new version is in the store")
    with suppress(ProcessLookupError):  # it was replaced meanwhile
        os.kill(daemon.wait_pid(f"workspace mount {task}"), signal.SIGKILL)
    go(daemon, task)
    result = daemon.result(task)
    assert (result.exit_code, result.error, result.sync) == (0, None, "synced")
    assert daemon.logs(task)[0] == old[-4194304:]
    assert [path.name for path in store.iterdir()] == ["file"], "what was put aside is gone"


# --- the store changes under the task ---


def rewrite(file: Path) -> None:
    file.write_bytes(b"b" * file.stat().st_size)


def replace_alike(file: Path) -> None:
    """With the same size and time: another inode."""
    status = file.stat()
    other = file.with_name("other")
    other.write_bytes(b"b" * status.st_size)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.rename(other, file)


def put_a_link_there(file: Path) -> None:
    os.rename(file, file.with_name("real"))
    os.symlink("real", file)


def cut_short(file: Path) -> None:
    os.truncate(file, 5)


@pytest.mark.parametrize("change", [rewrite, cut_short, replace_alike, os.unlink, put_a_link_there])
@pytest.mark.parametrize("read_before", [0, 1 << 20])
def test_a_version_that_is_gone_is_an_error_in_the_task_with_the_reason(
    daemon: Daemon, change: Callable[[Path], None], read_before: int
) -> None:
    """Never bytes of another version; what is small and was copied at the start is still read.

    When nothing of it was read before, the server is killed, for the mount itself may have been what opened it.
    """
    name = f"changed-{time.monotonic_ns()}"
    store = make_store(daemon, name, {"file": b"a" * (8 << 20), "small": b"a" * 1000})
    script = f"head -c {read_before} file | wc -c; " + READY + "cat small; cat file; echo $? >&2; exit 5"
    task = begun(daemon, script, name)
    eventually(lambda: b"%d\n" % read_before in daemon.command("logs", task).stdout, "it has read what it wanted before")
    pid = daemon.wait_pid(f"workspace mount {task}")
    if not read_before:
        with suppress(ProcessLookupError):  # it was replaced meanwhile
            os.kill(pid, signal.SIGKILL)
        daemon.wait_pid(f"workspace mount {task}", other_than=pid)
    change(store / "file")
    (store / "small").write_bytes(b"b" * 1000)
    go(daemon, task)
    result = daemon.result(task)
    stdout, stderr = daemon.logs(task)
    content = stdout.split(b"\n", 1)[1]
    assert (set(content), result.exit_code, result.sync) == ({ord("a")}, 5, "synced")
    told = json.loads(daemon.command("result", "--json", task).stdout)
    replaced = f"workspace mount {task} (pid {pid}) has ended" in daemon.log.read_text()  # it did not run for long enough
    if read_before and change not in (rewrite, cut_short) and not replaced:
        # It only lost its name, and the server has it open: this is the version that was listed.
        assert (len(content), told["error"]) == (1000 + (8 << 20), None)
    else:
        assert 1000 <= len(content) < 8 << 20
        assert stderr.endswith(b"Input/output error\n1\n")
        assert told["error"] == "a read failed: file: changed in the store since the task began"


def test_one_mib_of_ten_gb_costs_about_that(daemon: Daemon) -> None:
    """Wherever in the file it is: no copy of the whole, neither at the mount nor at the read, in OBJECTS nor in staging."""
    store = make_store(daemon, "huge")
    size, place = 10 * 10**9, 7 << 30
    wanted = os.urandom(1 << 20)
    with open(store / "file", "wb") as file:
        file.truncate(size)
        file.seek(place)
        file.write(wanted)
    used_before = used_bytes(daemon)
    script = f"dd if=file bs=1M skip={place >> 20} count=1 2>/dev/null; stat -c %s file >&2; " + READY
    task = begun(daemon, script, "huge")
    eventually(lambda: len(daemon.command("logs", task).stdout) == 1 << 20, "it has read its part")
    read_bytes = io_of(daemon.wait_pid(f"workspace mount {task}"))["rchar"]
    go(daemon, task)
    assert daemon.result(task).exit_code == 0
    assert daemon.logs(task)[0] == wanted
    assert daemon.logs(task)[1].startswith(b"%d\n" % size)
    assert 1 << 20 <= read_bytes < 6 << 20, f"{read_bytes} bytes were read"
    assert used_bytes(daemon) - used_before < 16 << 20


def io_of(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def used_bytes(daemon: Daemon) -> int:
    """On disk, in the daemon's own directories and on their file system; other tests write to the same disk.

    Not by du(1), which fails when what it walks through vanishes: the daemon lives meanwhile.
    """
    device = daemon.state.stat().st_dev
    found: dict[int, int] = {}  # by inode, of which one may have several names
    todo = [daemon.state]
    while todo:
        place = todo.pop()
        try:
            status = place.lstat()
            if status.st_dev != device:
                continue
            found[status.st_ino] = status.st_blocks * 512
            if stat.S_ISDIR(status.st_mode):
                todo += place.iterdir()
        except FileNotFoundError:  # it has gone
            pass
    return sum(found.values())


# --- what the result says ---


def test_what_never_comes_back_is_said(daemon: Daemon) -> None:
    result = daemon.run("mknod pipe p; echo x > tool; chmod 4755 tool", workspace="special")
    store = daemon.state / "workspaces" / "special"
    assert (result.sync, result.skipped) == ("synced", ["pipe: not a file, directory or symbolic link"])
    assert (store / "tool").stat().st_mode & 0o7777 == 0o755
    told = json.loads(daemon.command("result", "--json", result.task).stdout)
    assert told["skipped"] == result.skipped


def test_forged_and_odd_names(daemon: Daemon) -> None:
    """Names of ours in the task's hands, and names that are no text: each comes back as what it is, and the result can be read."""
    store = make_store(daemon, "forged", {"file": b"old"})
    script = (
        "echo forged > file.aerie-conflict-odd; mkdir .aerie-sync; echo x > .aerie-sync/put-1; mkdir d; echo mine > d/.aerie-sync; "
        'name="$(printf "a\\nb\\377")"; echo odd > "$name"; echo ours > file; ' + READY
    )
    task = begun(daemon, script, "forged", task="odd")
    odd = store / os.fsdecode(b"a\nb\xff")
    mount = daemon.run_dir / "tasks" / task / "workspace"
    eventually(lambda: read(mount / "file") == b"ours\n", "the task has written")
    go(daemon, task)
    result = daemon.result(task)
    assert result.sync == "synced"
    assert result.skipped == [".aerie-sync: the name is reserved"]
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == {
        odd: b"odd\n",
        store / "file": b"ours\n",
        store / "file.aerie-conflict-odd": b"forged\n",
        store / "d/.aerie-sync": b"mine\n",
    }
    task = begun(daemon, READY + "echo ours > file; rm a*", "forged", task="odd.2")
    for path in (odd, store / "file"):
        path.write_bytes(b"theirs")
    go(daemon, task)
    told = json.loads(daemon.command("result", "--json", "--wait", "60s", task).stdout)
    assert sorted(told["conflicts"]) == [
        "a\nb\\xff: removed by the task, changed in the store",
        "file (now file.aerie-conflict-odd.2): changed by the task and in the store",
    ]


def test_a_sync_that_failed_keeps_everything_and_is_done_later(daemon: Daemon) -> None:
    store = make_store(daemon, "full")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,uid=1000,gid=1000,mode=755", "none", store], check=True)
    try:
        result = daemon.run("dd if=/dev/zero of=large bs=1M count=3 2>/dev/null; echo small > small", workspace="full")
        assert (result.exit_code, result.sync) == (0, "sync_failed")
        assert "No space left" in (result.error or "")
        home = daemon.state / "tasks" / result.task / "workspace"
        assert (home / "upper/large").stat().st_size == 3 << 20
        subprocess.run(["mount", "-o", "remount,size=10m", store], check=True)
        pid = daemon.pid_of("root supervisor")  # the next one tries again at once
        os.kill(pid, signal.SIGKILL)
        daemon.wait_pid("root supervisor", other_than=pid)
        eventually(lambda: not home.exists(), "what was kept is in the store, and gone from the task's directory")
        assert (read(store / "small"), (store / "large").stat().st_size) == (b"small\n", 3 << 20)
        assert {path.name for path in store.iterdir()} == {"small", "large"}
    finally:
        subprocess.run(["umount", "-l", store], check=True)
    shutil.rmtree(store)


def test_a_workspace_over_a_bound_is_refused_with_the_bound(tmp_path: Path, image: str) -> None:
    settings = {"AERIE_MOUNT_ENTRIES_MAX": "10", "AERIE_MOUNT_DEPTH_MAX": "3", "AERIE_MOUNT_STAGED_MAX": "1Mi"}
    with running(tmp_path, image, **settings) as daemon:
        make_store(daemon, "many", {f"f{number}": b"x" for number in range(11)})
        result = daemon.run("true", workspace="many")
        assert (result.state, result.error) == ("failed", "the store has more than 10 entries")
        make_store(daemon, "deep", {"a/b/c/d": b"x"})
        assert "deeper than 3 directories" in (daemon.run("true", workspace="deep").error or "")
        result = daemon.run("dd if=/dev/zero of=f bs=1M count=2 2>/dev/null", workspace="large")
        assert (result.sync, result.error) == ("sync_failed", "more than 1048576 bytes are staged")
        # Not under the kernel's hands, nor under the daemon's.
        eventually(lambda: not list((daemon.run_dir / "tasks").iterdir()), "it is unmounted")
        shutil.rmtree(daemon.state / "tasks" / result.task / "workspace")
