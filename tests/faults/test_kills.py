"""Each kind of process is killed while a task reads from LAZY, writes to its workspace and prints to both streams (`model`)."""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest

from actors.gateway.messages import CheckStorage, PruneStorage
from actors.output.follower import Follower
from tests.actors.image.images import RunningRegistry, member, tar
from tests.actors.image.proxy import Proxy, silent
from tests.faults import victims
from tests.node.daemon import PATIENCE_S, Daemon, in_place_of, running, state_of
from tests.node.test_tasks import stop

LINES = 300
WAIT = 200  # at this line the task waits, lest it ends before it is struck at
TRIES = 10  # until the machine does not stand still in between
BIG_BYTES = 24 << 20
SCRIPT = """
i=0
while [ $i -lt {lines} ]; do
  i=$((i+1)); echo out $i; echo err $i >&2
  if [ $((i % 25)) = 0 ]; then
    [ "$(md5sum < big)" = "{digest}  -" ] || echo WRONG
    echo $i >> written || echo WRONG
  fi
  [ $i -ne {wait} ] || until [ -e go ]; do sleep 0.02; done
done
exit 7
"""


@pytest.fixture
def daemon(tmp_path: Path, image: str) -> Iterator[Daemon]:
    """A daemon of its own for each kill; it must leave nothing (`running`)."""
    with running(tmp_path, image, AERIE_MOUNT_SYNC_INTERVAL="100ms") as started:  # kills meet syncs of running tasks
        yield started


@pytest.fixture
def task(daemon: Daemon) -> str:
    """A task in full swing, to be let go when it has been struck at."""
    store = daemon.state / "workspaces" / "work"
    store.mkdir(mode=0o755)
    content = os.urandom(BIG_BYTES)
    (store / "big").write_bytes(content)
    for path in (store, store / "big"):
        os.chown(path, 1000, 1000)
    task = daemon.submit(SCRIPT.format(lines=LINES, wait=WAIT, digest=hashlib.md5(content).hexdigest()), workspace="work")
    wait_for_lines(daemon, task, 60)
    return task


def let_go(daemon: Daemon, task: str) -> None:
    (daemon.run_dir / "tasks" / task / "workspace/go").touch()


def wait_for_lines(daemon: Daemon, task: str, count: int) -> None:
    """Wait until a task has printed that many lines to stdout."""
    output = daemon.state / "tasks" / task / "output"
    deadline = time.monotonic() + 60
    while not output.exists():
        assert time.monotonic() < deadline
        daemon.tree()  # made with the container; every look takes a moment
    follower, seen = Follower(output), 0
    while seen < count:
        assert time.monotonic() < deadline, (seen, daemon.command("result", task), daemon.log.read_text()[-3000:])
        seen += sum(chunk.data.count(b"\n") for chunk in follower.read() if chunk.stream == "stdout")
        if seen < count:
            follower.wait(1.0)
    follower.close()


def check(daemon: Daemon, task: str, gaps: int = 0) -> None:
    """The invariants of a task that was in full swing."""
    let_go(daemon, task)
    result = daemon.result(task)
    stdout, stderr = daemon.logs(task)
    assert stdout.decode().splitlines() == [f"out {number}" for number in range(1, LINES + 1)]
    assert stderr.decode().splitlines() == [f"err {number}" for number in range(1, LINES + 1)]
    assert (result.state, result.reason, result.exit_code, result.sync, result.gaps) == ("stopped", "exited", 7, "synced", gaps)
    written = (daemon.state / "workspaces/work/written").read_text()
    assert written.split() == [str(number) for number in range(25, LINES + 1, 25)]
    daemon.wait_nothing_left()


