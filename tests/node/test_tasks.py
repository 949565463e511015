"""A task through the whole daemon: what it finds, how it ends, what is kept of it."""

from __future__ import annotations

import json
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from actors.gateway.client import RequestFailed
from actors.gateway.messages import Stop
from actors.lazytree.served import STAND_BY_S
from tests.node.daemon import PATIENCE_S, Daemon, running


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, image: str) -> Iterator[Daemon]:
    """Its workspaces are synced at the end alone; and who waits for the grace period waits for too long."""
    settings = {"AERIE_MOUNT_SYNC_INTERVAL": "0s", "AERIE_SANDBOX_STOP_GRACE": "5m"}
    with running(tmp_path_factory.mktemp("node"), image, **settings) as started:
        yield started


def eventually(holds: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def out(daemon: Daemon, script: str, **changes: object) -> str:
    task = daemon.submit(script, **changes)
    result = daemon.result(task)
    stdout, stderr = daemon.logs(task)
    assert result.exit_code == 0, (result, stdout, stderr)
    return stdout.decode()


def test_what_happened_to_a_task_s_actors_is_written_down(daemon: Daemon) -> None:
    task = daemon.submit("true", workspace="written-down")
    daemon.result(task)
    daemon.wait_released()

    def happened(child: str) -> list[tuple[str, str, str]]:
        events = json.loads(daemon.command("events", "--json", "-n", "1000").stdout)
        return [(event["supervisor"], event["what"], event["cause"]) for event in events if event["child"] == child]

    for child, supervisor in ((f"sandbox {task}", "sandboxes"), (f"mount {task}", "mounts")):
        assert happened(child)[0] == (supervisor, "started", "normal")
        # Its end comes after that of all that it had.
        eventually(lambda child=child, end=(supervisor, "ended", "normal"): happened(child)[-1] == end, f"the end of {child}")


def test_what_a_task_leaves_is_put_aside_as_soon_as_that_can_be_done(daemon: Daemon) -> None:
    """The result does not wait for it; and it is tried until it can."""
    removed = daemon.state / "removed"
    removed.rmdir()
    removed.write_bytes(b"")
    try:
        result = daemon.run("exit 3")
        assert result.exit_code == 3
        deadline = time.monotonic() + PATIENCE_S
        while sum(result.task in line and "ERROR" in line for line in daemon.log.read_text().splitlines()) < 2:
            assert time.monotonic() < deadline, "it is said of both, what its container had and its workspace"
            time.sleep(0.01)
    finally:
        removed.unlink()
        removed.mkdir(mode=0o700)
    daemon.wait_released()


# --- what a task finds ---


def test_both_streams_and_the_exit_code(daemon: Daemon) -> None:
    task = daemon.submit("echo out; echo err >&2; printf partial; exit 3")
    result = daemon.result(task)
    assert (result.state, result.reason, result.exit_code, result.signal, result.error) == ("stopped", "exited", 3, None, None)
    assert daemon.logs(task) == (b"out\npartial", b"err\n")


def test_uid_directory_home_and_environment(daemon: Daemon) -> None:
    printed = out(daemon, "id -u; id -g; pwd; echo $HOME $PATH $FROM_IMAGE $GIVEN; stat -c %u:%g .", env={"GIVEN": "a b"})
    assert printed == "1000\n1000\n/workspace\n/workspace /bin yes a b\n1000:1000\n"


def test_a_given_variable_wins_over_the_images(daemon: Daemon) -> None:
    assert out(daemon, "echo $FROM_IMAGE", env={"FROM_IMAGE": "no"}) == "no\n"


def test_content_of_the_image_is_exact(daemon: Daemon) -> None:
    data = bytes(range(256)) * 4000
    task = daemon.submit("cat /etc/data")
    daemon.result(task)
    assert daemon.logs(task)[0] == data


def test_the_root_is_writable_and_each_task_has_its_own(daemon: Daemon) -> None:
    assert out(daemon, "ls /tmp; echo x > /tmp/x; echo y > /dev/shm/y; cat /tmp/x /dev/shm/y") == "x\ny\n"
    assert out(daemon, "ls /tmp") == ""


def test_only_loopback_is_there_and_it_is_up(daemon: Daemon) -> None:
    printed = out(daemon, "ip -o link; cat /etc/hosts")
    assert "lo: <LOOPBACK,UP" in printed and printed.count("mtu") == 1
    assert "127.0.0.1\tlocalhost" in printed


def test_no_capability_no_device_no_way_to_the_hosts_settings(daemon: Daemon) -> None:
    script = "cat /proc/self/status; mknod /tmp/d b 1 1 || echo no device; (echo 1 > /proc/sys/kernel/panic) 2>/dev/null || echo no write"
    printed = out(daemon, script)
    assert "CapBnd:\t0000000000000000" in printed and "NoNewPrivs:\t1" in printed and "Seccomp:\t2" in printed
    assert "no device\n" in printed and "no write\n" in printed


def test_the_daemons_descriptors_are_not_the_tasks(daemon: Daemon) -> None:
    assert out(daemon, "ls /proc/self/fd").split() == ["0", "1", "2", "3"]  # the third is ls's own


def test_descriptors_and_the_oom_killers_eye_are_as_usual(daemon: Daemon) -> None:
    """Whatever the daemon has for itself."""
    hard = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 1 << 20)
    assert out(daemon, "ulimit -Sn; ulimit -Hn; cat /proc/self/oom_score_adj").split() == [str(min(1024, hard)), str(hard), "0"]


