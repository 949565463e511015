"""A FUSE connection found again when all who held it are dead but its server.

Keeper and root supervisor hold each connection and the kernel's INIT request.  Were both killed at once, the server still has the
connection.  Who that is its lock says (`supervisor.lockfile`), and the INIT request lies beside it.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from supervisor.lockfile import holder_of
from supervisor.pidfd import copy_descriptor, open_pidfd


def write_init_request(lock: Path, init_request: bytes) -> None:
    """Note the INIT request of the connection whose servers hold `lock`."""
    path = _beside(lock)
    unnamed = path.with_name(f".{path.name}")
    unnamed.write_bytes(init_request)
    unnamed.rename(path)


def collect(lock: Path) -> tuple[int, bytes] | None:
    """The connection, copied from its living server, and its INIT request; None when that has ended.

    The server is nobody's then: nobody would notice that it hangs.  The next one, which costs readers nothing, ends it.
    """
    try:
        init_request = _beside(lock).read_bytes()
        pid = holder_of(lock)
        if not pid:
            return None
        pidfd = open_pidfd(pid)
    except (FileNotFoundError, ProcessLookupError):
        return None
    try:
        for number in os.listdir(f"/proc/{pid}/fd"):
            # It has closed that one since they were listed, or is being reaped.
            with contextlib.suppress(FileNotFoundError, PermissionError):
                # Still the holder after its pidfd was opened: so that is what the pidfd is of, and not who got its pid next.
                if os.readlink(f"/proc/{pid}/fd/{number}") == "/dev/fuse" and holder_of(lock) == pid:
                    return copy_descriptor(pidfd, int(number)), init_request
    except (FileNotFoundError, ProcessLookupError):
        pass  # it has ended while it was looked at
    finally:
        os.close(pidfd)
    return None


def remove(lock: Path) -> None:
    """The connection is gone: so are its lock and INIT request."""
    for path in (lock, _beside(lock)):
        path.unlink(missing_ok=True)


def _beside(lock: Path) -> Path:
    return lock.with_suffix(".init")
