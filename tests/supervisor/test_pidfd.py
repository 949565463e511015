"""What is asked of the kernel about processes, with real ones."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from supervisor import pidfd


@contextmanager
def shell(script: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A shell that runs `script` once its standard input is closed."""
    process = subprocess.Popen(["/bin/sh", "-c", f"read go; {script}"], stdin=subprocess.PIPE)
    descriptor = pidfd.open_pidfd(process.pid)
    try:
        yield process, descriptor
    finally:
        os.close(descriptor)
        process.kill()
        process.wait()
        assert process.stdin is not None
        process.stdin.close()


def let_end(process: subprocess.Popen[bytes], descriptor: int) -> None:
    assert process.stdin is not None
    process.stdin.close()
    assert select.select([descriptor], [], [], 60)[0]


@pytest.mark.parametrize(
    ("script", "code"),
    [("exit 0", 0), ("exit 139", 139), ("kill -SEGV $$", -signal.SIGSEGV), ("kill -KILL $$", -signal.SIGKILL)],
)
def test_status_of_a_running_a_zombie_and_a_reaped_process(script: str, code: int) -> None:
    with shell(script) as (process, descriptor):
        assert pidfd.wait_status(descriptor) is None
        let_end(process, descriptor)
        zombie = pidfd.wait_status(descriptor)
        process.wait()
        reaped = pidfd.wait_status(descriptor)
    assert zombie is not None
    assert os.waitstatus_to_exitcode(zombie) == code
    if reaped is None:
        assert os.uname().release.split(".")[:2] < ["6", "15"]
    else:
        assert reaped == zombie


def test_a_process_that_another_reaps() -> None:
    script = "import subprocess, sys; subprocess.run(['/bin/sh', '-c', 'echo $$; read go; exit 7'])"
    parent = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdin is not None and parent.stdout is not None
    descriptor = pidfd.open_pidfd(int(parent.stdout.readline()))
    parent.communicate(b"go\n", timeout=60)
    assert os.waitstatus_to_exitcode(pidfd.wait_status(descriptor) or 0) == 7
    os.close(descriptor)


def test_a_first_thread_that_has_ended_is_not_the_end() -> None:
    # ends its first thread by the system call itself; the second one goes on until its standard input is closed
    script = (
        "import ctypes, os, sys, threading\n"
        "def last():\n"
        "    print('there', flush=True); os.read(0, 1); os._exit(5)\n"
        "threading.Thread(target=last).start()\n"
        f"ctypes.CDLL(None).syscall({60 if os.uname().machine == 'x86_64' else 93}, 3)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    descriptor = pidfd.open_pidfd(process.pid)
    process.stdout.readline()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline  # nothing tells of the end of a thread; its system call is what it does next
    assert pidfd.wait_status(descriptor) is None
    process.stdin.close()
    assert select.select([descriptor], [], [], 60)[0]
    assert os.waitstatus_to_exitcode(pidfd.wait_status(descriptor) or 0) == 5
    process.wait()
    process.stdout.close()
    os.close(descriptor)


def test_a_descriptor_that_is_none() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        pidfd.wait_status(9999)


def test_descriptors_of_another_process_are_copied() -> None:
    with shell("exit 0") as (process, descriptor):
        copy = pidfd.copy_descriptor(descriptor, 0)
        assert os.readlink(f"/proc/self/fd/{copy}") == os.readlink(f"/proc/{process.pid}/fd/0")
        assert not os.get_inheritable(copy)
        os.close(copy)
        with pytest.raises(OSError, match="Bad file descriptor"):
            pidfd.copy_descriptor(descriptor, 77)
        let_end(process, descriptor)
        with pytest.raises(ProcessLookupError):
            pidfd.copy_descriptor(descriptor, 0)


def test_start_time_tells_processes_apart() -> None:
    mine = pidfd.start_time(os.getpid())
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    assert 0 < mine / os.sysconf("SC_CLK_TCK") <= uptime_s
    assert pidfd.is_same(os.getpid(), mine)
    assert not pidfd.is_same(os.getpid(), mine + 1)


def test_start_time_of_a_process_with_brackets_in_its_name() -> None:
    comm = Path("/proc/self/comm")
    before, started = comm.read_text(), pidfd.start_time(os.getpid())
    comm.write_text("a) Z 1 (b")
    try:
        assert pidfd.start_time(os.getpid()) == started
    finally:
        comm.write_text(before)


def test_a_process_that_is_gone() -> None:
    with shell("exit 0") as (process, descriptor):
        started = pidfd.start_time(process.pid)
        let_end(process, descriptor)
        assert pidfd.is_same(process.pid, started)  # a zombie
        process.wait()
        assert not pidfd.is_same(process.pid, started)
        assert not pidfd.signal_process(descriptor, signal.SIGTERM)
        with pytest.raises(ProcessLookupError):
            pidfd.start_time(process.pid)
        with pytest.raises(ProcessLookupError):
            pidfd.open_pidfd(process.pid)


def test_signals_arrive() -> None:
    with shell("sleep 60") as (process, descriptor):
        assert pidfd.signal_process(descriptor, signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM


def test_a_subreaper_inherits_orphans() -> None:
    script = (
        "import os, subprocess; from supervisor.pidfd import set_child_subreaper\n"
        "set_child_subreaper()\n"
        "subprocess.run(['/bin/sh', '-c', 'sh -c \"exit 9\" &'])\n"
        "print(os.waitstatus_to_exitcode(os.wait()[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("9\n", "")


def test_a_stopped_process() -> None:
    with shell("exit 0") as (process, descriptor):
        assert not pidfd.is_stopped(descriptor)
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        assert pidfd.is_stopped(descriptor)
        process.send_signal(signal.SIGCONT)
        os.waitid(os.P_PID, process.pid, os.WCONTINUED)
        assert not pidfd.is_stopped(descriptor)
        let_end(process, descriptor)
        assert not pidfd.is_stopped(descriptor)
        process.wait()
        assert not pidfd.is_stopped(descriptor)
