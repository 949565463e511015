"""An actor that does what it is told and says what happens to it, for the tests of actors and of their supervisors."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from supervisor.actor import Actor
from supervisor.exits import Begun, Exited
from supervisor.system import System
from supervisor.timers import Timers

TIMEOUT_S = 60.0


class Log:
    """What has happened, in order, for whoever waits for it."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def __call__(self, *event: Any) -> None:
        self.events.put(event)

    def next(self) -> Any:
        return self.events.get(timeout=TIMEOUT_S)

    def take(self, count: int) -> list[Any]:
        return [self.next() for _ in range(count)]

    @property
    def silent(self) -> bool:
        return self.events.empty()


class Puppet(Actor):
    """Calls each function that it gets as a message with itself, and returns what that returns.  Anything else it notes."""

    def __init__(
        self,
        system: System,
        name: str,
        log: Log,
        begin: Callable[[Puppet], Any] = lambda puppet: None,
        end: Callable[[Puppet], Any] = lambda puppet: None,
    ) -> None:
        super().__init__(system, name)
        self.log = log
        self._begin, self._end = begin, end

    def on_begin(self) -> None:
        self.log("begin", self.name)
        self._begin(self)

    def on_message(self, message: Any) -> Any:
        if callable(message):
            return message(self)
        self.log("message", self.name, message)
        return None

    def on_end(self, reason: str | None) -> None:
        self.log("end", self.name, reason)
        self._end(self)


class Alone:
    """Actors without a supervisor: starts them, and hears of their ends in its place."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.log = Log()
        self.exits: queue.SimpleQueue[Exited] = queue.SimpleQueue()

    def start(self, name: str, generation: int = 0, **behaviour: Callable[[Puppet], Any]) -> Puppet:
        puppet = Puppet(self.system, name, self.log, **behaviour)
        self.system.expect(name)
        puppet.launch(generation, self.hears)
        assert puppet.begun.wait(TIMEOUT_S)
        return puppet

    def hears(self, message: Begun | Exited) -> None:
        if isinstance(message, Exited):
            self.exits.put(message)

    def exited(self) -> Exited:
        return self.exits.get(timeout=TIMEOUT_S)


def crash(error: BaseException) -> Callable[[Puppet], Any]:
    """A message that makes its actor raise; a new exception each time, for one keeps every frame that it ever came through."""

    def do(puppet: Puppet) -> Any:
        raise type(error)(*error.args)

    return do


def hold(entered: threading.Event, go: threading.Event) -> Callable[[Puppet], Any]:
    """A message that keeps its actor busy from `entered` until `go`."""

    def do(puppet: Puppet) -> Any:
        entered.set()
        assert go.wait(TIMEOUT_S)

    return do


@contextmanager
def no_timer(timers: Timers) -> Iterator[None]:
    """No timer comes meanwhile, whenever it is due: what is done here is certainly done before."""
    entered, go = threading.Event(), threading.Event()
    timers.after(0.0, lambda: hold(entered, go)(None))  # type: ignore[arg-type]
    assert entered.wait(TIMEOUT_S)
    try:
        yield
    finally:
        go.set()
