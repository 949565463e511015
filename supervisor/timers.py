"""Timers that arrive as messages: one thread for all of them."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable

from loguru import logger


class Timer:
    """A call to come.  `cancel` from any thread; one that is being made just now still is."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self.call = None


class Timers:
    """Calls functions, which must only tell somebody, when their time has come; until `close`."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="timers", daemon=True)
        self._thread.start()

    def after(self, delay_s: float, call: Callable[[], None]) -> Timer:
        timer = Timer(call)
        with self._changed:
            heapq.heappush(self._due, (time.monotonic() + delay_s, next(self._order), timer))
            if self._due[0][2] is timer:
                self._changed.notify()
        return timer

    def close(self) -> None:
        """Call nobody any more.  May be called by what is called."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while (call := self._next()) is not None:
            try:
                call()  # without the lock: what is called may ask for a timer
            except Exception:  # noqa: BLE001 (one listener's fault must not stop all the other timers)
                logger.exception("a timer's call failed")
            del call  # it may hold what is gone by the time of the next one

    def _next(self) -> Callable[[], None] | None:
        """Wait for the next call to make; None when there will be none."""
        with self._changed:
            while not self._closed:
                if self._due and self._due[0][0] <= time.monotonic():
                    call = heapq.heappop(self._due)[2].call
                    if call is not None:
                        return call
                else:
                    self._changed.wait(self._due[0][0] - time.monotonic() if self._due else None)
        return None
