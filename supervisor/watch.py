"""One thread that waits for processes to end and for channels to speak, and tells; it decides nothing.

epoll over pidfds and channel sockets: an ended process is known within a millisecond, and nothing is polled for.  The
functions given are called in the watcher's thread and must only tell somebody; a second one would not be heard meanwhile.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable
from typing import Any

from loguru import logger

from supervisor.channel import Channel, ChannelClosed, ChannelTimeout
from supervisor.frames import FrameError
from supervisor.pidfd import has_ended
from supervisor.pulse import BEAT_S

ROUND_MAX = 64  # messages taken from one channel before the others have their turn


class Watcher:
    """Watches descriptors from `start` to `stop`.  Every method may be called from any thread."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._ready: dict[int, Callable[[], None]] = {}
        self._changing = threading.Lock()
        self._every_beat: list[Callable[[], None]] = []
        self._stopping = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Call nobody any more, and give the thread back.  Not for the watcher's own thread; nothing else may be called after it."""
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._epoll.close()
        os.close(self._wake)

    def process(self, pidfd: int, ended: Callable[[], None]) -> None:
        """Call `ended` once, when the process of `pidfd` has ended (it may not have been reaped yet)."""

        def once() -> None:
            # Asked again: when the event is an earlier one's, of which this descriptor has taken the number, nobody has died.
            if has_ended(pidfd) and self._forget(pidfd, once):
                ended()

        self._watch(pidfd, once)

    def readable(self, descriptor: int, told: Callable[[], None]) -> None:
        """Call `told` once, when the descriptor can be read from, or has an error."""

        def once() -> None:
            if self._forget(descriptor, once):
                told()

        self._watch(descriptor, once)

    def channel(self, channel: Channel, arrived: Callable[[Any, list[int]], None], closed: Callable[[], None]) -> None:
        """Call `arrived` for each message (the descriptors are then its), and `closed` once when no more will come.

        A peer that sends what is not a message is treated as one that died: its word is worth nothing any more.
        """

        descriptor = channel.fileno()

        def readable() -> None:
            if self._take(channel, arrived, ROUND_MAX):
                self._forget(descriptor, readable)
                closed()

        self._watch(descriptor, readable)

    def last_words(self, channel: Channel, arrived: Callable[[Any, list[int]], None]) -> None:
        """Take all that lies in a channel that is watched; for the `ended` of its process, which may come before it."""
        if channel.fileno() in self._ready:
            self._take(channel, arrived, None)

    def every_beat(self, function: Callable[[], None]) -> None:
        """Call `function` every `pulse.BEAT_S`, for as long as this thread goes round: that is what shows that it does."""
        self._every_beat.append(function)

    def forget(self, descriptor: int) -> bool:
        """Watch it no longer → whether it was.  To be called before the descriptor is closed."""
        return self._forget(descriptor)

    def _forget(self, descriptor: int, only: Callable[[], None] | None = None) -> bool:
        """`only`: if that is what watches it, and not another descriptor's, which has taken its number meanwhile."""
        # Whoever hears that it is not watched any more may close it, and so not before the other thread has forgotten all of it.
        with self._changing:
            ready = self._ready.get(descriptor)
            if ready is None or (only is not None and ready is not only):
                return False
            del self._ready[descriptor]
            self._epoll.unregister(descriptor)
            return True

    def _watch(self, descriptor: int, ready: Callable[[], None]) -> None:
        with self._changing:
            self._epoll.register(descriptor, select.EPOLLIN)  # an event that comes before the next line comes again
            self._ready[descriptor] = ready

    def _take(self, channel: Channel, arrived: Callable[[Any, list[int]], None], messages_max: int | None) -> bool:
        """Take what has arrived → whether no more will come."""
        taken = 0
        try:
            while messages_max is None or taken < messages_max:
                arrived(*channel.receive(0))
                taken += 1
        except ChannelTimeout:
            return False
        except ChannelClosed:
            return True
        except FrameError as error:
            logger.error("a channel is closed, for its peer broke the protocol: {}", error)
            return True
        except OSError:
            if channel.fileno() < 0:
                return False  # its owner closed it while a message was being read here
            raise
        return False

    def _run(self) -> None:
        beat_s = 0.0
        while True:
            events = self._epoll.poll(max(0.0, beat_s - time.monotonic()))
            if self._stopping:
                return
            if time.monotonic() >= beat_s:
                beat_s = time.monotonic() + BEAT_S
                for beat in self._every_beat:
                    self._call(beat)
            for descriptor, _ in events:
                # Gone when it was forgotten after this round of events was collected.
                ready = self._ready.get(descriptor)
                if ready is None:
                    continue
                self._call(ready)

    @staticmethod
    def _call(function: Callable[[], None]) -> None:
        try:
            function()
        except Exception:  # noqa: BLE001 (one listener's fault must not deafen all the others)
            logger.exception("a watcher's listener failed")
