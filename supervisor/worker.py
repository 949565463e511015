"""An isolated process that does an actor's dangerous work: started, watched by pidfd, channel and heartbeat, started again.

The actor hands every message it does not know to `Worker.take` and gets back what the process said, or that it has ended.
A message of an earlier process is recognised by its generation and dropped.  Death is proven before a successor starts: by the
pidfd, which the kernel makes readable when the process has ended and its descriptors and locks are gone.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from supervisor.actor import Actor
from supervisor.answers import Vital, Worked, WorkFailed
from supervisor.channel import ChannelClosed, ChannelTimeout
from supervisor.events import Event, shortened
from supervisor.exits import Cause, Exit, of_code
from supervisor.frames import Message
from supervisor.isolation import Process
from supervisor.pidfd import wait_status, waits_for_disk
from supervisor.pulse import DISK_S
from supervisor.rules import What
from supervisor.watch import Watcher

# Without a sign of life for so long a process that promised heartbeats is hung.  With one more look, the dump, and another quarter
# for a sign that came just after a look, a process that is stopped is replaced within 5 s.
SILENCE_S = 3.5
LOOKS = 4  # in that time
SEND_S = 0.5
LOOK_AGAIN_S = 0.2
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
class _Died(Vital):
    worker: str
    generation: int


@dataclass(frozen=True)
class _Check(Vital):
    worker: str
    generation: int


@dataclass(frozen=True)
class _Kill(Vital):
    worker: str
    generation: int


class _Making:
    """A process on its way from the worker pool to its actor, which may have ended meanwhile: whoever is last gives it back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: Process | None = None
        self._give_back: Callable[[Process], None] | None = None

    def run(self, make: Callable[[], Process]) -> None:
        process = make()
        with self._lock:
            if self._give_back is None:
                self._process = process
            else:
                self._give_back(process)

    def take(self) -> Process:
        with self._lock:
            process, self._process = self._process, None
        assert process is not None
        return process

    def abandon(self, give_back: Callable[[Process], None]) -> None:
        with self._lock:
            self._give_back = give_back
            if self._process is not None:
                give_back(self._process)
                self._process = None


class Worker:
    """One process of an actor's, by the name of `name`.

    `heartbeat`: whether the process promised one a second.  `silence_s`: without a sign of life for so long it is hung, unless it waits
    for a disk, and so is one that lives on for so long after it has closed its channel or broken the protocol.
    All methods are for the actor's own thread; its `on_end` must `let_go`.
    """

    def __init__(self, actor: Actor, watcher: Watcher, name: str, heartbeat: bool = True, silence_s: float = SILENCE_S) -> None:
        self.name = name
        self.process: Process | None = None
        self.generation = 0
        self.restarts = 0
        self._actor = actor
        self._watcher = watcher
        self._heartbeat = heartbeat
        self._silence_s = silence_s
        self._heard = False
        self._heard_s = 0.0  # when that was seen, the last time
        self._missed = 0  # looks at which nothing had been heard since the one before
        self._hung = False
        self._making: _Making | None = None

    @property
    def vacant(self) -> bool:
        """No process runs, and none is being started."""
        return self.process is None and self._making is None

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process else None

    def start(self, make: Callable[[], Process]) -> None:
        """Start the process, unless one runs or is being started.  `make` blocks, and runs in the worker pool."""
        if self.process is None and self._making is None:
            self._making = _Making()
            self.generation += 1
            self._actor.work(_Start(self.name, self.generation), self._making.run, make)

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
        """Have done with the process, for an actor that ends: it is killed, for its work is asked for again; or left `alive`.

        Nothing more is heard of it; nor of one that is just being started, to which the same happens.
        """

        def give_back(process: Process) -> None:
            if not alive:
                process.signal(signal.SIGKILL)
            process.close()

        self.generation += 1
        if self._making is not None:
            self._making.abandon(give_back)
            self._making = None
        if self.process is not None:
            self._unwatch(self.process)
            give_back(self.process)
            self.process = None

    def take(self, message: Any) -> Started | Said | Ended | None:
        """What a message that arrived at the actor means for it; None when it is not this worker's, or stale."""
        match message:
            case Worked(_Start() as key, _) if self._is_mine(key) and self._making is not None:
                process, self._making = self._making.take(), None
                self._begin(process)
                return Started(self.name, self.generation)
            case WorkFailed(_Start() as key, error) if self._is_mine(key):
                self._making = None
                self.restarts += 1
                self._note(Exit(Cause.START, str(error)))
                return Ended(self.name, self.generation, f"it could not be started: {error}")
            case Said() if self._is_mine(message):
                self._heard = True
                return message
            case _Died() if self._is_mine(message) and self.process is not None:
                how = _how(self.process.pidfd)
                self._note(Exit(Cause.HUNG, f"hung, {how}") if self._hung else how)
                self._unwatch(self.process)
                self.process.close()
                self.process = None
                self.restarts += 1
                return Ended(self.name, self.generation, str(how), self._hung)
            case _Check() if self._is_mine(message):
                self._check()
            case _Kill() if self._is_mine(message):
                self.kill()
        return None

    def _note(self, exit: Exit) -> None:
        """For the event log: whether it is started again is its actor's to say."""
        what = What.START_FAILED if exit.cause is Cause.START else What.ENDED
        event = Event(
            time.time(), self._actor.name, self.name, self.generation, what.value, exit.cause.value, shortened(exit.text)
        )
        self._actor.system.events(event)

    def _is_mine(self, message: _Start | Said | _Died | _Check | _Kill) -> bool:
        return message.worker == self.name and message.generation == self.generation

    def _begin(self, process: Process) -> None:
        self.process, self._hung = process, False
        name, generation, mailbox = self.name, self.generation, self._actor.mailbox

        def arrived(message: Any, descriptors: list[int]) -> None:
            for descriptor in descriptors:
                os.close(descriptor)  # a worker has none to give
            mailbox(Said(name, generation, message))

        def closed() -> None:
            self._actor.after(self._silence_s, _Kill(name, generation))

        def ended() -> None:
            self._watcher.last_words(process.channel, arrived)
            mailbox(_Died(name, generation))

        self._watcher.channel(process.channel, arrived, closed)
        self._watcher.process(process.pidfd, ended)
        if self._heartbeat:
            self._heard = True
            self._check()

    def _check(self) -> None:
        if self.process is None:
            return
        now_s = time.monotonic()
        if self._heard:
            self._heard_s = now_s
        self._missed = 0 if self._heard else self._missed + 1
        self._heard = False
        if self._missed > LOOKS and now_s - self._heard_s < DISK_S and self._is_excused(self.process):
            self._missed = 0
        if self._missed <= LOOKS:
            # The last time soon: perhaps it was this process that did not run, and what was said lies unread.
            delay_s = LOOK_AGAIN_S if self._missed == LOOKS else self._silence_s / LOOKS
            self._actor.after(delay_s, _Check(self.name, self.generation))
            return
        self._hung = True
        self.process.signal(signal.SIGABRT)  # faulthandler writes where every thread is to the daemon's log
        self._actor.after(DUMP_S, _Kill(self.name, self.generation))

    @staticmethod
    def _is_excused(process: Process) -> bool:
        """It waits for a disk; or our own watcher does, most likely, and what it has said lies unread."""
        return waits_for_disk(process.pidfd) or process.channel.readable()

    def _unwatch(self, process: Process) -> None:
        self._watcher.forget(process.channel.fileno())
        self._watcher.forget(process.pidfd)


def _how(pidfd: int) -> Exit:
    status = wait_status(pidfd)
    return of_code(None if status is None else os.waitstatus_to_exitcode(status))
