"""Threads for what blocks.

Daemon threads, unlike concurrent.futures': one that hangs, in a mount whose server is gone for instance, must not keep the
process from ending.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable


class Pool:
    """Runs functions, which must not raise, in at most `threads_max` threads; what is more waits its turn.  Thread-safe."""

    def __init__(self, threads_max: int) -> None:
        self._threads_max = threads_max
        self._lock = threading.Lock()
        self._idle = 0  # threads that wait, and that no function which was put already will wake
        self._threads: list[threading.Thread] = []
        self._functions: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def run(self, function: Callable[[], None]) -> None:
        with self._lock:
            self._functions.put(function)
            if self._idle:
                self._idle -= 1
            elif len(self._threads) < self._threads_max:
                thread = threading.Thread(target=self._work, name=f"worker {len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """End the threads, when each has done what it does and what waits; one that takes longer is left behind."""
        for _ in self._threads:
            self._functions.put(None)
        for thread in self._threads:
            thread.join(timeout_s)

    def _work(self) -> None:
        while (function := self._functions.get()) is not None:
            function()
            del function  # it holds an actor, which may be gone before there is another one
            with self._lock:
                self._idle += 1
