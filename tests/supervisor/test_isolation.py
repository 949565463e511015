"""Isolated processes, as their parent sees them, with a real fork server."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from supervisor.channel import Channel, ChannelClosed
from supervisor.isolation import Isolation, IsolationError, Process
from supervisor.pidfd import wait_status
from tests.supervisor.processes_under_test import FROM_CHILD, Crash, Report, Say
from tests.supervisor.programs_under_test import ENTRIES, argv

Start = Callable[..., Process]


@pytest.fixture
def isolation(tmp_path: Path, fork_server: subprocess.Popen[bytes]) -> Isolation:
    return Isolation(str(tmp_path / "forkserver.sock"))


@pytest.fixture
def start(isolation: Isolation) -> Iterator[Start]:
    """Start an entry; its process is ended with the test."""
    processes: list[Process] = []

    def start(entry: str, text: str = "hello", descriptors: Sequence[int] = ()) -> Process:
        processes.append(isolation.start(entry, f"{ENTRIES}:{entry}", Say(text), FROM_CHILD, descriptors, timeout_s=60.0))
        return processes[-1]

    yield start
    for process in processes:
        if not process.closed:
            process.signal(signal.SIGKILL)
            wait_for(process)
            process.close()


def wait_for(process: Process) -> int | None:
    """Wait for its end → its exit code, as `subprocess` has it."""
    assert select.select([process.pidfd], [], [], 60)[0]
    status = wait_status(process.pidfd)
    return None if status is None else os.waitstatus_to_exitcode(status)


def hear(process: Process) -> Any:
    return process.channel.receive(60)[0]


def test_a_process_is_started_and_spoken_to(start: Start) -> None:
    process = start("echo")
    first = hear(process)
    assert (first.text, first.pid, first.name) == ("hello", process.pid, "echo")
    process.channel.send(Say("again"))
    assert hear(process).text == "again"


def test_a_process_has_no_descriptors_but_its_own(start: Start) -> None:
    """Whatever its parent, the fork server and the processes that were started before have open."""
    other = start("echo")
    reader, writer = os.pipe()
    process = start("echo", descriptors=[reader, writer])
    report: Report = hear(process)
    pipe = os.readlink(f"/proc/self/fd/{reader}")
    own = sorted(target.partition(":")[0] for number, target in report.descriptors.items() if number > 2)
    assert own == ["pipe", "pipe", "socket"]
    assert [target for target in report.descriptors.values() if target == pipe] == [pipe, pipe]
    assert report.descriptors[0] == "/dev/null"
    assert hear(other).descriptors.keys() == {0, 1, 2, *hear_keys(other)}
    os.close(reader)
    os.close(writer)


def hear_keys(process: Process) -> set[int]:
    process.channel.send(Say("and now?"))
    return {number for number in hear(process).descriptors if number > 2}


def test_a_process_loads_no_actor_and_costs_little(start: Start) -> None:
    process = start("echo")
    assert not hear(process).pykka
    rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    private_kib = sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private_"))
    assert private_kib < 6 << 10


def test_a_process_is_in_a_session_of_its_own(start: Start) -> None:
    """A terminal's ^C is not for it."""
    process = start("echo")
    assert hear(process).session == process.pid


def test_descriptors_are_passed_and_copies(start: Start) -> None:
    reader, writer = os.pipe()
    process = start("write", "through the pipe", [writer])
    os.close(writer)
    assert wait_for(process) == 0
    assert os.read(reader, 100) == b"through the pipe"
    assert os.read(reader, 100) == b""  # nobody else has it: not the fork server, not its other children
    os.close(reader)


def test_a_process_that_raises_has_ended_with_1_and_said_why(start: Start, tmp_path: Path) -> None:
    process = start("echo")
    hear(process)
    process.channel.send(Crash())
    assert wait_for(process) == 1
    with pytest.raises(ChannelClosed):
        hear(process)
    assert "RuntimeError: as it was told" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSEGV])
def test_how_a_process_was_ended_is_known_to_who_is_not_its_parent(start: Start, number: int) -> None:
    process = start("outlive")
    assert process.signal(number)
    assert wait_for(process) == -number


def test_a_process_that_is_gone_takes_no_signal(start: Start) -> None:
    process = start("write", descriptors=[1])
    wait_for(process)
    assert not process.signal(signal.SIGTERM) or wait_for(process) == 0  # true as long as it is a zombie


def test_a_process_ends_when_its_channel_is_closed(start: Start) -> None:
    process = start("echo")
    hear(process)
    pidfd = os.dup(process.pidfd)
    process.close()
    process.close()  # once is enough
    assert select.select([pidfd], [], [], 60)[0]
    os.close(pidfd)


def test_the_death_of_the_fork_server_hurts_no_process_and_no_request(
    start: Start, tmp_path: Path, fork_server: subprocess.Popen[bytes]
) -> None:
    before = start("echo")
    hear(before)
    fork_server.kill()
    fork_server.wait(60)
    before.channel.send(Say("still there?"))
    assert hear(before).text == "still there?"
    # The next one is started, and only afterwards is ready; a request waits for it.
    with subprocess.Popen(argv("fork-server", tmp_path)) as second:
        after = start("echo", "from the second")
        assert hear(after).text == "from the second"
        before.signal(signal.SIGKILL)
        assert wait_for(before) == -signal.SIGKILL
        second.terminate()


