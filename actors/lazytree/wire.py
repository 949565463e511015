"""What the parent of a LAZY server and the server say to each other.  No FUSE in here: the root supervisor imports it."""

from __future__ import annotations

from supervisor.frames import Message


class ServeTree(Message, frozen=True):
    """The arguments of a server: what to serve, on a FUSE connection whose descriptor comes with them.

    `table`: path of the object table.  `store`: where the tree's Source finds content (for a workspace the store's directory), and
    `aside` where in it the versions lie that a sync put aside.
    `init_request`: the kernel's INIT, as `mounts.mount_fuse` returned it.  `replacement`: an earlier server of this connection has
    lived, and is certainly dead.  `read_timeout_s`: how long a read waits for content before it ends in EIO.  `uid`, `gid`: whom
    the server becomes when it has opened what it needs.
    """

    table: str
    store: str
    init_request: bytes
    replacement: bool = False
    read_timeout_s: float = 30.0
    uid: int = 1000
    gid: int = 1000
    aside: str = ""


class Ready(Message, frozen=True):
    """The server answers requests."""


class Progress(Message, frozen=True):
    """Heartbeat of the server's event loop, every second: requests answered so far, and requests that wait for an answer now."""

    answered: int
    waiting: int


class ReadFailed(Message, frozen=True):
    """Reads of the object `key` ended in EIO.  It is said before the reader has its EIO; each reason of an object once for a workspace,
    and for an image, whose tasks come and go, again when it comes again.
    """

    key: str
    reason: str