def test_stdin_is_at_its_end(daemon: Daemon) -> None:
    assert out(daemon, "cat; echo done") == "done\n"


# --- how a task ends ---


def test_a_signal_is_not_an_exit_code(daemon: Daemon) -> None:
    killed = daemon.run("sh -c 'kill -SEGV $$'; kill -KILL $$; true")
    assert (killed.reason, killed.exit_code) == ("exited", 0)  # the first process of a PID namespace cannot kill itself
    exited = daemon.run("exit 139")
    assert (exited.reason, exited.exit_code, exited.signal) == ("exited", 139, None)


def test_time_out(daemon: Daemon) -> None:
    result = daemon.run("sleep 60", timeout_s=0.3)
    assert (result.state, result.reason) == ("stopped", "timeout")
    assert result.duration_s is not None and 0.3 <= result.duration_s < 30


def test_stop_lets_a_task_that_listens_finish(daemon: Daemon) -> None:
    task = daemon.submit("trap 'echo bye; exit 9' TERM; echo ready; while :; do sleep 0.05; done")
    wait_for_output(daemon, task, b"ready\n")
    result = stop(daemon, task)
    assert (result.reason, result.exit_code) == ("cancelled", 9)
    assert daemon.logs(task)[0] == b"ready\nbye\n"


def test_stop_kills_at_once_where_nobody_would_hear_it(daemon: Daemon) -> None:
    task = daemon.submit(["/bin/sleep", "300"])
    daemon.wait_running(task)
    assert stop(daemon, task).reason == "cancelled"  # within a minute, and not after the grace period of five


def test_force_kills_who_does_not_want_to_end(daemon: Daemon) -> None:
    task = daemon.submit("trap '' TERM; echo ready; while :; do sleep 0.05; done")
    wait_for_output(daemon, task, b"ready\n")
    result = stop(daemon, task, force=True)
    assert (result.reason, result.signal) == ("cancelled", 9)


def test_a_finished_task_can_be_stopped(daemon: Daemon) -> None:
    task = daemon.submit("exit 4")
    daemon.result(task)
    assert stop(daemon, task).exit_code == 4


def test_out_of_memory(daemon: Daemon) -> None:
    result = daemon.run("tail /dev/zero", memory_bytes=32 << 20)
    assert (result.state, result.reason) == ("stopped", "oom")
    assert result.error is not None and "--memory" in result.error


def test_pids_are_limited(daemon: Daemon) -> None:
    result = daemon.run("i=0; while [ $i -lt 1100 ]; do sleep 60 & i=$((i+1)); done 2>/dev/null; echo made $i", timeout_s=60)
    assert result.exit_code != 0 or result.reason != "exited"


# --- ids ---


def test_the_same_id_with_the_same_content_is_the_same_task(daemon: Daemon) -> None:
    assert daemon.submit("exit 6", task="same") == daemon.submit("exit 6", task="same")
    assert daemon.result("same").exit_code == 6
    daemon.submit("exit 6", task="same")


def test_the_same_id_with_other_content_is_refused(daemon: Daemon) -> None:
    daemon.submit("exit 1", task="other")
    with pytest.raises(RequestFailed, match="exists already"):
        daemon.submit("exit 2", task="other")
    daemon.result("other")


