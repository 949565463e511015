"""Prefetchers, the processes, as the actor sees them: one after another."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from actors.services import Services
from supervisor.actor import Actor
from supervisor.frames import Message
from supervisor.isolation import Process
from supervisor.processes import ProcessRow
from supervisor.worker import Ended, Said, Started, Worker

PREFETCHER = "image prefetcher"
_numbers = itertools.count(1)


class Line:
    """One prefetcher after another, each for a workload, or whatever has a name; its process is made by `start`.

    `heartbeat`: they say that they live.
    """

    def __init__(
        self, actor: Actor, services: Services, name: str, start: Callable[[str], Process], heartbeat: bool = False
    ) -> None:
        self.workload = ""  # whose prefetcher is at work
        self._actor, self._services, self._start = actor, services, start
        # An image is mounted again and again: what is still to be said of an earlier one's prefetcher is not of this one's.
        self._worker = Worker(actor, services.watcher, f"{name} {next(_numbers)}", heartbeat)
        self._waiting: deque[str] = deque()

    def add(self, workload: str) -> None:
        if workload != self.workload and workload not in self._waiting:
            self._waiting.append(workload)
            self._next()

    def take(self, message: Any) -> Message | Ended | None:
        match self._worker.take(message):
            case Started():
                row = ProcessRow(PREFETCHER, self._worker.pid or 0, 0)
                self._services.processes.put(self._actor.name, row, self._worker.name)
            case Said(_, _, said):
                return said
            case Ended() as ended:
                self._services.processes.remove(self._actor.name, self._worker.name)
                return ended
        return None

    def ended(self) -> None:
        """The prefetcher has ended, and all of it is told."""
        self.workload = ""
        self._next()

    def let_go(self) -> None:
        self._waiting.clear()
        self._worker.let_go()
        self._services.processes.remove(self._actor.name, self._worker.name)

    def _next(self) -> None:
        if not self.workload and self._waiting:
            self.workload = self._waiting.popleft()
            self._worker.start(partial(self._start, self.workload))
