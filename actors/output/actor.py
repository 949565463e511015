"""The OutputActor: decides which task's output goes where; the mover process does it.

What a task prints is durable in its journal before anybody here knows of it.  Positions of the sinks are rows of the store, so
an actor, a mover or a daemon that is started again goes on from them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from loguru import logger

from actors.output import messages, wire
from actors.sandbox.attempt import STREAMS, held
from actors.sandbox.messages import Sink
from actors.sandbox.recovery import gaps
from actors.services import Services
from supervisor.actor import Actor
from supervisor.answers import Deferred
from supervisor.frames import Message
from supervisor.isolation import Process
from supervisor.lockfile import evict
from supervisor.processes import ProcessRow
from supervisor.tree import System
from supervisor.worker import Ended, Said, Started, Worker

MOVER = "output mover"
RESTART_S = 0.2  # after a mover that could not move without dying


class _StartAgain(Message, frozen=True):
    pass


@dataclass
class Followed:
    """A task whose lines go somewhere."""

    sinks: list[Sink]
    finishing: bool = False
    waiting: list[Deferred] = field(default_factory=list)


class OutputActor(Actor):
    def __init__(self, system: System, name: str, services: Services) -> None:
        super().__init__(system, name)
        self._services = services
        self._worker = Worker(self, services.watcher, MOVER)
        self._followed: dict[str, Followed] = {}
        self._pumped: dict[str, list[Deferred]] = {}

    def on_begin(self) -> None:
        self._worker.start(self._make)

    def on_end(self, reason: object) -> None:
        self._worker.let_go()

    def on_message(self, message: Any) -> Any:
        match message:
            case messages.FollowOutput(task, sinks):
                return self._follow(task, sinks)
            case messages.FinishOutput(task):
                return self._finish(task)
            case messages.PumpOutput(task):
                return self._pump(task)
            case _StartAgain():
                self._worker.start(self._make)
            case _:
                self._from_mover(message)
        return None

    def _from_mover(self, message: Any) -> None:
        match self._worker.take(message):
            case Started():
                self._services.processes.put(self.name, ProcessRow(MOVER, self._worker.pid or 0, self._worker.restarts))
                for task in self._followed:
                    self._order_follow(task)
                for task in self._pumped:
                    self._order_pump(task)
            case Said(_, _, wire.Moved(task, sink, position)):
                self._services.store.write(("INSERT OR REPLACE INTO positions VALUES (?, ?, ?)", (task, sink, position)))
            case Said(_, _, wire.Drained(task)):
                followed = self._followed.pop(task, None)
                for reply in followed.waiting if followed else ():
                    reply.set(messages.OutputDrained())
            case Said(_, _, wire.Pumped(task)):
                count = len(gaps(self._services, task))
                for reply in self._pumped.pop(task, []):
                    reply.set(messages.Pumped(count))
            case Said(_, _, wire.SinkFailed(task, sink, error)):
                logger.error("output of task {} cannot go to {}, it is kept and tried again: {}", task, sink, error)
            case Ended(_, _, how):
                logger.warning("the output mover has ended ({}); another one takes over", how)
                self._services.processes.remove(self.name, MOVER)
                self.after(RESTART_S if self._worker.restarts > 1 else 0.0, _StartAgain())

    def _order_follow(self, task: str) -> None:
        followed = self._followed[task]
        rows = self._services.store.read("SELECT sink, position FROM positions WHERE task = ?", task)
        directory = str(self._services.layout.task(task).output)
        self._worker.send(wire.FollowTask(task, directory, followed.sinks, dict(rows)))
        if followed.finishing:
            self._worker.send(wire.FinishTask(task))

    def _follow(self, task: str, sinks: list[Sink]) -> Any:
        followed = self._followed.setdefault(task, Followed(list(sinks)))
        reply = self.deferred()
        followed.waiting.append(reply)
        self._order_follow(task)
        return reply

    def _finish(self, task: str) -> Any:
        followed = self._followed.get(task)
        if followed is None:
            return messages.OutputDrained()
        followed.finishing = True
        reply = self.deferred()
        followed.waiting.append(reply)
        self._worker.send(wire.FinishTask(task))
        return reply

    def _pump(self, task: str) -> Any:
        reply = self.deferred()
        self._pumped.setdefault(task, []).append(reply)
        self._order_pump(task)
        return reply

    def _order_pump(self, task: str) -> None:
        """With copies of the read ends, which stay held: a pump that is killed is followed by another."""
        descriptors = [self._services.descriptors.get(held(stream, task)) for stream in STREAMS]
        readers = [reader for reader in descriptors if reader is not None]
        streams = [stream for stream, reader in zip(STREAMS, descriptors, strict=True) if reader is not None]
        directory = str(self._services.layout.task(task).output)
        self._worker.send(wire.PumpTask(task, directory, streams), readers)

    def _make(self) -> Process:
        lock = self._services.layout.run / "mover.lock"
        evict(lock)
        return self._services.isolation.start(
            MOVER, "actors.output.process:serve", wire.MoverArguments(str(lock)), wire.ANSWERS
        )