def test_the_fork_server_is_killed_again_and_again_while_processes_are_started(
    start: Start, tmp_path: Path, fork_server: subprocess.Popen[bytes]
) -> None:
    # Each has so much time of its own, and not of the clock: on a machine with much to do it could serve nobody in that.
    killer = (
        "import subprocess, sys, time\n"
        "from pathlib import Path\n"
        "from supervisor.lockfile import sign_of\n"
        "while True:\n"
        "    server = subprocess.Popen(sys.argv[2:])\n"
        "    while server.poll() is None and ((sign := sign_of(Path(sys.argv[1]))).pid != server.pid or not sign.beats):\n"
        "        time.sleep(0.01)\n"
        "    clock = ~server.pid << 3 | 2  # as clock_getcpuclockid(3) makes it\n"
        "    end_s = server.poll() is None and time.clock_gettime(clock) + 0.02\n"
        "    while server.poll() is None and time.clock_gettime(clock) < end_s:\n"
        "        time.sleep(0.001)\n"
        "    server.kill()\n"
        "    print(server.wait(), flush=True)\n"
    )
    lock = str(tmp_path / "forkserver.lock")
    fork_server.kill()
    fork_server.wait(60)
    with open(tmp_path / "killed", "wb") as killed:
        again = subprocess.Popen(
            [sys.executable, "-c", killer, lock, *argv("fork-server", tmp_path)], stdout=killed, start_new_session=True
        )
    try:
        number, deadline = 0, time.monotonic() + 60
        while number < 20 or (tmp_path / "killed").read_text().count("-9\n") < 3:
            assert time.monotonic() < deadline
            process = start("echo", str(number))
            assert hear(process).text == str(number)
            process.close()
            number += 1
    finally:
        os.killpg(again.pid, signal.SIGKILL)
        again.wait()


def test_a_fork_server_that_is_missing_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(IsolationError, match="no fork server listens on"):
        Isolation(str(tmp_path / "none")).start("a", f"{ENTRIES}:echo", Say(""), FROM_CHILD, timeout_s=0.05)


def test_a_fork_server_that_is_stopped_is_said_so(isolation: Isolation, fork_server: subprocess.Popen[bytes]) -> None:
    isolation.start("a", f"{ENTRIES}:write", Say(""), FROM_CHILD, [1]).close()
    fork_server.send_signal(signal.SIGSTOP)
    with pytest.raises(IsolationError, match="a: the fork server does not answer within 0.05 s"):
        isolation.start("a", f"{ENTRIES}:echo", Say(""), FROM_CHILD, timeout_s=0.05)
    fork_server.send_signal(signal.SIGCONT)  # it forks the process now, which finds its channel closed and ends


@pytest.mark.parametrize("entry", ["os:system", "", "tests", ":", "subprocess.tests:run"])
def test_an_entry_of_another_package_is_refused(isolation: Isolation, entry: str) -> None:
    with pytest.raises(IsolationError, match="is no entry"):
        isolation.start("a", entry, Say("echo oh dear"), FROM_CHILD)


def test_an_entry_that_does_not_exist_is_a_process_that_ends_with_1(isolation: Isolation) -> None:
    process = isolation.start("a", f"{ENTRIES}:nothing", Say(""), FROM_CHILD)
    assert wait_for(process) == 1
    process.close()


def test_arguments_over_the_bound_are_refused_before_they_are_sent(isolation: Isolation) -> None:
    with pytest.raises(IsolationError, match="at most 131072 are allowed"):
        isolation.start("a", f"{ENTRIES}:echo", Say("x" * (1 << 17)), FROM_CHILD)
    process = isolation.start("a", f"{ENTRIES}:echo", Say("x" * (100 << 10)), FROM_CHILD)
    process.close()


def test_a_process_of_a_hundred_starts_is_as_small_as_the_first(start: Start) -> None:
    """Nothing of the processes that were started before stays in the fork server, from which the next one is forked."""

    def opened_by(process: Process) -> int:
        assert isinstance(process.channel, Channel)
        return len(hear(process).descriptors)

    first = opened_by(start("echo"))
    for _ in range(30):
        process = start("echo")
        hear(process)
        process.signal(signal.SIGKILL)
        wait_for(process)
        process.close()
    assert opened_by(start("echo")) == first


def test_a_stopped_process_of_a_dead_parent_is_ended_by_the_parents_successor(
    tmp_path: Path, fork_server: subprocess.Popen[bytes]
) -> None:
    """One that hangs does not see that its channel is closed."""
    locks = tmp_path / "locks"
    locks.mkdir()
    isolation = Isolation(str(tmp_path / "forkserver.sock"), locks)
    processes = [isolation.start("echo", f"{ENTRIES}:echo", Say("hello"), FROM_CHILD) for _ in range(3)]
    for process in processes:
        hear(process)
    stopped, dead, ended = processes
    stopped.signal(signal.SIGSTOP)
    dead.signal(signal.SIGKILL)
    wait_for(dead)
    ended.signal(signal.SIGKILL)
    wait_for(ended)
    ended.close()
    assert len(list(locks.iterdir())) == 2  # who was looked after to its end leaves none
    assert Isolation(str(tmp_path / "forkserver.sock"), locks).end_orphans() == []
    assert wait_for(stopped) == -signal.SIGKILL
    assert list(locks.iterdir()) == []
    for process in (stopped, dead):
        process.close()
