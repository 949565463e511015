"""An actor with one real isolated process, for the tests; the fixture is `bosses`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from supervisor.actor import Actor
from supervisor.isolation import Process
from supervisor.system import System
from supervisor.watch import Watcher
from supervisor.worker import Ended, Said, Worker
from tests.supervisor.actors_under_test import TIMEOUT_S, Log
from tests.supervisor.processes_under_test import Say

SILENCE_S = 0.6


class Boss(Actor):
    """Has one worker, and starts another when it has ended.  `log`: what the worker is said to do; `looks`: how often it was checked."""

    def __init__(
        self,
        system: System,
        watcher: Watcher,
        make: Callable[[], Process],
        heartbeat: bool = False,
        again: bool = False,
        silence_s: float = SILENCE_S,
    ) -> None:
        super().__init__(system, "boss")
        self.worker = Worker(self, watcher, "worker", heartbeat, silence_s)
        self.log, self.looks = Log(), Log()
        self.alive = False
        self._make = make
        self._again = again

    def on_begin(self) -> None:
        self.worker.start(self._make)
        self.worker.start(self._make)  # one is being started already

    def on_message(self, message: Any) -> Any:
        if callable(message):
            return message(self)
        if type(message).__name__ == "_Check":
            self.looks("look")
        taken = self.worker.take(message)
        if taken is not None:
            self.log(taken)
        if isinstance(taken, Ended) and self._again:
            self.worker.start(self._make)
        return None

    def on_end(self, reason: str | None) -> None:
        self.worker.let_go(self.alive)

    def next(self) -> Any:
        return self.log.next()[0]

    def next_but_beats(self) -> Any:
        """What the worker did next, other than to say that it lives."""
        while True:
            event = self.next()
            if not (isinstance(event, Said) and event.message == Say("beat")):
                return event


class Bosses(Protocol):
    """Starts one: its worker runs `entry`, which is told `text`.  `make`: makes the process instead, given what would fork it."""

    def __call__(
        self,
        entry: str,
        text: str = "hello",
        *,
        heartbeat: bool = False,
        again: bool = False,
        silence_s: float = SILENCE_S,
        make: Callable[[Callable[[], Process]], Process] | None = None,
    ) -> Boss: ...


def pid(boss: Boss) -> int:
    found: int = boss.system.ask("boss", lambda boss: boss.worker.pid, TIMEOUT_S)
    return found
