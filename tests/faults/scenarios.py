"""Scenarios: each is a task's life, or a part of it, in which `kill(task)` says from where on it may strike.

Whoever was killed, and wherever: the task ends as if nobody had been.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from actors.gateway.messages import Stop, TaskResult
from tests.actors.image.images import member, tar
from tests.faults.armed_daemon import ArmedDaemon
from tests.node.test_tasks import stop, wait_for_output

AT_FDCWD, RENAME_EXCHANGE = -100, 2
CONTENT = os.urandom(200 << 10)  # too large to be fetched before the mount: the task reads it through LAZY
LINES = 20
BEGIN = "echo begin\n"
PRINT = f"i=0; while [ $i -lt {LINES} ]; do i=$((i+1)); echo out $i; echo err $i >&2; done; exit 7"
READY = "echo ready; while :; do sleep 0.05; done"
READ = f'[ "$(md5sum < big)" = "{hashlib.md5(CONTENT).hexdigest()}  -" ] || echo WRONG\necho x >> ran\n'

Kill = Callable[[str], AbstractContextManager[None]]


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
        daemon.submit("echo begin; sleep 60", task=task, timeout_s=0.3)
        result = daemon.result(task)
    assert (result.state, result.reason) == ("stopped", "timeout") and result.duration_s is not None
    assert 0.3 <= result.duration_s < 60
    assert daemon.logs(task) in ((b"begin\n", b""), (b"", b""))  # it may have had no processor in that time


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
    daemon.submit(f"trap 'echo bye; exit 9' TERM; {READY}", task=task)
    wait_for_output(daemon, task, b"ready\n")
    with kill(task):
        result = stop(daemon, task)
    assert (result.state, result.reason, result.exit_code) == ("stopped", "cancelled", 9)
    assert daemon.logs(task)[0] == b"ready\nbye\n"


def stopped_by_one_who_left(daemon: ArmedDaemon, task: str, kill: Kill) -> None:
    """Nobody asks again: what was asked for is on record."""
    daemon.submit(f"trap 'echo bye; exit 9' TERM; {READY}", task=task)
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
    daemon.submit(f"trap '' TERM; {READY}", task=task)
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
    daemon.submit(f"trap 'echo x >> ran; exit 7' TERM; {READY}", task=task, workspace=task)
    wait_for_output(daemon, task, b"ready\n")
    aside = store.with_name(f"{task}-aside")
    aside.write_text("in the way")
    exchange(store, aside)  # in one step: a sync that found neither would make another one
    with kill(task):
        result = stop(daemon, task)
        assert (result.reason, result.exit_code, result.sync) == ("cancelled", 7, "sync_failed")
        exchange(aside, store)
        aside.unlink()
        eventually(lambda: not (daemon.state / "tasks" / task / "workspace").exists())
    check_store(daemon, store)


def a_new_image(daemon: ArmedDaemon, task: str, kill: Kill) -> None:
    image = push(
        daemon, task, member("bin/busybox", Path("/bin/busybox").read_bytes(), mode=0o755), member("name", task.encode())
    )
    with kill(task):
        daemon.submit(["/bin/busybox", "cat", "/name"], task=task, image=image)
        result = daemon.result(task)
    assert (result.exit_code, result.error) == (0, None), (result, daemon.log.read_text()[-3000:])
    assert daemon.logs(task) == (task.encode(), b"")


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


# What a task can do to its workspace, in which `make_rich_store` is.
EVERYTHING = """
echo x >> ran; mkdir made; echo in > made/file; ln made/file made/second; ln -s big symbolic
rm gone; rm -r emptied; mv old new; mv directory renamed; chmod 600 changed one; echo mine > contested
"""


def everything(daemon: ArmedDaemon, task: str, kill: Kill) -> None:
    """All that a task can do to its workspace, beside what somebody else does to the store."""
    store = make_rich_store(daemon, task)
    daemon.submit(f"trap '{EVERYTHING} exit 7' TERM; {READY}", task=task, workspace=task)
    wait_for_output(daemon, task, b"ready\n")
    (store / "contested").write_text("theirs")
    with kill(task):
        result = stop(daemon, task)
    assert (result.reason, result.exit_code, result.sync, result.error) == ("cancelled", 7, "conflict", None)
    assert [conflict.partition(" ")[0] for conflict in result.conflicts] == ["contested"]
    daemon.quiet()
    check_rich_store(store, task)


def a_new_store(daemon: ArmedDaemon, task: str, kill: Kill) -> None:
    """The task is the first with a workspace of this name."""
    store = daemon.state / "workspaces" / task
    with kill(task):
        daemon.submit(f"{BEGIN}echo x >> ran; {PRINT}", task=task, workspace=task)
        result = daemon.result(task)
    check_ended(daemon, result)
    daemon.quiet()
    status = store.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (1000, 1000, 0o755)
    assert (store / "ran").read_text() == "x\n"
    shutil.rmtree(store)


def small_files(daemon: ArmedDaemon, task: str, kill: Kill) -> None:
    """They are copied to OBJECTS when the store is indexed, and read from there."""
    store = make_rich_store(daemon, task)
    with kill(task):
        daemon.submit(
            BEGIN + READ + f'[ "$(cat gone one directory/inner)" = goneonedirectory/inner ] || echo WRONG\n{PRINT}',
            task=task,
            workspace=task,
        )
        result = daemon.result(task)
    check_ended(daemon, result)
    daemon.quiet()
    assert (store / "ran").read_text() == "x\n" and (store / "gone").read_text() == "gone"
    shutil.rmtree(store)


def while_it_runs(daemon: ArmedDaemon, task: str, kill: Kill) -> None:
    """What a task writes comes to the store before it ends; what it replaced there, it can still read."""
    store = make_store(daemon, task)
    (store / "changed").write_bytes(CONTENT)
    script = f"exec 3< changed; echo x >> ran; echo new > changed.new; mv changed.new changed; trap 'md5sum <&3; exit 7' TERM; {READY}"
    with kill(task):
        daemon.submit(script, task=task, workspace=task)
        eventually(lambda: (store / "changed").read_bytes() == b"new\n")
        wait_for_output(daemon, task, b"ready\n")
        result = stop(daemon, task)
    assert (result.reason, result.exit_code, result.sync, result.error) == ("cancelled", 7, "synced", None)
    assert daemon.logs(task)[0].decode() == f"ready\n{hashlib.md5(CONTENT).hexdigest()}  -\n"
    (store / "changed").unlink()
    check_store(daemon, store)


def pumped(daemon: ArmedDaemon, task: str, kill: Kill) -> None:
    """Its conmon is killed: what the task prints from then on is pumped by the output mover."""
    daemon.submit(f"trap '{PRINT}' TERM; {READY}", task=task)
    wait_for_output(daemon, task, b"ready\n")
    with kill(task):
        os.kill(daemon.pid_of(f"conmon {task}"), signal.SIGKILL)
        result = stop(daemon, task)
    assert (result.reason, result.exit_code, result.gaps) == ("cancelled", 7, 1)
    daemon.quiet()
    stdout, stderr = daemon.logs(task)
    assert stdout.decode().splitlines() == ["ready", *(f"out {number}" for number in range(1, LINES + 1))]
    # Before that, its shell may say that its own child was terminated.
    assert stderr.decode().splitlines()[-LINES:] == [f"err {number}" for number in range(1, LINES + 1)]
    assert sorted((daemon.logs_dir / f"{task}.log").read_bytes().splitlines()) == sorted(
        [*stdout.splitlines(), *stderr.splitlines()]
    )


def started_again(daemon: ArmedDaemon, task: str, kill: Kill) -> None:
    """The isolated processes are killed, and again as they are started."""
    with kill(task):
        for name in ("syncer", "output mover"):
            os.kill(daemon.wait_pid(name), signal.SIGKILL)
        store = make_store(daemon, task)
        daemon.submit(BEGIN + READ + PRINT, task=task, workspace=task)
        result = daemon.result(task)
    check_ended(daemon, result)
    check_store(daemon, store)


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
    "everything": everything,
    "a new store": a_new_store,
    "small files": small_files,
    "while it runs": while_it_runs,
    "pumped": pumped,
    "started again": started_again,
}


# --- kills in a row ---


def a_start(daemon: ArmedDaemon, task: str, kill: Kill) -> None:
    daemon.submit(f"trap 'exit 9' TERM; {READY}", task=task)
    wait_for_output(daemon, task, b"ready\n")
    root = daemon.pid_of("root supervisor")
    with kill(task):
        os.kill(root, signal.SIGKILL)
    result = stop(daemon, task)
    assert (result.reason, result.exit_code) == ("cancelled", 9) and daemon.logs(task)[0] == b"ready\n"


IN_A_ROW_SCENARIOS: dict[str, Callable[[ArmedDaemon, str, Kill], None]] = {
    "a start": a_start,
    "a task made anew": workspace,
    "a gate opened again": plain,
    "a task released": workspace,
    "a workspace synced again": everything,
    "an image built again": a_new_image,
}


# --- what they are made of ---


def make_store(daemon: ArmedDaemon, name: str) -> Path:
    store = daemon.state / "workspaces" / name
    store.mkdir(mode=0o755)
    (store / "big").write_bytes(CONTENT)
    os.chown(store, 1000, 1000)
    return store


def make_rich_store(daemon: ArmedDaemon, name: str) -> Path:
    store = make_store(daemon, name)
    for directory in ("directory", "emptied"):
        (store / directory).mkdir()
    for file in ("directory/inner", "emptied/file", "gone", "changed", "one", "contested"):
        (store / file).write_text(file)
    (store / "old").write_bytes(CONTENT)
    (store / "other").hardlink_to(store / "one")  # to a task two files
    return store


def check_rich_store(store: Path, task: str) -> None:
    """The store has what came of it; and is removed."""
    found = {str(path.relative_to(store)) for path in store.rglob("*")} - {".aerie-sync"}
    beside = f"contested.aerie-conflict-{task}"
    made = {"made", "made/file", "made/second", "symbolic", "new", "renamed", "renamed/inner", beside}
    assert found == {"big", "ran", "changed", "one", "other", "contested"} | made
    for path, content in {
        "ran": "x\n",
        "made/file": "in\n",
        "made/second": "in\n",
        "renamed/inner": "directory/inner",
        "changed": "changed",
        "one": "one",
        "other": "one",
        "contested": "theirs",
        beside: "mine\n",
    }.items():
        assert (store / path).read_text() == content, path
    assert (store / "new").read_bytes() == (store / "big").read_bytes() == CONTENT
    assert os.readlink(store / "symbolic") == "big"
    modes = {path: (store / path).stat().st_mode & 0o7777 for path in ("changed", "one", "other")}
    assert modes == {"changed": 0o600, "one": 0o600, "other": 0o644}
    shutil.rmtree(store)


def exchange(one: Path, other: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), "renameat2", str(one))


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
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
