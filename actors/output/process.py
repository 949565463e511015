"""The isolated process "output mover": one for the node, one event loop, harmless to kill at any instant."""

from __future__ import annotations

import os
import selectors
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from actors.output.follower import Follower
from actors.output.lines import LineSplitter
from actors.output.pump import DiskFull, Pump, record_gap
from actors.output.sinks import SinkPosition, name_of, open_sink
from actors.output.wire import (
    ORDERS,
    Drained,
    FinishTask,
    FollowTask,
    ForgetTask,
    Moved,
    MoverArguments,
    Progress,
    Pumped,
    PumpTask,
    SinkFailed,
)
from actors.sandbox.messages import Sink
from supervisor.channel import Channel, ChannelClosed, ChannelTimeout
from supervisor.frames import Codec, Message
from supervisor.lockfile import LockFile

HEARTBEAT_S = 1.0
RECORD_S = 0.5  # between two reports of a sink's position
RETRY_S = 0.5  # before a sink or a spill that failed is tried again
TURN_BYTES = 1 << 20  # read for one sink before the next one has its turn


def serve(end: socket.socket, descriptors: list[int], arguments: bytes) -> None:
    """The entry: move until the channel is closed."""
    order: MoverArguments = Codec(MoverArguments).decode(arguments)
    lock = LockFile(Path(order.lock))
    lock.acquire(wait=True)  # a predecessor that is being killed may still be writing
    Mover(Channel(end, ORDERS)).run()


class Course:
    """One task's output on its way to one sink."""

    def __init__(self, task: str, directory: str, sink: Sink, position: SinkPosition) -> None:
        self.task = task
        self.name = name_of(sink)
        self.finishing = False
        self.failing = False
        self._follower = Follower(directory, position.source)
        self._splitters = {"stdout": LineSplitter(position.stdout_rest), "stderr": LineSplitter(position.stderr_rest)}
        self._sink = open_sink(sink, task, position)
        self._untaken: list[tuple[str, list[bytes]]] = []
        self._dirty = False
        self._recorded_s = 0.0

    def fileno(self) -> int:
        return self._follower.fileno()

    def move(self) -> bool:
        """Bring lines to the sink → whether there may be more at once.  Raises OSError when the sink takes none; nothing is lost."""
        if not self._untaken:
            chunks = self._follower.read(TURN_BYTES)
            if not chunks and self.finishing:
                chunks = self._follower.finish()
            lines = [
                (chunk.stream, self._splitters[chunk.stream].feed(chunk.data)) for chunk in chunks if chunk.stream != "gap"
            ]
            if not chunks and self.finishing:
                lines = [(stream, splitter.flush()) for stream, splitter in self._splitters.items()]
            self._untaken = [(stream, piece) for stream, piece in lines if piece]
            if chunks:
                self._dirty = True
        more = bool(self._untaken)
        while self._untaken:
            self._sink.take(*self._untaken[0])
            self._untaken.pop(0)
            self._dirty = True
        return more

    def record(self, now_s: float, at_once: bool) -> SinkPosition | None:
        """The sink's position, made durable, when it has moved and it is time to say so."""
        if not self._dirty or self._untaken or (not at_once and now_s - self._recorded_s < RECORD_S):
            return None
        self._dirty, self._recorded_s = False, now_s
        rests = self._splitters
        return SinkPosition(self._follower.position, rests["stdout"].rest, rests["stderr"].rest, self._sink.make_durable())

    def close(self) -> None:
        self._follower.close()
        self._sink.close()