def strike(daemon: Daemon, name: str, fault: signal.Signals = signal.SIGKILL) -> int:
    """Strike the process that has this name in the tree, as soon as there is one → its pid."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        pid = daemon.wait_pid(name)
        try:
            os.kill(pid, fault)
            return pid
        except ProcessLookupError:  # it was replaced since
            assert time.monotonic() < deadline, name


@pytest.mark.parametrize("name", ["root supervisor", "fork server", "output mover", "syncer", "workspace mount {task}"])
def test_a_killed_process_costs_the_task_nothing(daemon: Daemon, task: str, name: str) -> None:
    strike(daemon, name.format(task=task))
    check(daemon, task)
    for survivor in ("fork server", "output mover", "syncer"):
        daemon.wait_pid(survivor)


def test_a_killed_conmon_costs_at_most_what_it_held_and_a_record_says_so(daemon: Daemon, task: str) -> None:
    strike(daemon, f"conmon {task}")
    let_go(daemon, task)
    result = daemon.result(task)
    stdout, stderr = daemon.logs(task)
    for stream, word in ((stdout, "out"), (stderr, "err")):
        lines = [line for line in stream.decode().splitlines() if line.startswith(word)]
        expected = [f"{word} {number}" for number in range(1, LINES + 1)]
        assert lines[-1] == expected[-1] and len(b"".join(line.encode() for line in expected)) - len("".join(lines)) <= 8192
        assert [line for line in expected if line in set(lines)] == lines  # in order, none twice
    assert (result.reason, result.exit_code, result.sync, result.gaps) == ("exited", 7, "synced", 1)


def test_a_killed_keeper_is_stood_in_for_and_the_next_one_takes_over(daemon: Daemon, task: str) -> None:
    strike(daemon, "keeper")
    check(daemon, task)
    daemon.start()  # becomes the keeper in the stand-in's place, and its SIGTERM ends everything


def test_keeper_and_root_supervisor_killed_together(daemon: Daemon, task: str) -> None:
    daemon.kill_supervisors()
    daemon.start()
    check(daemon, task)


def test_take_over_renews_the_daemon_under_a_running_task(daemon: Daemon, task: str) -> None:
    old = daemon.pid, daemon.wait_pid("root supervisor"), daemon.wait_pid("fork server")
    daemon.start("--take-over")
    check(daemon, task)
    assert not {daemon.pid, daemon.wait_pid("root supervisor"), daemon.wait_pid("fork server")} & set(old)


def push_large(registry: RunningRegistry, name: str) -> str:
    """An image whose content takes a while to be read → its reference."""
    repository = registry.repository(name)
    repository.push(
        tar(*(member(f"file-{number}", os.urandom(64 << 10)) for number in range(300))),
        tar(member("bin/busybox", Path("/bin/busybox").read_bytes(), mode=0o755)),
    )
    return repository.reference()


def test_a_killed_image_builder_is_followed_by_another(registry: RunningRegistry, daemon: Daemon) -> None:
    with Proxy(registry.address) as proxy:
        proxy.on("/blobs/", silent(600))  # so that it can be met
        push_large(registry, "killed")
        task = daemon.submit(["/bin/busybox", "sh", "-c", "exit 5"], image=f"{proxy.address}/killed:latest")
        killed = strike(daemon, "image builder")
        daemon.wait_pid("image builder", other_than=killed)
        proxy.behave()
        proxy.hang_up()
        assert daemon.result(task).exit_code == 5


@pytest.mark.parametrize("name", ["output mover", "syncer", "workspace mount {task}"])
def test_a_hung_process_is_found_by_its_silence_and_replaced(daemon: Daemon, task: str, name: str) -> None:
    hung = strike(daemon, name.format(task=task), signal.SIGSTOP)
    if name.startswith("workspace"):
        check(daemon, task)  # it cannot end before it was replaced
        return
    daemon.wait_pid(name, other_than=hung)
    check(daemon, task)


def test_a_conmon_that_found_nobody_to_tell_that_it_has_created_costs_no_output(tmp_path: Path, image: str) -> None:
    """It is stopped before it can say so, and goes on when the root supervisor that waited for it is dead."""
    stopped = tmp_path / "stopped"
    act = f'[ -e {stopped} ] || {{ $program "$@"; kill -STOP $PPID; echo > {stopped}; exit 0; }}'
    path = in_place_of("crun", tmp_path, f'case " $* " in *" create "*) {act};; esac\nexec $program "$@"')
    (tmp_path / "node").mkdir()
    with running(tmp_path / "node", image, PATH=path) as daemon:
        task = daemon.submit("echo ran >> ran; echo out; echo err >&2; exit 7", workspace="work")
        deadline = time.monotonic() + 60
        while not stopped.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        strike(daemon, "root supervisor")
        result = daemon.result(task)
        assert (result.state, result.exit_code, result.error, result.gaps) == ("stopped", 7, None, 0)
        assert daemon.logs(task) == (b"out\n", b"err\n")
        assert (daemon.state / "workspaces/work/ran").read_text() == "ran\n"


def test_a_runtime_that_was_about_to_write_down_its_container_is_called_again(tmp_path: Path, image: str) -> None:
    """crun makes the file first, and writes the pid then: who finds it empty finds no container."""
    met = tmp_path / "met"
    act = f'[ -e {met} ] || {{ while [ "$1" != --pid-file ]; do shift; done; : > "$2"; : > {met}; exec sleep 1000; }}'
    path = in_place_of("crun", tmp_path, f'case " $* " in *" create "*) {act};; esac\nexec $program "$@"')
    (tmp_path / "node").mkdir()
    with running(tmp_path / "node", image, PATH=path) as daemon:
        task = daemon.submit("echo ran >> ran; exit 7", workspace="work")
        deadline = time.monotonic() + PATIENCE_S
        while not met.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        strike(daemon, "root supervisor")
        result = daemon.result(task)
        assert (result.state, result.exit_code, result.error) == ("stopped", 7, None)
        assert (daemon.state / "workspaces/work/ran").read_text() == "ran\n"
        assert daemon.own_faults() == []


def test_a_stopped_conmon_goes_on(daemon: Daemon, task: str) -> None:
    strike(daemon, f"conmon {task}", signal.SIGSTOP)
    check(daemon, task)


# What crun and runc do at `start`, and crun at `delete`, is done without executing them: nobody is there to be killed.
@pytest.mark.parametrize(("runtime", "verb"), [("crun", "create"), ("runc", "create"), ("runc", "delete")])
@pytest.mark.parametrize("moment", ["before it acts", "while it acts"])
def test_a_runtime_killed_at_its_work_costs_the_task_nothing(
    tmp_path: Path, image: str, runtime: str, verb: str, moment: str
) -> None:
    """The first calls of the verb are killed: each is made again."""
    killed = 4 if verb == "create" else 2
    calls = tmp_path / "calls"
    work = '$program "$@" & sleep 0.01; kill -9 $! ;' if moment == "while it acts" else ""
    act = f"echo call >> {calls}; [ $(wc -l < {calls}) -gt {killed} ] || {{ {work} kill -9 $$; }}"
    path = in_place_of(runtime, tmp_path, f'case " $* " in *" {verb} "*) {act};; esac\nexec $program "$@"')
    (tmp_path / "node").mkdir()
    with running(tmp_path / "node", image, PATH=path) as daemon:
        result = daemon.result(daemon.submit("echo once >> ran; exit 7", "task", runtime=runtime, workspace="work"))
        assert (result.state, result.exit_code, result.error) == ("stopped", 7, None)
        assert (daemon.state / "workspaces/work/ran").read_text() == "once\n"
        daemon.wait_nothing_left()
        assert " ERROR " not in (log := daemon.log.read_text()), log
    # What was killed at its work may have done it all the same.
    assert len(calls.read_text().splitlines()) >= (killed + 1 if moment == "before it acts" else 1)


def test_a_task_that_is_stopped_is_not_created_once_more(tmp_path: Path, image: str) -> None:
    calls = tmp_path / "calls"
    act = f"echo call >> {calls}; kill -9 $$"
    path = in_place_of("crun", tmp_path, f'case " $* " in *" create "*) {act};; esac\nexec $program "$@"')
    (tmp_path / "node").mkdir()
    with running(tmp_path / "node", image, PATH=path) as daemon:
        made = 0
        for _ in range(TRIES):
            calls.write_text("")
            task = daemon.submit("exit 7")
            deadline = time.monotonic() + PATIENCE_S
            while len(calls.read_text().splitlines()) < 5:  # the sixth would come a second later
                assert time.monotonic() < deadline
            result = stop(daemon, task)
            assert (result.state, result.reason, result.exit_code) == ("failed", None, None)
            made = len(calls.read_text().splitlines())
            if made == 5:
                break  # else the machine stood still, and the stop came later than that
        assert made == 5


def test_processes_that_do_one_piece_of_work_do_not_outlive_a_root_supervisor_even_when_they_are_stopped(
    tmp_path: Path, registry: RunningRegistry, image: str
) -> None:
    """A stopped one does not see that nobody listens any more."""
    known = push_large(registry, "known")
    commands = (["/bin/busybox", "sh", "-c", f"exit 5 # {number}"] for number in count())  # each is another workload
    with Proxy(registry.address) as proxy, running(tmp_path, image, AERIE_IMAGE_PREFETCH="trace") as daemon:
        stopped: set[int] = set()

        def stop(kind: str, ask: Callable[[], object], every_s: float = 0.0) -> None:
            """Stop one as soon as it is there; while it is not, ask for what it does, again and again."""
            deadline, ask_s = time.monotonic() + PATIENCE_S, 0.0
            while True:
                found = [process.pid for process in victims.find(daemon.state) if process.kind == kind]
                with suppress(ProcessLookupError):  # it has ended since
                    for pid in found[:1]:
                        os.kill(pid, signal.SIGSTOP)
                        stopped.add(pid)
                        return
                assert time.monotonic() < deadline, kind
                if time.monotonic() >= ask_s:
                    ask()
                    ask_s = time.monotonic() + every_s

        def record() -> None:
            assert daemon.run(next(commands), image=known).exit_code == 5

        with open(daemon.state / "images/cache/evicting", "a") as evicting:
            fcntl.flock(evicting, fcntl.LOCK_EX)  # as another daemon's evictor would have it
            prune, look = PruneStorage(daemon.client.number(), 0), CheckStorage(daemon.client.number())
            stop("evictor", lambda: daemon.client.send(prune))
        stop("image prefetcher", record, every_s=2.0)  # it may be done before it was seen
        stop("checker", lambda: daemon.client.send(look))
        proxy.on("/blobs/", silent(600))
        task = daemon.submit(next(commands), image=f"{proxy.address}/known:latest")
        stop("image builder", lambda: None)
        proxy.behave()
        strike(daemon, "root supervisor")
        assert daemon.result(task).exit_code == 5
        assert not stopped & {process.pid for process in victims.find(daemon.state)}


WAITING = "echo begun; until [ -e go ]; do sleep 0.02; done; cat small other && exit 7"


@pytest.fixture
def waiting(daemon: Daemon) -> str:
    """A task whose workspace has no server yet, for all of it is in OBJECTS."""
    store = daemon.state / "workspaces" / "small"
    store.mkdir(mode=0o755)
    for name in ("small", "other"):
        (store / name).write_text(f"{name}\n")
    for path in (store, *store.iterdir()):
        os.chown(path, 1000, 1000)
    daemon.run("true", workspace="small")
    for _ in range(TRIES):
        task = daemon.submit(WAITING, workspace="small")
        wait_for_lines(daemon, task, 1)
        try:
            daemon.pid_of(f"workspace mount {task}")
        except LookupError:
            return task
        stop(daemon, task, force=True)  # the machine stood still: it has one two seconds after its start
    raise AssertionError("it is served from its start")


@pytest.mark.parametrize("names", [["root supervisor"], ["keeper"], ["fork server"], ["keeper", "root supervisor"]])
def test_a_kill_while_a_mount_has_no_server_yet(daemon: Daemon, waiting: str, names: list[str]) -> None:
    if names == ["keeper", "root supervisor"]:
        daemon.kill_supervisors()
    else:
        strike(daemon, names[0])
        # Now a server is needed.  (With both dead nobody held the connection; then OBJECTS must do.)
        for file in (daemon.state / "images/cache").glob("??/*"):
            if file.read_bytes() == b"other\n":
                file.unlink()
    if "keeper" in names:
        daemon.start()
    let_go(daemon, waiting)
    result = daemon.result(waiting)
    assert daemon.logs(waiting)[0] == b"begun\nsmall\nother\n", (result, daemon.logs(waiting))
    assert (result.state, result.exit_code, result.sync) == ("stopped", 7, "synced")
    daemon.wait_nothing_left()


SLOW_TO_WRITE_DOWN = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <string.h>
#include <unistd.h>

int rename(const char *from, const char *to) {
    if (strstr(to, "/exits/"))
        while (access(HELD, F_OK) == 0)
            usleep(1000);
    return ((int (*)(const char *, const char *))dlsym(RTLD_NEXT, "rename"))(from, to);
}
"""


