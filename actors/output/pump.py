"""Emptying a task's pipes in place of a killed conmon."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from actors.output.follower import GAPS, SPILLS

SPLICE_BYTES: Final = 1 << 20
CONMON_BYTES: Final = 8192  # STDIO_BUF_SIZE: what conmon holds at most between its read and its write
REASON: Final = "conmon was killed; what it had read and not yet written is missing"


class Pump:
    """One pipe.  `reader` is this object's.  `failing`: the last move failed."""

    def __init__(self, directory: Path, stream: str, reader: int) -> None:
        self.reader = reader
        self.failing = False
        self._directory = directory
        self._path = directory / SPILLS[stream]
        self._spill: int | None = None

    def move(self) -> bool:
        """Move some of what is in the pipe → False once nobody can write to it any more and all is moved, durably.

        Raises OSError when there is no room, or whatever else; it is still in the pipe then, and the call can be repeated.
        """
        if self._spill is None:
            record_gap(self._directory)
            self._spill = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        size_bytes = os.fstat(self._spill).st_size
        try:
            # One system call takes and writes: killed before or after it, nothing is lost and nothing doubled.  Not repeated here,
            # for a task may write faster than it is read.
            moved = os.splice(self.reader, self._spill, SPLICE_BYTES, offset_dst=size_bytes, flags=os.SPLICE_F_NONBLOCK)
        except BlockingIOError:
            return True
        if moved == 0:
            os.fsync(self._spill)
            sync_directory(self._directory)
        return moved > 0

    def close(self) -> None:
        if self._spill is not None:
            os.close(self._spill)
        os.close(self.reader)


def record_gap(directory: Path) -> None:
    """Write that output may be missing: once, though a pump may be started again, and whole or not at all.  Raises OSError."""
    if (directory / GAPS).exists():
        return
    record = {"time": datetime.now(UTC).isoformat(), "reason": REASON, "bytes_max": CONMON_BYTES}
    new = directory / f"{GAPS}.new"
    with open(new, "wb") as file:
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.rename(new, directory / GAPS)


def sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