class Mover:
    """The event loop."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._selector = selectors.DefaultSelector()
        self._courses: dict[tuple[str, str], Course] = {}
        self._pumps: dict[str, list[Pump]] = {}
        self._ready: dict[tuple[str, str], None] = {}  # courses that may have something to move, in turn
        self._timers: list[tuple[float, Callable[[], None]]] = []
        self._open = True

    def run(self) -> None:
        self._selector.register(self._channel.socket, selectors.EVENT_READ, self._obey)
        self._beat()
        while self._open:
            for key, _ in self._selector.select(0.0 if self._ready else self._pause_s()):
                if key.fd in self._selector.get_map():
                    key.data()
            self._run_timers()
            for name in list(self._ready):
                self._move(name)

    # --- orders ---

    def _obey(self) -> None:
        try:
            message, descriptors = self._channel.receive(0)
        except ChannelTimeout:
            return
        except ChannelClosed:
            self._open = False
            return
        match message:
            case FollowTask():
                self._follow(message)
            case FinishTask(task):
                self._finish(task)
            case ForgetTask(task):
                for name in [name for name in self._courses if name[0] == task]:
                    self._drop(name)
            case PumpTask(task, directory, streams):
                self._start_pump(task, Path(directory), streams, descriptors)

    def _follow(self, order: FollowTask) -> None:
        for sink in order.sinks:
            name = (order.task, name_of(sink))
            if name in self._courses:
                continue
            saved = order.positions.get(name[1])
            position = msgspec.msgpack.decode(saved, type=SinkPosition) if saved else SinkPosition()
            try:
                course = Course(order.task, order.directory, sink, position)
            except (OSError, ValueError) as error:
                self._say(SinkFailed(order.task, name[1], str(error)))
                if isinstance(error, OSError):
                    self._after(RETRY_S, lambda: self._follow(order))
                continue
            self._courses[name] = course
            self._selector.register(course, selectors.EVENT_READ, lambda name=name: self._ready.setdefault(name))
            self._ready[name] = None

    def _finish(self, task: str) -> None:
        names = [name for name in self._courses if name[0] == task]
        for name in names:
            self._courses[name].finishing = True
            self._ready[name] = None
        if not names:
            self._say(Drained(task))

    def _move(self, name: tuple[str, str]) -> None:
        del self._ready[name]
        course = self._courses.get(name)
        if course is None:
            return
        try:
            more = course.move()
            position = course.record(time.monotonic(), at_once=course.finishing and not more)
        except OSError as error:
            if not course.failing:
                course.failing = True
                self._say(SinkFailed(course.task, course.name, str(error)))
            self._after(RETRY_S, lambda: self._ready.setdefault(name))
            return
        course.failing = False
        if position is not None:
            self._say(Moved(course.task, course.name, msgspec.msgpack.encode(position)))
        if more:
            self._ready[name] = None  # at the end of the queue: a loud task does not keep the others waiting
        elif course.finishing:
            self._drop(name)
            if not any(task == course.task for task, _ in self._courses):
                self._say(Drained(course.task))
        else:
            self._after(RECORD_S, lambda: self._record_later(name))

    def _record_later(self, name: tuple[str, str]) -> None:
        if name in self._courses:
            self._ready[name] = None

    def _drop(self, name: tuple[str, str]) -> None:
        course = self._courses.pop(name)
        self._ready.pop(name, None)
        self._selector.unregister(course)
        course.close()

    # --- pumps ---

    def _start_pump(self, task: str, directory: Path, streams: list[str], readers: list[int]) -> None:
        if task in self._pumps:
            for reader in readers:
                os.close(reader)
            return
        record_gap(directory)
        pumps = self._pumps[task] = [Pump(directory, stream, reader) for stream, reader in zip(streams, readers, strict=True)]
        for pump in list(pumps):
            self._selector.register(pump.reader, selectors.EVENT_READ, lambda pump=pump: self._pump(task, pump))
            self._pump(task, pump)

    def _pump(self, task: str, pump: Pump) -> None:
        try:
            if pump.move():
                return
        except DiskFull as error:
            self._say(SinkFailed(task, "spill", str(error)))
            self._selector.unregister(pump.reader)
            self._after(RETRY_S, lambda: self._pump_again(task, pump))
            return
        self._selector.unregister(pump.reader)
        pump.close()
        self._pumps[task].remove(pump)
        if not self._pumps[task]:
            del self._pumps[task]
            self._say(Pumped(task))

    def _pump_again(self, task: str, pump: Pump) -> None:
        self._selector.register(pump.reader, selectors.EVENT_READ, lambda: self._pump(task, pump))
        self._pump(task, pump)

    # --- time and words ---

    def _beat(self) -> None:
        try:
            self._channel.send(Progress(len(self._courses), len(self._pumps)), timeout_s=0)
        except ChannelTimeout:
            pass  # a heartbeat that nobody has room for is of no use later
        except ChannelClosed:
            self._open = False
        self._after(HEARTBEAT_S, self._beat)

    def _say(self, message: Message) -> None:
        """What must not be lost: waits for the parent, who reads or is replaced."""
        try:
            self._channel.send(message, timeout_s=None)
        except ChannelClosed:
            self._open = False

    def _after(self, delay_s: float, call: Callable[[], Any]) -> None:
        self._timers.append((time.monotonic() + delay_s, call))

    def _pause_s(self) -> float:
        return max(0.0, min(due for due, _ in self._timers) - time.monotonic())

    def _run_timers(self) -> None:
        now = time.monotonic()
        due = [call for moment, call in self._timers if moment <= now]
        self._timers = [timer for timer in self._timers if timer[0] > now]
        for call in due:
            call()
