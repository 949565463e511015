"""What the kernel is told on a LAZY mount's connection before there is a server: enough to mount an overlay over it.

Where every object of a tree is in OBJECTS, nobody asks LAZY anything, and a task need not wait for its server to start.  Two
answers are all that mounting takes: INIT, with the same features as libfuse negotiates (each server is fed INIT again and takes
them for its own; a test compares), and STATFS, from which overlayfs has the length of names.  What else is asked stays in the kernel:
the first server has it sent again, as one does that takes the place of a dead one.

Formats: `include/uapi/linux/fuse.h`, 7.31 and later.
"""

from __future__ import annotations

import mmap
import os
import select
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from actors.lazytree.mounts import FUSE_READ_BYTES_MAX

_IN = struct.Struct("<IIQ")  # struct fuse_in_header: length, opcode, unique; more follows
_IN_BYTES = 40
_OUT = struct.Struct("<IiQ")  # struct fuse_out_header: length, error, unique
_INIT_IN = struct.Struct("<IIII")  # struct fuse_init_in: major, minor, max_readahead, flags; more follows
_INIT_OUT = struct.Struct("<IIIIHHIIHH32x")
_STATFS_OUT = struct.Struct("<5Q4I24x")
_STATFS = 17

_MAJOR, _MINOR = 7, 31
# ASYNC_READ, ATOMIC_O_TRUNC, BIG_WRITES, AUTO_INVAL_DATA, DO_READDIRPLUS, ASYNC_DIO, MAX_PAGES, INIT_EXT
_FEATURES = 1 << 0 | 1 << 3 | 1 << 5 | 1 << 12 | 1 << 13 | 1 << 15 | 1 << 22 | 1 << 30
NAME_BYTES_MAX = 255
BLOCK_BYTES = 4096


def init_reply(init_request: bytes) -> bytes:
    """The reply to the kernel's INIT, as libfuse gives it for the server of `server.py`."""
    _, _, unique = _IN.unpack_from(init_request)
    _, _, read_ahead_bytes, offered = _INIT_IN.unpack_from(init_request, _IN_BYTES)
    pages = FUSE_READ_BYTES_MAX // BLOCK_BYTES
    return _reply(
        unique,
        _INIT_OUT.pack(
            _MAJOR, _MINOR, read_ahead_bytes, offered & _FEATURES, 0, 0, FUSE_READ_BYTES_MAX, 1, pages, 0
        ),  # bounds on background requests: the kernel's own; times to the nanosecond
    )


def reply(request: bytes) -> bytes | None:
    """The reply to a request that needs no server; None when a server is to give it."""
    _, opcode, unique = _IN.unpack_from(request)
    if opcode != _STATFS:
        return None
    return _reply(unique, _STATFS_OUT.pack(0, 0, 0, 0, 0, BLOCK_BYTES, NAME_BYTES_MAX, BLOCK_BYTES, 0))


@contextmanager
def answering(connection: int) -> Iterator[None]:
    """Answer on the connection, in a thread, while the block runs.  INIT must have been replied to."""
    ended = os.eventfd(0, os.EFD_CLOEXEC)
    thread = threading.Thread(target=_answer, args=(connection, ended), name="greeting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.eventfd_write(ended, 1)
        thread.join()
        os.close(ended)


def _answer(connection: int, ended: int) -> None:
    waiting = select.poll()
    waiting.register(connection, select.POLLIN)
    waiting.register(ended, select.POLLIN)
    # The kernel wants room for the largest request, of which none is made; memory that nobody touches costs nothing.
    room = mmap.mmap(-1, FUSE_READ_BYTES_MAX + BLOCK_BYTES)
    while all(descriptor != ended for descriptor, _ in waiting.poll()):
        try:
            answer = reply(room[: os.readv(connection, [room])])
            if answer is not None:
                os.write(connection, answer)
        except OSError:
            return  # the connection was aborted, or who asked was interrupted and asks again


def _reply(unique: int, body: bytes) -> bytes:
    return _OUT.pack(_OUT.size + len(body), 0, unique) + body
