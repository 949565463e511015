"""An isolated process that does an actor's dangerous work: started, watched by pidfd, channel and heartbeat, started again.

The actor hands every message it does not know to `Worker.take` and gets back what the process said, or that it has ended.
A message of an earlier process is recognised by its generation and dropped.  Death is proven before a successor starts: by the
pidfd, which the kernel makes readable when the process has ended and its descriptors and locks are gone.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from supervisor.actor import Actor
from supervisor.answers import Worked, WorkFailed
from supervisor.channel import ChannelClosed, ChannelTimeout
from supervisor.frames import Message
from supervisor.isolation import Process
from supervisor.pidfd import wait_status
from supervisor.watch import Watcher

SILENCE_S = 5.0  # without a sign of life a process that promised heartbeats is hung
SEND_S = 0.5
DUMP_S = 0.2  # between SIGABRT, at which it says where it hangs, and SIGKILL


@dataclass(frozen=True)
class Said:
    """A message that a worker's process sent."""

    worker: str
    generation: int
    message: Message


@dataclass(frozen=True)
class Ended:
    """A worker's process has ended; `how` is for a human.  `hung`: it was killed because it was silent."""

    worker: str
    generation: int
    how: str
    hung: bool = False


@dataclass(frozen=True)
class Started:
    """A worker's process runs."""

    worker: str
    generation: int


@dataclass(frozen=True)
class _Start:
    worker: str
    generation: int


@dataclass(frozen=True)
class _Check:
    worker: str
    generation: int


@dataclass(frozen=True)
class _Kill:
    worker: str
    generation: int


class Worker:
    """One process of an actor's, by the name of `name`.

    `start` makes the process (blocking; it runs in the worker pool).  `heartbeat`: whether the process promised one a second.
    All methods are for the actor's own thread.
    """

    def __init__(self, actor: Actor, watcher: Watcher, name: str, heartbeat: bool = True) -> None:
        self.name = name
        self.process: Process | None = None
        self.generation = 0
        self.restarts = 0
        self._actor = actor
        self._watcher = watcher
        self._heartbeat = heartbeat
        self._heard = False
        self._hung = False
        self._starting = False

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process else None

    def start(self, make: Callable[[], Process]) -> None:
        """Start the process, unless one runs or is being started."""
        if self.process is None and not self._starting:
            self._starting = True
            self.generation += 1
            self._actor.work(_Start(self.name, self.generation), make)

    def adopt(self, process: Process) -> None:
        """Take a process that an earlier incarnation of the actor started."""
        self.generation += 1
        self._begin(process)

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send a message to the process, if it runs.  Who must know that it arrives sends again at each `Started`.

        A process that has not read for SEND_S is hung, and killed.
        """
        if self.process is None:
            return
        try:
            self.process.channel.send(message, descriptors, SEND_S)
        except ChannelTimeout:
            self._hung = True
            self.kill()
        except ChannelClosed:
            pass  # the watcher sees its end

    def kill(self) -> None:
        """End the process; `take` says when it has ended."""
        if self.process is not None:
            self.process.signal(signal.SIGKILL)

    def let_go(self, alive: bool = False) -> None:
        """Have done with the process, for an actor that ends: it is killed, for its work is asked for again; or left `alive`."""
        if self.process is not None:
            if not alive:
                self.kill()
            self._forget(self.process)
            self.process = None

    def take(self, message: Any) -> Started | Said | Ended | None:
        """What a message that arrived at the actor means for it; None when it is not this worker's, or stale."""
        match message:
            case Worked(_Start(name, generation), process) if name == self.name:
                if generation != self.generation:
                    return None
                self._starting = False
                self._begin(process)
                return Started(name, generation)
            case WorkFailed(_Start(name, generation), error) if name == self.name:
                if generation != self.generation:
                    return None
                self._starting = False
                self.restarts += 1
                return Ended(name, generation, f"it could not be started: {error}")
            case Said(name, generation, _) if name == self.name and generation == self.generation:
                self._heard = True
                return message
            case Ended(name, generation, how) if name == self.name and generation == self.generation and self.process:
                self._forget(self.process)
                self.process = None
                self.restarts += 1
                return Ended(name, generation, how, self._hung)
            case _Check(name, generation) if name == self.name and generation == self.generation:
                self._check()
            case _Kill(name, generation) if name == self.name and generation == self.generation:
                self.kill()
        return None

    def _begin(self, process: Process) -> None:
        self.process, self._hung = process, False
        name, generation, mailbox = self.name, self.generation, self._actor.mailbox

        def arrived(message: Any, descriptors: list[int]) -> None:
            for descriptor in descriptors:
                os.close(descriptor)  # a worker has none to give
            mailbox(Said(name, generation, message))

        self._watcher.channel(process.channel, arrived, lambda: None)
        self._watcher.process(process.pidfd, lambda: mailbox(Ended(name, generation, _how(process.pidfd))))
        if self._heartbeat:
            self._heard = True
            self._check()

    def _check(self) -> None:
        if self.process is None:
            return
        if self._heard:
            self._heard = False
            self._actor.after(SILENCE_S, _Check(self.name, self.generation))
            return
        self._hung = True
        self.process.signal(signal.SIGABRT)  # faulthandler writes where every thread is to the daemon's log
        self._actor.after(DUMP_S, _Kill(self.name, self.generation))

    def _forget(self, process: Process) -> None:
        self._watcher.forget(process.channel.fileno())
        self._watcher.forget(process.pidfd)
        process.close()


def _how(pidfd: int) -> str:
    status = wait_status(pidfd)
    if status is None:
        return "how is not known"
    code = os.waitstatus_to_exitcode(status)
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
