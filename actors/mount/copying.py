"""Copying files that somebody may still be writing to, holes and all."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import time

ATTEMPTS = 3
PIECE_BYTES = 1 << 20

_CLOCK_REALTIME_COARSE = 5  # <linux/time.h>; the time module has no name for it

_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
_WRITE, _WRITE_AND_WAIT = 2, 7
_NO_COPY = frozenset((errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL))


class FileChanged(Exception):
    """The file does not hold still, or is not one whose content is in it."""


def copy_settled(source: int, target: int, writers: bool = False) -> os.stat_result:
    """Copy an open file into an empty one; the copy is what the file was at some moment.

    Returned is the status of the source at that moment, or before: who finds it again has every byte.  Where the file was written to
    while this waited for the disk, it is that of before, for a page may be mapped and writable since, and be written to later without
    the inode's times moving.

    `writers`: somebody may go on writing to it, and whoever has the status must see by it that they did.  Holes stay holes, and the
    copy is on its way to the disk (a later fsync has less to wait for).  Raises FileChanged, OSError.
    """
    for _ in range(ATTEMPTS):
        earlier = os.fstat(source)
        if writers:
            _wait_until_past(earlier.st_ctime_ns)
        # A page that is mapped, dirty and writable is written to without the inode's times moving.  Written back it is
        # write-protected again, and the next write to it moves them.  fsync(2) does that too, and waits for the disk besides.
        _write_back(source, _WRITE_AND_WAIT)
        before = os.fstat(source)
        if not stat.S_ISREG(before.st_mode) or "trusted.overlay.metacopy" in os.listxattr(source):
            raise FileChanged
        if writers:
            _wait_until_past(before.st_ctime_ns)
        os.ftruncate(target, 0)
        os.ftruncate(target, before.st_size)
        complete = _copy_data(source, target, before.st_size)
        after = os.fstat(source)
        if complete and (before.st_size, before.st_mtime_ns, before.st_ctime_ns) == (
            after.st_size,
            after.st_mtime_ns,
            after.st_ctime_ns,
        ):
            _write_back(target, _WRITE)
            return earlier
    raise FileChanged


def _wait_until_past(ctime_ns: int) -> None:
    """Wait until a write would give the file another change time than this.

    Before Linux 6.13 times are those of the last tick of a clock: a write that comes in the same tick as the one before, and after the
    copy, could not be told by them.
    """
    tick_s = time.clock_getres(_CLOCK_REALTIME_COARSE)
    # Ticks may be late, on a machine whose processors are taken from it.  Were the time from the future (a clock set back), waiting
    # would be in vain.
    while time.clock_gettime_ns(_CLOCK_REALTIME_COARSE) <= ctime_ns <= time.time_ns():
        time.sleep(tick_s)


def equal(one: int, other: int) -> bool:
    """Whether two open files have the same bytes."""
    place = 0
    while True:
        piece = os.pread(one, PIECE_BYTES, place)
        if piece != os.pread(other, PIECE_BYTES, place):
            return False
        if not piece:
            return True
        place += len(piece)


def _write_back(file: int, flags: int) -> None:
    if _libc.sync_file_range(file, 0, 0, flags):
        raise OSError(ctypes.get_errno(), f"sync_file_range: {os.strerror(ctypes.get_errno())}")


def _copy_data(source: int, target: int, size: int) -> bool:
    """Copy what is not a hole of the first `size` bytes; False when the file became shorter."""
    place = 0
    while place < size:
        try:
            place = os.lseek(source, place, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # nothing but a hole is left
                raise
            return True
        end = min(os.lseek(source, place, os.SEEK_HOLE), size)
        while place < end:
            copied = _copy_range(source, target, place, end - place)
            if not copied:
                return False
            place += copied
    return True


def _copy_range(source: int, target: int, place: int, length: int) -> int:
    try:
        return os.copy_file_range(source, target, min(length, 64 * PIECE_BYTES), place, place)
    except OSError as error:
        if error.errno not in _NO_COPY:
            raise
    # Between two file systems.
    return os.pwrite(target, os.pread(source, min(length, PIECE_BYTES), place), place)
