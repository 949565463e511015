"""Death is proven before a restart: what looks like one and is none, and what is one and does not look like it.

The proof is the pidfd's, which the kernel makes readable when the whole process has ended; the channel's end only raises a suspicion,
and is made true after a while.  One test, with the real thing, to each way to be wrong:

    the fork server's own death        here; and its processes live on in `test_isolation`, `test_keeper`
    a stolen reap                      here; `test_pidfd`: a process that another reaps
    a grandchild that holds pipes      here
    a channel closed, a process alive  `test_worker`: a worker that can be heard no more is ended
    a stopped process                  here, within 5 s by default; `test_worker`: found by its silence, and not when nobody listened
    a hung process                     `test_worker`: says where before it is killed
    a pid that is used again           here
    the end of the thread it is of     here
    two reapers                        here
    a dead first thread                `test_pidfd`: a first thread that has ended is not the end
    a stale event of the watcher       `test_watch`: a pidfd that takes a dead one's number
"""

from __future__ import annotations

import ast
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

import supervisor
from supervisor import pidfd
from supervisor.channel import Channel
from supervisor.isolation import Isolation, Process
from supervisor.lockfile import holder_of
from supervisor.parts import spawn
from supervisor.worker import SILENCE_S, Ended, Said, Started
from tests.supervisor.actors_under_test import TIMEOUT_S
from tests.supervisor.bosses import Boss, Bosses, pid
from tests.supervisor.descendants import ends, kill
from tests.supervisor.processes_under_test import FROM_CHILD, Say
from tests.supervisor.programs_under_test import ENTRIES, argv


def next_start(boss: Boss) -> None:
    while not isinstance(boss.next(), Started):
        pass


def end_fork_server(fork_server: subprocess.Popen[bytes], directory: Path) -> None:
    """Until its lock is free, too: a spare that it was just forking has that as well, until it has closed what is not its own."""
    fork_server.kill()
    fork_server.wait(TIMEOUT_S)
    deadline = time.monotonic() + TIMEOUT_S
    while holder_of(directory / "forkserver.lock"):
        assert time.monotonic() < deadline


