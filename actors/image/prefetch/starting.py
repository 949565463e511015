"""The process "image prefetcher", as it reads what a program needs at its start, while the container of its task is being made.

Else ld.so asks for one library after the other, each a round trip to the registry or more.  It reads as tasks do, through an overlay of the
image's layers (mounted nowhere, so it ends with this process), and what it reads is fetched once for both.  Not in the image's own server,
which would wait for itself.
"""

from __future__ import annotations

import os
import signal
import socket
import stat
from collections.abc import Iterator
from contextlib import ExitStack, closing

from actors.image.prefetch.program import parse
from actors.image.wire import ReadProgram
from actors.lazytree.mounts import open_overlay
from actors.lazytree.server import drop_privileges
from supervisor.frames import Codec

TIME_MAX_S = 60  # then the kernel ends it (SIGALRM)
FILES_MAX = 64  # of one program, and
PLACES_MAX = 16  # where each is looked for: what an image says is not to cost more than it can gain
FILE_BYTES_MAX = 8 << 20  # of a larger one not nearly all is read
ASK_BYTES = 128 << 10  # at once: the kernel does no more than a window of each posix_fadvise(2)


def read_program(end: socket.socket, descriptors: list[int], arguments: bytes) -> None:
    """Do the `ReadProgram` in `arguments`."""
    order: ReadProgram = Codec(ReadProgram).decode(arguments)
    with closing(end):
        signal.alarm(TIME_MAX_S)
        root = open_overlay([order.lower], order.data)
        os.fchdir(root)
        os.chroot(".")
        os.close(root)
        drop_privileges(order.uid, order.gid)
        ask_for(order.name, order.path)


def ask_for(name: str, path: str) -> list[str]:
    """Have the kernel read the program, its interpreter and all their libraries → their paths.

    What is not there, or not to be read, is passed over.
    """
    first = [name] if name.startswith("/") else [f"{place}/{name}" for place in path.split(":") if place and "/" not in name]
    asked: dict[tuple[int, int], str] = {}  # by device and inode
    wanted = [first]  # of each file: where it may be, the likeliest place first
    while wanted and len(asked) < FILES_MAX:
        with ExitStack() as stack:
            files = []
            # All that is known by name is asked for, before any of it is waited for.
            for places in wanted[: FILES_MAX - len(asked)]:
                for place in places[:PLACES_MAX]:
                    try:
                        file = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
                    except (OSError, ValueError):
                        continue
                    stack.callback(os.close, file)
                    status = os.fstat(file)
                    if stat.S_ISREG(status.st_mode) and (status.st_dev, status.st_ino) not in asked:
                        asked[status.st_dev, status.st_ino] = place
                        files.append((file, place))
                        _ask(file, status.st_size)
                    break
            wanted = [places for file, place in files for places in _needs(file, place)]
    return list(asked.values())


def _ask(file: int, size_bytes: int) -> None:
    if size_bytes <= FILE_BYTES_MAX:
        for offset in range(0, size_bytes, ASK_BYTES):
            os.posix_fadvise(file, offset, ASK_BYTES, os.POSIX_FADV_WILLNEED)


def _needs(file: int, place: str) -> Iterator[list[str]]:
    """For each file that this one needs, where it may be."""

    def read(offset: int, size: int) -> bytes:
        try:
            return os.pread(file, size, offset)
        except (OSError, OverflowError):
            return b""

    program = parse(read, os.path.realpath(place))
    if program.interpreter.startswith("/"):
        yield [program.interpreter]
    for name in program.needed:
        yield [name] if name.startswith("/") else [f"{directory}/{name}" for directory in program.directories]