# --- workspaces ---


def test_a_workspace_comes_back(daemon: Daemon) -> None:
    result = daemon.run("mkdir d; echo kept > d/file; ln -s d/file link; chmod 750 d", workspace="back")
    assert result.sync == "synced"
    store = daemon.state / "workspaces" / "back"
    assert (store / "d/file").read_text() == "kept\n" and os.readlink(store / "link") == "d/file"
    assert out(daemon, "cat link; rm link; mv d e; echo more >> e/file", workspace="back") == "kept\n"
    assert (store / "e/file").read_text() == "kept\nmore\n" and not (store / "d").exists() and not (store / "link").is_symlink()


def test_what_a_task_writes_without_a_workspace_is_thrown_away(daemon: Daemon) -> None:
    result = daemon.run("echo x > file")
    daemon.wait_released()
    assert result.sync == "none" and not (daemon.state / "tasks" / result.task / "workspace").exists()


def test_two_tasks_on_one_workspace_do_not_overwrite_each_other(daemon: Daemon) -> None:
    daemon.run("echo base > file", workspace="shared")
    first = daemon.submit("echo first > file; echo ready; until [ -e go ]; do sleep 0.05; done", workspace="shared")
    wait_for_output(daemon, first, b"ready\n")
    assert daemon.run("cat file; echo second > file", workspace="shared").sync == "synced"
    (daemon.run_dir / "tasks" / first / "workspace/go").touch()
    late = daemon.result(first)
    assert late.sync == "conflict" and late.conflicts
    store = daemon.state / "workspaces" / "shared"
    assert (store / "file").read_text() == "second\n"
    assert [path.read_text() for path in store.glob("file.aerie-conflict-*")] == ["first\n"]


# --- many at once ---


def test_fifty_at_once_each_with_its_own_result(daemon: Daemon) -> None:
    tasks = [daemon.submit(f"echo {number}; exit {number}", task=f"many-{number}") for number in range(50)]
    assert [daemon.result(task).exit_code for task in tasks] == list(range(50))
    assert [daemon.logs(task)[0] for task in tasks] == [b"%d\n" % number for number in range(50)]


def test_batch_answers_each_line_as_soon_as_it_is_there(daemon: Daemon) -> None:
    lines = [
        {"image": daemon.image, "command": ["/bin/sh", "-c", f"exit {number}"], "id": f"line-{number}"} for number in range(8)
    ]
    done = daemon.command("batch", "--parallel", "4", "-", input="".join(json.dumps(line) + "\n" for line in lines).encode())
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert {answer["task"]: answer["exit_code"] for answer in answers} == {f"line-{number}": number for number in range(8)}


def test_ten_thousand_lines_of_both_streams_are_whole_and_in_order(daemon: Daemon) -> None:
    task = daemon.submit("i=0; while [ $i -lt 10000 ]; do i=$((i+1)); echo out $i; echo err $i >&2; done")
    assert daemon.result(task).exit_code == 0
    stdout, stderr = daemon.logs(task)
    assert stdout.decode().splitlines() == [f"out {number}" for number in range(1, 10001)]
    assert stderr.decode().splitlines() == [f"err {number}" for number in range(1, 10001)]


def test_logs_follow_a_running_task_to_its_end(daemon: Daemon) -> None:
    task = daemon.submit("echo one; sleep 0.5; echo two; exit 0")
    followed = daemon.command("logs", "-f", task)
    assert (followed.stdout, followed.returncode) == (b"one\ntwo\n", 0)


# --- images ---


def test_image_mount_is_read_only_and_given_back(daemon: Daemon) -> None:
    mounted = json.loads(daemon.command("image", "mount", "--json", daemon.image).stdout)
    path = Path(mounted["path"])
    assert (path / "etc/passwd").read_text().startswith("root:")
    with pytest.raises(OSError, match="Read-only"):
        (path / "new").write_text("x")
    assert daemon.command("image", "unmount", mounted["lease"]).returncode == 0
    eventually(lambda: not path.exists(), "the mount is gone")
    assert daemon.command("image", "unmount", mounted["lease"]).returncode == 4


