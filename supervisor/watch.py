"""One thread that waits for processes to end and for channels to speak, and tells; it decides nothing.

epoll over pidfds and channel sockets: an ended process is known within a millisecond, and nothing is polled for.  The
functions given are called in the watcher's thread and must only tell somebody; a second one would not be heard meanwhile.
"""

from __future__ import annotations

import select
import threading
from collections.abc import Callable
from typing import Any

from loguru import logger

from supervisor.channel import Channel, ChannelClosed, ChannelTimeout
from supervisor.frames import FrameError


class Watcher:
    """Watches descriptors from `start` to `stop`.  Every method may be called from any thread."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._ready: dict[int, Callable[[], None]] = {}
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def process(self, pidfd: int, ended: Callable[[], None]) -> None:
        """Call `ended` once, when the process of `pidfd` has ended (it may not have been reaped yet)."""

        def once() -> None:
            self.forget(pidfd)
            ended()

        self._watch(pidfd, once)

    def channel(self, channel: Channel, arrived: Callable[[Any, list[int]], None], closed: Callable[[], None]) -> None:
        """Call `arrived` for each message (the descriptors are then its), and `closed` once when no more will come.

        A peer that sends what is not a message is treated as one that died: its word is worth nothing any more.
        """

        descriptor = channel.fileno()

        def readable() -> None:
            try:
                while True:
                    message, descriptors = channel.receive(0)
                    arrived(message, descriptors)
            except ChannelTimeout:
                return
            except ChannelClosed:
                pass
            except FrameError as error:
                logger.error("a channel is closed, for its peer broke the protocol: {}", error)
            except OSError:
                if channel.fileno() < 0:
                    return  # its owner closed it while a message was being read here
                raise
            self.forget(descriptor)
            closed()

        self._watch(descriptor, readable)

    def forget(self, descriptor: int) -> None:
        """Watch it no longer.  To be called before the descriptor is closed; one not watched is no error."""
        if self._ready.pop(descriptor, None):
            self._epoll.unregister(descriptor)

    def _watch(self, descriptor: int, ready: Callable[[], None]) -> None:
        self._ready[descriptor] = ready
        self._epoll.register(descriptor, select.EPOLLIN)

    def _run(self) -> None:
        while True:
            for descriptor, _ in self._epoll.poll():
                # Gone when it was forgotten after this round of events was collected.
                ready = self._ready.get(descriptor)
                if ready is None:
                    continue
                try:
                    ready()
                except Exception:  # noqa: BLE001 (one listener's fault must not deafen all the others)
                    logger.exception("a watcher's listener failed")
