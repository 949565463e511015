"""Copies of files that are being written."""

from __future__ import annotations

import os
import time
from pathlib import Path

from actors.mount.copying import copy_settled

CLOCK_REALTIME_COARSE = 5


def test_a_write_after_the_copy_moves_the_change_time(tmp_path: Path) -> None:
    """Even where times are those of a clock's last tick: the copy begins in a later one than that of the last write."""
    source = os.open(tmp_path / "source", os.O_RDWR | os.O_CREAT)
    for number in range(20):
        os.pwrite(source, b"%d" % number, 0)
        target = os.open(tmp_path / f"target{number}", os.O_RDWR | os.O_CREAT)
        copied = copy_settled(source, target, writers=True)
        assert time.clock_gettime_ns(CLOCK_REALTIME_COARSE) > copied.st_ctime_ns
        os.pwrite(source, b"%d" % (number + 1), 0)
        assert os.fstat(source).st_ctime_ns > copied.st_ctime_ns
        os.close(target)
    os.close(source)