def stop(daemon: Daemon, task: str, force: bool = False):  # type: ignore[no-untyped-def]
    return daemon.client.ask(Stop(daemon.client.number(), task, force), timeout_s=60).result  # type: ignore[union-attr]


def wait_for_output(daemon: Daemon, task: str, text: bytes) -> None:
    """Wait until a running task has printed `text`."""
    from actors.output.follower import Follower

    follower = (
        Follower(daemon.state / "tasks" / task / "output") if (daemon.state / "tasks" / task / "output").exists() else None
    )
    deadline = time.monotonic() + 60
    seen = b""
    while text not in seen:
        assert time.monotonic() < deadline, seen
        if follower is None:
            threading.Event().wait(0.01)  # the directory is made with the container
            if (daemon.state / "tasks" / task / "output").exists():
                follower = Follower(daemon.state / "tasks" / task / "output")
            continue
        seen += b"".join(chunk.data for chunk in follower.read())
        if text not in seen:
            follower.wait(1.0)
    assert follower is not None
    follower.close()


def begun_without_a_server(daemon: Daemon, script: str, workspace: str, printed: bytes) -> str:
    """A task that waits for `go`, has printed that, and whose workspace had no server by then → its id.

    One is started some time after the mount, whether it is needed or not: where the machine takes longer than that until the task has
    printed, another task is begun.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        begun = time.monotonic()
        task = daemon.submit(f"{script}; until [ -e go ]; do sleep 0.02; done; rm go", workspace=workspace)
        daemon.wait_printed(task, printed)
        try:
            daemon.pid_of(f"workspace mount {task}")
        except LookupError:
            return task
        took_s = time.monotonic() - begun
        assert took_s > STAND_BY_S and time.monotonic() < deadline, took_s
        go(daemon, task)
        daemon.result(task)


def go(daemon: Daemon, task: str) -> None:
    (daemon.run_dir / "tasks" / task / "workspace/go").touch()


def test_a_workspace_that_is_all_there_is_served_only_when_a_task_stays(daemon: Daemon) -> None:
    store = daemon.state / "workspaces/small"
    store.mkdir(parents=True)
    (store / "file").write_text("small\n")
    os.chown(store, 1000, 1000)
    daemon.run("true", workspace="small")
    task = begun_without_a_server(daemon, "cat file", "small", b"small\n")
    daemon.wait_pid(f"workspace mount {task}")
    go(daemon, task)
    assert daemon.result(task).exit_code == 0


def test_what_one_task_has_read_needs_no_server_in_the_next(daemon: Daemon) -> None:
    store = daemon.state / "workspaces/large"
    store.mkdir(parents=True)
    (store / "file").write_bytes(os.urandom(1 << 20))
    for path in (store, store / "file"):
        os.chown(path, 1000, 1000)
    first = daemon.submit("cat file | wc -c; until [ -e go ]; do sleep 0.02; done; rm go", workspace="large")
    # What is there has its size at once: an object is named when it is whole.
    cache = daemon.state / "images/cache"
    eventually(lambda: any(size_of(path) == 1 << 20 for path in cache.glob("??/*")), "it is in the cache")
    go(daemon, first)
    daemon.result(first)
    task = begun_without_a_server(daemon, "cat file | wc -c", "large", b"%d\n" % (1 << 20))
    go(daemon, task)
    assert daemon.result(task).exit_code == 0


def size_of(path: Path) -> int:
    """0 for what has gone."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def test_an_id_may_be_used_again_as_soon_as_it_is_forgotten(tmp_path: Path, image: str) -> None:
    with running(tmp_path, image, AERIE_GATEWAY_RESULTS_MAX="1") as daemon:
        for number in range(12):
            # One result is kept: as soon as two tasks are over and a third one ends, the first is forgotten.
            task, deadline = f"task-{number % 3}", time.monotonic() + PATIENCE_S
            while True:
                try:
                    daemon.submit(f"echo {number}; sleep 60", task=task)
                    break
                except RequestFailed as failed:
                    assert failed.kind == "conflict", failed
                    assert time.monotonic() < deadline, "it is forgotten"
            daemon.wait_printed(task, b"%d\n" % number)
            while os.listdir(daemon.run_dir / "tasks") != [task]:
                assert time.monotonic() < deadline, "the one before is over"
                time.sleep(0.005)
            daemon.client.send(Stop(daemon.client.number(), task, True))
        assert daemon.result(task).reason == "cancelled"
