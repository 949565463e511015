"""The process "image mount": the LAZY layer of one mounted image."""

from __future__ import annotations

import socket

from actors.image.wire import ServeImage
from supervisor.frames import Codec


def serve(end: socket.socket, descriptors: list[int], arguments: bytes) -> None:
    """Serve a `ServeImage` on its two descriptors, FUSE connection and spool, until the mount is gone.

    Says `Ready`, `Progress`, `ReadFailed` (`lazytree.wire`) and `Completed`; is told `Taken`.
    """
    order: ServeImage = Codec(ServeImage).decode(arguments)
    fuse_descriptor, spool = descriptors
    raise NotImplementedError(f"{order.archive}: images are not served lazily yet ({fuse_descriptor}, {spool})")
