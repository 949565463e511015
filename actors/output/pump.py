"""Emptying a task's pipes in place of a killed conmon."""

from __future__ import annotations

import errno
import json
import os
from datetime import UTC, datetime
from pathlib import Path

from actors.output.follower import GAPS, SPILLS

SPLICE_BYTES = 1 << 20
CONMON_BYTES = 8192  # STDIO_BUF_SIZE: what conmon holds at most between its read and its write
REASON = "conmon was killed; what it had read and not yet written is missing"


class DiskFull(Exception):
    """There is no room for the spill; nothing was taken from the pipe."""


class Pump:
    """One pipe.  `reader` is this object's."""

    def __init__(self, directory: Path, stream: str, reader: int) -> None:
        self.reader = reader
        os.set_blocking(reader, False)
        self._spill = os.open(directory / SPILLS[stream], os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)

    def move(self) -> bool:
        """Move what is in the pipe → False once nobody can write to it any more and all is moved.  Raises DiskFull."""
        while True:
            try:
                # One system call takes and writes: killed before or after it, nothing is lost and nothing doubled.
                moved = os.splice(self.reader, self._spill, SPLICE_BYTES, offset_dst=os.fstat(self._spill).st_size)
            except BlockingIOError:
                return True
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise DiskFull(error.strerror) from None
            if moved == 0:
                return False

    def close(self) -> None:
        os.fdatasync(self._spill)
        os.close(self._spill)
        os.close(self.reader)


def record_gap(directory: Path) -> None:
    """Write that output may be missing: once, though a pump may be started again."""
    descriptor = os.open(directory / GAPS, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
    try:
        if os.fstat(descriptor).st_size == 0:
            record = {"time": datetime.now(UTC).isoformat(), "reason": REASON, "bytes_max": CONMON_BYTES}
            os.write(descriptor, json.dumps(record).encode() + b"\n")
            os.fdatasync(descriptor)
    finally:
        os.close(descriptor)