def test_a_process_is_not_dead_because_its_fork_server_is(
    bosses: Bosses, fork_server: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    """`multiprocessing` would say that all of them have ended with 255, and a supervisor would start each a second time."""
    boss = bosses("echo", again=True)
    boss.log.take(2)
    first = pid(boss)
    end_fork_server(fork_server, tmp_path)
    boss.mailbox(lambda boss: boss.worker.send(Say("still there?")))
    assert boss.next().message.text == "still there?"
    assert boss.log.silent
    with subprocess.Popen(argv("fork-server", tmp_path)) as second:
        os.kill(first, signal.SIGKILL)
        assert boss.next() == Ended("worker", 1, "killed by signal 9")
        next_start(boss)
        assert pid(boss) != first
        second.terminate()


def test_a_process_whose_end_somebody_else_reaps_is_dead_all_the_same(
    bosses: Bosses, fork_server: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    """It is this test's child when its fork server has ended, and a thread of the test is quicker than anybody who would wait for it."""
    boss = bosses("echo", again=True)
    boss.log.take(2)
    end_fork_server(fork_server, tmp_path)
    stolen: list[tuple[int, int]] = []
    thief = threading.Thread(target=lambda: stolen.append(os.waitpid(first, 0)))
    first = pid(boss)
    thief.start()
    os.kill(first, signal.SIGTERM)
    thief.join(TIMEOUT_S)
    assert stolen == [(first, signal.SIGTERM)]
    assert not Path(f"/proc/{first}").exists()
    assert boss.next() == Ended("worker", 1, "killed by signal 15")
    with subprocess.Popen(argv("fork-server", tmp_path)) as second:
        next_start(boss)
        second.terminate()


def test_a_process_is_dead_though_its_child_holds_its_channel_open(bosses: Bosses) -> None:
    """`multiprocessing`'s sentinel, a pipe, would be silent until that child has ended as well."""
    boss = bosses("leave_behind")
    assert boss.next() == Started("worker", 1)
    grandchild = int(boss.next().message.text)
    assert boss.next() == Ended("worker", 1, "killed by signal 9")
    assert not ends(grandchild, 0.0)
    kill(grandchild)


@pytest.mark.alone
def test_a_process_that_is_stopped_is_replaced_within_five_seconds_by_default(bosses: Bosses) -> None:
    boss = bosses("beat", heartbeat=True, again=True, silence_s=SILENCE_S)
    assert boss.next() == Started("worker", 1)
    took_s: list[float] = []
    while not took_s or min(took_s) >= 5.0:
        assert len(took_s) < 3, took_s  # once it may be the machine that had something else to do
        number = len(took_s) + 1
        assert boss.next() == Said("worker", number, Say("beat"))
        stopped = pid(boss)
        os.kill(stopped, signal.SIGSTOP)
        began = time.monotonic()
        assert boss.next_but_beats() == Ended("worker", number, "killed by signal 9", hung=True)
        assert boss.next_but_beats() == Started("worker", number + 1)
        assert boss.next() == Said("worker", number + 1, Say("beat"))
        took_s.append(time.monotonic() - began)


# --- a pid that is used again ---


def process_with_pid(wanted: int) -> subprocess.Popen[bytes] | None:
    """A new process that has that number; None when somebody else has taken it: others start processes, and threads, as well."""
    last = Path("/proc/sys/kernel/ns_last_pid")
    for _ in range(10):
        before = last.read_text()
        last.write_text(str(wanted - 1))
        process = subprocess.Popen(["/bin/sleep", "60"])
        last.write_text(before)  # nobody else is to get the number of one that has just ended
        if process.pid == wanted:
            return process
        process.kill()
        process.wait()
    return None


def dead_and_next() -> tuple[Process, int, socket.socket, subprocess.Popen[bytes]] | None:
    """A dead process, when it had started, the other end of its channel, and the process that has its number now, if there is one."""
    first = subprocess.Popen(["/bin/sleep", "60"])
    here, there = Channel.pair(FROM_CHILD)
    process = Process("first", first.pid, pidfd.open_pidfd(first.pid), here)
    started = pidfd.start_time(first.pid)
    time.sleep(2 / os.sysconf("SC_CLK_TCK"))  # what a start time is counted in
    first.kill()
    first.wait()
    second = process_with_pid(first.pid)
    if second is not None:
        return process, started, there, second
    process.close()
    there.close()
    return None


def test_what_is_done_to_a_dead_process_does_not_reach_the_next_of_its_number() -> None:
    found, deadline = dead_and_next(), time.monotonic() + TIMEOUT_S
    while found is None:
        assert time.monotonic() < deadline
        found = dead_and_next()
    process, started, there, second = found
    try:
        assert not process.signal(signal.SIGKILL)
        assert pidfd.has_ended(process.pidfd)
        assert pidfd.wait_status(process.pidfd) == signal.SIGKILL
        assert not pidfd.is_same(second.pid, started)
        assert second.poll() is None
    finally:
        second.kill()
        second.wait()
        process.close()
        there.close()


# --- the thread that started it ---


def test_a_process_outlives_the_thread_that_started_it(tmp_path: Path, fork_server: object) -> None:
    """PR_SET_PDEATHSIG would be of the thread: a process that an actor started would die when that actor is started again."""
    isolation, made = Isolation(str(tmp_path / "forkserver.sock")), []

    def start() -> None:
        made.append(isolation.start("echo", f"{ENTRIES}:echo", Say("hello"), FROM_CHILD))
        made.append(spawn(["/bin/sleep", "60"]))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join(TIMEOUT_S)
    deadline = time.monotonic() + TIMEOUT_S
    while str(thread.native_id) in os.listdir("/proc/self/task"):
        assert time.monotonic() < deadline  # the kernel's thread, which ends a little after Python's
    process, sleeper = made
    process.channel.receive(TIMEOUT_S)
    process.channel.send(Say("still there?"))
    assert process.channel.receive(TIMEOUT_S)[0].text == "still there?"
    assert not ends(sleeper, 0.05)
    process.signal(signal.SIGKILL)
    process.close()
    kill(sleeper)
    os.waitpid(sleeper, 0)


# --- one reaper ---


def test_there_is_one_reaper_to_a_process() -> None:
    """Who waits for processes, and how: the keeper for all of its own, the fork server for its children, a thread for its one."""
    waits = {"wait", "waitpid", "waitid", "wait3", "wait4", "active_children", "communicate", "run", "call", "check_output"}
    owners = {"os", "subprocess", "multiprocess", "process", "child"}
    reapers: dict[str, set[str]] = {}
    for path in Path(supervisor.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Attribute(value=ast.Name(owner), attr=name) if owner in owners and name in waits:
                    reapers.setdefault(path.stem, set()).add(name)
    assert reapers == {
        "keeper": {"waitid", "waitpid"},
        "parts": {"waitpid"},  # of the keeper
        "forkserver": {"active_children"},
        "descriptors": {"wait"},  # for the stand-in keeper that it has started
    }
