"""Timers that arrive as messages: one thread for all of them."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable


class Timer:
    """A call to come.  `cancel` from any thread; one that is being made just now still is."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self.call = None


class Timers:
    """Calls functions, which must only tell somebody, when their time has come."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="timers", daemon=True).start()

    def after(self, delay_s: float, call: Callable[[], None]) -> Timer:
        timer = Timer(call)
        with self._changed:
            heapq.heappush(self._due, (time.monotonic() + delay_s, next(self._order), timer))
            if self._due[0][2] is timer:
                self._changed.notify()
        return timer

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._due or self._due[0][0] > time.monotonic():
                    self._changed.wait(self._due[0][0] - time.monotonic() if self._due else None)
                call = heapq.heappop(self._due)[2].call
            if call is not None:  # without the lock: what is called may ask for a timer
                call()