def conmon_with(home: Path, source: str) -> str:
    """A conmon with something of its own in the C library's place → the PATH on which it is found."""
    library = home / "slow.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-x", "c", "-o", library, "-"], input=source.encode(), check=True)
    return in_place_of("conmon", home, f'LD_PRELOAD={library} exec $program "$@"')


SLOW_DISK = r"""
#include <time.h>
#include <unistd.h>

int fsync(int file) {
    static struct timespec left = {5, 500000000}; /* the first time */
    while (nanosleep(&left, &left))
        ;
    left.tv_sec = left.tv_nsec = 0;
    return 0;
}
"""


def test_a_disk_that_takes_seconds_for_the_last_output_costs_nothing(tmp_path: Path, image: str) -> None:
    """conmon makes the journal durable before it ends."""
    path = conmon_with(tmp_path, SLOW_DISK)
    (tmp_path / "node").mkdir()
    with running(tmp_path / "node", image, PATH=path) as daemon:
        began = time.monotonic()
        result = daemon.run("echo out; exit 7")
        assert time.monotonic() - began > 5
        assert (result.state, result.exit_code, result.error, result.gaps) == ("stopped", 7, None, 0)
        assert daemon.logs(result.task) == (b"out\n", b"")


@pytest.mark.parametrize("moment", ["reaped", "reaped, and its conmon is stopped", "a zombie"])
def test_a_container_that_ended_while_nobody_lived_and_whose_code_is_not_written_down_yet(
    tmp_path: Path, image: str, moment: str
) -> None:
    """conmon reaps first, and writes the exit code down afterwards: a daemon that starts in between waits for it."""
    held = tmp_path / "held"
    path = conmon_with(tmp_path, SLOW_TO_WRITE_DOWN.replace("HELD", f'"{held}"'))
    (tmp_path / "node").mkdir()
    with running(tmp_path / "node", image, PATH=path) as daemon:
        task = daemon.submit(WAITING.replace("small other", "go"), workspace="work")
        wait_for_lines(daemon, task, 1)
        monitor = daemon.run_dir / "tasks" / task / "monitor"
        first, conmon = (int((monitor / name).read_text()) for name in ("pid", "conmon.pid"))
        held.touch()
        daemon.kill_supervisors()
        daemon.reap()
        if moment == "a zombie":
            os.kill(conmon, signal.SIGSTOP)
        (daemon.run_dir / "tasks" / task / "workspace/go").write_text("went\n")
        deadline = time.monotonic() + PATIENCE_S
        while state_of(first) != ("Z" if moment == "a zombie" else ""):
            assert time.monotonic() < deadline
        if moment == "reaped, and its conmon is stopped":
            os.kill(conmon, signal.SIGSTOP)
        daemon.start()
        time.sleep(0.5)  # a daemon that does not wait has given it up by then
        held.unlink()
        result = daemon.result(task)
        assert (result.state, result.exit_code, result.error, result.sync) == ("stopped", 7, None, "synced")
        assert daemon.logs(task)[0] == b"begun\nwent\n"
