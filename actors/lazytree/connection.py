"""A FUSE connection found again when all who held it are dead but its server.

Keeper and root supervisor hold each connection and the kernel's INIT request.  Were both killed at once, the server still has the
connection: where to look for it is written down beside the tree.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import msgspec

from supervisor.isolation import Process
from supervisor.pidfd import copy_descriptor, is_same, open_pidfd, signal_process, start_time

NAME = "server"  # the file, in the tree's directory


class _Written(msgspec.Struct, frozen=True):
    pid: int
    started: int  # clock ticks since boot: with the pid, a process for good
    init_request: bytes


def write_down(directory: Path, server: Process, init_request: bytes) -> None:
    """Note who serves the tree in `directory`."""
    try:
        written = _Written(server.pid, start_time(server.pid), init_request)
    except ProcessLookupError:
        return  # it has ended already, and another one is started
    unnamed = directory / f".{NAME}"
    unnamed.write_bytes(msgspec.msgpack.encode(written))
    unnamed.rename(directory / NAME)


def collect(directory: Path) -> tuple[int, bytes] | None:
    """The connection, copied from its living server, and its INIT request; None when that has ended.

    The server is killed then: nobody hears it any more, so nobody would notice that it hangs, and another one costs readers nothing.
    """
    try:
        written = msgspec.msgpack.decode((directory / NAME).read_bytes(), type=_Written)
        pidfd = open_pidfd(written.pid)
    except (FileNotFoundError, ProcessLookupError, msgspec.MsgspecError):
        return None
    try:
        if not is_same(written.pid, written.started):
            return None
        for number in os.listdir(f"/proc/{written.pid}/fd"):
            if os.readlink(f"/proc/{written.pid}/fd/{number}") == "/dev/fuse":
                connection = copy_descriptor(pidfd, int(number))
                signal_process(pidfd, signal.SIGKILL)
                return connection, written.init_request
    except (FileNotFoundError, ProcessLookupError):
        pass  # it has ended while it was looked at
    finally:
        os.close(pidfd)
    return None
