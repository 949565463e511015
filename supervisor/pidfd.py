"""What the kernel knows of a process, asked through a descriptor that stays that process's even when its pid is used again.

Wait with poll(2) on a pidfd (readable = the whole process has ended, whoever its parent is), then ask `wait_status`.  A pid that
was written down is believed again only together with the start time that was written down beside it.

Formats: struct pidfd_info and the ioctl from include/uapi/linux/pidfd.h (version 0, 64 bytes: u64 mask, u64 cgroupid, eleven u32
ids, s32 exit_code); /proc/PID/stat from proc_pid_stat(5); /proc/PID/fdinfo/N from pidfd_open(2).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import signal
import struct
from typing import Final

_INFO: Final = struct.Struct("<QQ11Ii")
_GET_INFO: Final = 3 << 30 | _INFO.size << 16 | 0xFF << 8 | 11  # _IOWR(0xFF, 11, struct pidfd_info): PIDFD_GET_INFO
_INFO_EXIT: Final = 1 << 3  # PIDFD_INFO_EXIT
_GETFD: Final = 438  # SYS_pidfd_getfd, the same number on every architecture
_SET_CHILD_SUBREAPER: Final = 36  # PR_SET_CHILD_SUBREAPER

# What the ioctl answers where it cannot know: there is none (before 6.13), it has no PIDFD_INFO_EXIT (before 6.15), or the process
# was reaped before the kernel would keep its status for this descriptor.
_NOT_KNOWN: Final = (errno.ENOTTY, errno.EINVAL, errno.ESRCH)

_libc: Final = ctypes.CDLL(None, use_errno=True)


def open_pidfd(pid: int) -> int:
    """A new descriptor, close-on-exec, for process `pid`.  Raises ProcessLookupError when there is none."""
    return os.pidfd_open(pid)


def has_ended(pidfd: int) -> bool:
    """Whether the process has ended, all its threads with it; reaped or not."""
    return wait_ended(pidfd, 0.0)


def wait_ended(pidfd: int, timeout_s: float) -> bool:
    """Wait until the process has ended → False when that takes longer.  Blocks."""
    waiting = select.poll()
    waiting.register(pidfd, select.POLLIN)
    return bool(waiting.poll(timeout_s * 1000))


def wait_status(pidfd: int) -> int | None:
    """The wait status of an ended process, as waitpid(2) gives it, whoever reaped it; None while it runs or when nobody can know.

    Once it was reaped, Linux 6.15 tells; as long as it is a zombie, /proc does, on any kernel.
    """
    status = _reaped_status(pidfd)
    # State Z alone would not do: it is also what the first thread shows when it has ended before the others.
    while status is None and has_ended(pidfd):
        reaped = pid_of(pidfd) is None
        status = _zombie_status(pidfd)
        if status is None:  # it was reaped between the two looks
            status = _reaped_status(pidfd)
        if reaped:
            break
        # Else who reaps it is just at it: no zombie any more (state X), and the kernel keeps its status only in a moment.
    return status


def copy_descriptor(pidfd: int, number: int) -> int:
    """A copy, close-on-exec, of descriptor `number` of another process: pidfd_getfd(2).

    Raises OSError: EBADF when it has no such descriptor, ESRCH when it has ended, EPERM.
    """
    copy: int = _libc.syscall(_GETFD, pidfd, number, 0)
    if copy < 0:
        raise OSError(ctypes.get_errno(), f"pidfd_getfd: {os.strerror(ctypes.get_errno())}")
    return copy


def start_time(pid: int) -> int:
    """When process `pid` started, in clock ticks since boot.  Raises ProcessLookupError when there is none."""
    return int(_stat(pid)[19])


def is_same(pid: int, started: int) -> bool:
    """Whether `pid` is still (a zombie included) the process whose `start_time` was `started`."""
    try:
        return start_time(pid) == started
    except ProcessLookupError:
        return False


def same_process(pidfd: int, other: int) -> bool:
    """Whether two pidfds are of one process: since Linux 6.9 each process has an inode of its own."""
    one, two = os.fstat(pidfd), os.fstat(other)
    return (one.st_dev, one.st_ino) == (two.st_dev, two.st_ino)


def signal_process(pidfd: int, number: int) -> bool:
    """Send a signal; False when the process has ended.  Raises PermissionError."""
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return False
    return True


def is_stopped(pidfd: int) -> bool:
    """Whether somebody has stopped the process (SIGSTOP, a debugger): it runs no further until it is told to go on.

    Only a parent is told of that, so who is none must look.
    """
    return _state(pidfd) in ("T", "t")


def is_asleep(pidfd: int) -> bool:
    """Whether the process waits for something, in its first thread."""
    return _state(pidfd) == "S"


def waits_for_disk(pidfd: int) -> bool:
    """Whether a thread of the process waits for what no signal interrupts: a disk, most likely."""
    pid = pid_of(pidfd)
    try:
        found = pid is not None and any(_stat(f"{pid}/task/{thread}")[0] == "D" for thread in os.listdir(f"/proc/{pid}/task"))
    except (FileNotFoundError, ProcessLookupError):
        return False  # it, or one of its threads, has just ended
    return found and pid_of(pidfd) == pid


def set_child_subreaper() -> None:
    """Orphans below this process become its children from now on, and it must reap them: prctl(2)."""
    if _libc.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _reaped_status(pidfd: int) -> int | None:
    answer = bytearray(_INFO.pack(_INFO_EXIT, *[0] * 13))
    try:
        fcntl.ioctl(pidfd, _GET_INFO, answer)
    except OSError as error:
        if error.errno in _NOT_KNOWN:
            return None
        raise
    mask, *_, exit_code = _INFO.unpack(answer)
    return int(exit_code) if mask & _INFO_EXIT else None


def _zombie_status(pidfd: int) -> int | None:
    pid = pid_of(pidfd)
    if pid is None:
        return None
    try:
        fields = _stat(pid)
    except ProcessLookupError:
        return None
    # Still there after the look at its number: what was looked at was it, and no later process of that number.
    return int(fields[49]) if fields[0] == "Z" and pid_of(pidfd) == pid else None


def _state(pidfd: int) -> str | None:
    """The state that /proc names; None when the process has been reaped."""
    pid = pid_of(pidfd)
    try:
        state = None if pid is None else _stat(pid)[0]
    except ProcessLookupError:
        return None
    return state if pid_of(pidfd) == pid else None


def pid_of(pidfd: int) -> int | None:
    """The process's number, or None when it has been reaped."""
    # Asked often, so without the calls that open() makes besides; a pidfd's text is far shorter than this.
    file = os.open(f"/proc/self/fdinfo/{pidfd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = os.read(file, 4096)
    finally:
        os.close(file)
    pid = next(int(line.split()[1]) for line in text.splitlines() if line.startswith(b"Pid:"))
    return pid if pid > 0 else None


def _stat(pid: int | str) -> list[str]:
    """/proc/PID/stat from its third field on; the second, in brackets, may hold anything, brackets and spaces included."""
    try:
        with open(f"/proc/{pid}/stat", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except FileNotFoundError:
        raise ProcessLookupError(errno.ESRCH, f"no process {pid}") from None
