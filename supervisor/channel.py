"""A channel between two processes of the daemon: messages and descriptors over one SOCK_SEQPACKET socket.

Each packet is one message (`frames`), so a reader never sees half of one; descriptors travel with the message that names
them (SCM_RIGHTS) and arrive close-on-exec.  Every receive has a time-out or is said to have none.
"""

from __future__ import annotations

import os
import select
import socket
import time
from array import array
from collections.abc import Sequence
from typing import Any

from supervisor.frames import Codec, FrameError, Message

DESCRIPTORS_MAX = 64  # in one message; the kernel's own bound is 253
RIGHTS_BYTES = socket.CMSG_SPACE(DESCRIPTORS_MAX * array("i").itemsize)


class ChannelClosed(Exception):
    """The other end is gone; nothing more will arrive and nothing sent is read."""


class ChannelTimeout(Exception):
    """Nothing arrived, or nothing could be sent, within the time given."""


class Channel:
    """One end of a channel.  It owns the socket; `close` closes it."""

    def __init__(self, end: socket.socket, codec: Codec) -> None:
        self.socket = end
        self.codec = codec

    @classmethod
    def pair(cls, ours: Codec) -> tuple[Channel, socket.socket]:
        """A new channel: our end, and the socket to give to the other process."""
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(here, ours), there

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, message: Message, descriptors: Sequence[int] = (), timeout_s: float | None = 5.0) -> None:
        """Send one message.  Raises ChannelClosed, ChannelTimeout (0 means: do not wait), FrameError (over the bound)."""
        body = self.codec.encode(message)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            try:
                # sendmsg and recvmsg: socket.send_fds and recv_fds drop their flags (CPython 3.11).
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))] if descriptors else []
                self.socket.sendmsg([body], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                return
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline)
            except ConnectionError:
                raise ChannelClosed from None

    def receive(self, timeout_s: float | None = 5.0) -> tuple[Any, list[int]]:
        """The next message and the descriptors that came with it, which are now the caller's to close.

        `timeout_s`: None waits for ever, 0 does not wait.  Raises ChannelClosed, ChannelTimeout, FrameError.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            try:
                flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
                body, ancillary, got, _ = self.socket.recvmsg(self.codec.size_bytes_max + 1, RIGHTS_BYTES, flags)
                break
            except BlockingIOError:
                self._wait(select.POLLIN, deadline)
            except ConnectionError:
                raise ChannelClosed from None
        descriptors = array("i")
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
        try:
            if not body:
                raise ChannelClosed
            if got & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
                raise FrameError("a message with more bytes or descriptors than are allowed")
            return self.codec.decode(body), list(descriptors)
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise

    def readable(self) -> bool:
        """Whether `receive` would not wait."""
        waiting = select.poll()
        waiting.register(self.socket, select.POLLIN)
        return bool(waiting.poll(0))

    def _wait(self, events: int, deadline: float | None) -> None:
        # poll(2) and MSG_DONTWAIT, never settimeout(): O_NONBLOCK would be shared with whoever else holds this socket
        # (the keeper's copy), and the time-out with every other thread that uses this object.
        left_s = None if deadline is None else deadline - time.monotonic()
        if left_s is not None and left_s <= 0:
            raise ChannelTimeout("the other end did not take or send a message in time")
        waiting = select.poll()
        waiting.register(self.socket, events)
        waiting.poll(None if left_s is None else max(1, int(left_s * 1000)))

    def close(self) -> None:
        self.socket.close()
