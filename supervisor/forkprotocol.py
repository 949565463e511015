"""What is said to the fork server, on a SOCK_SEQPACKET Unix socket: `Fork` → `Forked` or `ForkFailed`."""

from __future__ import annotations

from supervisor.frames import Codec, Message


class Fork(Message, frozen=True):
    """Start a process.  Its channel end is the first descriptor of this message, its own descriptors follow.

    `lock`: path of a lock that it takes before its entry runs, ending who holds it (`lockfile.take_place`); "" for none.
    """

    name: str
    entry: str
    arguments: bytes
    lock: str = ""


class Forked(Message, frozen=True):
    """The process runs; its pidfd came with this message."""

    pid: int


class ForkFailed(Message, frozen=True):
    error: str


SIZE_BYTES_MAX = 128 << 10

REQUESTS = Codec(Fork, size_bytes_max=SIZE_BYTES_MAX)
ANSWERS = Codec(Forked, ForkFailed, size_bytes_max=SIZE_BYTES_MAX)
