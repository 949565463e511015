"""The gate behind which a created container's first process waits, opened as the runtime's own `start` opens it.

Without executing the runtime, which takes 4 ms (crun) or 20 (runc), and might itself be killed half way: runc's, between the two
steps of its gate, would take the first process with it.

    crun    the first process reads a byte from the FIFO; `start` writes it (crun: status.c)
    runc    the first process writes a byte to the FIFO; `start` reads it (runc: libcontainer/standard_init_linux.go)

Both runtimes take a container whose FIFO is still there for one that was only created, so it is removed last: a daemon that dies
in between finds it, and nobody waiting behind it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from actors.sandbox.runtimes import CreateError
from supervisor.pidfd import has_ended, is_asleep, is_stopped, open_pidfd, signal_process

RUNTIMES: Final = ("crun", "runc")
NAME: Final = "exec.fifo"  # in the runtime's directory for the container
Hold = Callable[[int], None]

STOP_LOOK_S: Final = 0.0005
LOOK_S: Final = 0.05  # between two looks whether anybody waits behind runc's gate


def open_gate(runtime: str, path: Path, pid_file: Path, timeout_s: float, hold: Hold) -> bool:
    """Let the first process of a container go, whose pid `pid_file` holds; one that does not wait any more is left as it is.

    `hold`: has another process hold a copy of a descriptor as well, before it returns.  False: this runtime has no such gate, or not
    this version of it.  Raises CreateError.
    """
    if runtime not in RUNTIMES or not path.exists():
        return False
    try:
        first = open_pidfd(int(pid_file.read_text()))
        try:
            if runtime == "crun":
                _write(path, first, pid_file, time.monotonic() + timeout_s)
            else:
                _read(path, first, pid_file, time.monotonic() + timeout_s, hold)
        finally:
            os.close(first)
    except ProcessLookupError:
        pass  # it has ended, which its pidfd tells
    except OSError as error:
        raise CreateError("other", f"the container's gate cannot be opened: {error}") from None
    path.unlink(missing_ok=True)
    return True


def is_gone(runtime: str, path: Path) -> bool:
    """Whether the gate of a container that was created has been opened; False also for a runtime that has none."""
    return runtime in RUNTIMES and path.parent.is_dir() and not path.exists()


def _write(path: Path, first: int, pid_file: Path, deadline: float) -> None:
    # Whoever opened the FIFO and was killed before he wrote has left the first process spinning, for the end of file is none to it.  It
    # ends when it comes to read from a FIFO that has a writer again, and no byte yet.  So it is stopped, and finds the byte.
    spins = not is_asleep(first) and waits(pid_file)
    try:
        if not spins or _stop(first, deadline):
            _write_byte(path)
    finally:
        if spins:
            signal_process(first, signal.SIGCONT)


def _write_byte(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return  # nobody waits: it was started, or has ended
    try:
        os.write(descriptor, b"\0")
    except BrokenPipeError:
        pass  # it has ended just now
    finally:
        os.close(descriptor)


def _read(path: Path, first: int, pid_file: Path, deadline: float, hold: Hold) -> None:
    # To open the FIFO is to let the first process go on to its write(2), which ends it when there is no reader any more.  So it is
    # stopped before, and goes on only when two processes hold the reading end: whoever is killed in between, the task is not.
    # (Met under load, where the first process takes milliseconds to wake up.)
    try:
        if not waits(pid_file) or not _stop(first, deadline):
            return
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            hold(descriptor)
            signal_process(first, signal.SIGCONT)
            waiting = select.poll()
            waiting.register(descriptor, select.POLLIN)
            while not waiting.poll(LOOK_S * 1000):
                if not waits(pid_file):
                    return
                if time.monotonic() > deadline:
                    raise TimeoutError(errno.ETIMEDOUT, "its first process does not write to it")
            os.read(descriptor, 1)
        finally:
            os.close(descriptor)
    finally:
        signal_process(first, signal.SIGCONT)  # whatever went wrong, it does not stay stopped


def _stop(pidfd: int, deadline: float) -> bool:
    """Stop a process → whether it has; False when it has ended."""
    signal_process(pidfd, signal.SIGSTOP)
    while not is_stopped(pidfd):
        if has_ended(pidfd):
            return False
        if time.monotonic() > deadline:
            raise TimeoutError(errno.ETIMEDOUT, "its first process does not stop")
        time.sleep(STOP_LOOK_S)  # only a parent is told
    return True


def waits(pid_file: Path) -> bool:
    """Whether a container's first process is still the runtime's: it holds the FIFO, close-on-exec."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        descriptors = Path(f"/proc/{int(pid_file.read_text())}/fd")
        for number in os.listdir(descriptors):
            with contextlib.suppress(FileNotFoundError, PermissionError):  # closed since it was listed, or just being reaped
                if os.readlink(descriptors / number).endswith(f"/{NAME}"):
                    return True
    return False
