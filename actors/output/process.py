"""The isolated process "output mover": one for the node, one event loop, harmless to kill at any instant."""

from __future__ import annotations

import os
import selectors
import socket
import time
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from inotify_simple import INotify, flags

from actors.output.course import RECORD_S, Course
from actors.output.follower import GROWTH
from actors.output.pump import Pump
from actors.output.sinks import SinkPosition, faults, name_of
from actors.output.wire import (
    ORDERS,
    Drained,
    FinishTask,
    FollowTask,
    Moved,
    MoverArguments,
    Progress,
    Pumped,
    PumpTask,
    SinkFailed,
)
from supervisor.channel import Channel, ChannelClosed, ChannelTimeout
from supervisor.frames import Codec, Message
from supervisor.lockfile import LockFile

HEARTBEAT_S = 1.0
RETRY_S = 0.5  # before a sink or a spill that failed is tried again


def serve(end: socket.socket, descriptors: list[int], arguments: bytes) -> None:
    """The entry: move until the channel is closed."""
    order: MoverArguments = Codec(MoverArguments).decode(arguments)
    lock = LockFile(Path(order.lock))
    lock.acquire(wait=True)  # a predecessor that is being killed may still be writing
    Mover(Channel(end, ORDERS)).run()


class Mover:
    """The event loop."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._selector = selectors.DefaultSelector()
        self._growth = INotify(nonblocking=True)  # one for all directories: a user may have 128
        self._courses: dict[tuple[str, str], Course] = {}
        self._pumps: dict[str, list[Pump]] = {}
        self._ready: dict[tuple[str, str], None] = {}  # courses that may have something to move, in turn
        self._timers: dict[Hashable, tuple[float, Callable[[], Any]]] = {}
        self._open = True

    def run(self) -> None:
        self._selector.register(self._channel.socket, selectors.EVENT_READ, self._obey)
        self._selector.register(self._growth, selectors.EVENT_READ, self._look)
        self._beat()
        while self._open:
            for key, _ in self._selector.select(0.0 if self._ready else self._pause_s()):
                key.data()
            self._run_timers()
            if self._ready:  # one turn of one course; then pumps, orders and the heartbeat have theirs
                self._move(next(iter(self._ready)))

    # --- orders ---

    def _obey(self) -> None:
        try:
            message, descriptors = self._channel.receive()
        except ChannelClosed:
            self._open = False
            return
        match message:
            case FollowTask():
                self._follow(message)
            case FinishTask(task):
                self._finish(task)
            case PumpTask(task, directory, streams):
                self._start_pump(task, Path(directory), streams, descriptors)

    def _follow(self, order: FollowTask) -> None:
        for sink in order.sinks:
            name = (order.task, name_of(sink))
            if name in self._courses:
                continue
            taken = [course.path for course in self._courses.values() if course.path]
            if wrong := faults([sink], taken):
                self._say(SinkFailed(*name, "; ".join(wrong)))
            else:
                saved = order.positions.get(name[1])
                position = msgspec.msgpack.decode(saved, type=SinkPosition) if saved else SinkPosition()
                self._courses[name] = Course(order.task, order.directory, sink, position)
                self._ready[name] = None

    def _finish(self, task: str) -> None:
        names = [name for name in self._courses if name[0] == task]
        for name in names:
            self._courses[name].finishing = True
            self._ready[name] = None
        if not names:
            self._say(Drained(task))

    # --- courses ---

    def _look(self) -> None:
        """Courses whose directories have grown are ready; one that failed waits for its time."""
        events = list(self._growth.read(timeout=0))
        watches = {event.wd for event in events}
        lost = any(event.mask & flags.Q_OVERFLOW for event in events)  # events were, and it may have been anywhere
        for name, course in self._courses.items():
            if (lost or course.watch in watches) and ("retry", name) not in self._timers:
                self._ready[name] = None

    def _move(self, name: tuple[str, str]) -> None:
        del self._ready[name]
        course = self._courses[name]
        try:
            if course.watch is None and not course.finishing:  # before the first read: what is written after it must be told
                course.watch = self._growth.add_watch(course.directory, GROWTH)
            more = course.move()
            position = course.record(time.monotonic(), at_once=course.finishing and not more)
        except OSError as error:
            course.close()
            if not course.failing:
                course.failing = True
                self._say(SinkFailed(*name, str(error)))
            self._after(RETRY_S, ("retry", name), partial(self._wake, name))
            return
        if not course.dirty:
            course.failing = False
        if position is not None:
            self._say(Moved(*name, msgspec.msgpack.encode(position)))
        if more:
            self._ready[name] = None  # at the end of the queue: a loud task does not keep the others waiting
        elif course.finishing:
            self._drop(name)
            if not any(task == course.task for task, _ in self._courses):
                self._say(Drained(course.task))
        elif course.dirty:
            self._after(RECORD_S, ("record", name), partial(self._wake, name))

    def _wake(self, name: tuple[str, str]) -> None:
        if name in self._courses:
            self._ready[name] = None

    def _drop(self, name: tuple[str, str]) -> None:
        course = self._courses.pop(name)
        course.close()
        # A directory has one watch, however often asked for.
        if course.watch is not None and all(other.watch != course.watch for other in self._courses.values()):
            with suppress(OSError):  # EINVAL: the directory was removed, and the watch with it
                self._growth.rm_watch(course.watch)

    # --- pumps ---

    def _start_pump(self, task: str, directory: Path, streams: list[str], readers: list[int]) -> None:
        if task in self._pumps:
            for reader in readers:
                os.close(reader)
            return
        self._pumps[task] = [Pump(directory, stream, reader) for stream, reader in zip(streams, readers, strict=True)]
        for pump in self._pumps[task]:
            self._watch_pipe(task, pump)
        self._end_pumps(task)

    def _watch_pipe(self, task: str, pump: Pump) -> None:
        self._selector.register(pump.reader, selectors.EVENT_READ, partial(self._pump, task, pump))

    def _pump(self, task: str, pump: Pump) -> None:
        try:
            if pump.move():
                pump.failing = False
                return
        except OSError as error:
            if not pump.failing:
                pump.failing = True
                self._say(SinkFailed(task, "spill", str(error)))
            self._selector.unregister(pump.reader)  # it stays readable, and would be all that this loop does
            self._after(RETRY_S, pump, partial(self._watch_pipe, task, pump))
            return
        self._selector.unregister(pump.reader)
        pump.close()
        self._pumps[task].remove(pump)
        self._end_pumps(task)

    def _end_pumps(self, task: str) -> None:
        if not self._pumps[task]:
            del self._pumps[task]
            self._say(Pumped(task))

    # --- time and words ---

    def _beat(self) -> None:
        try:
            self._channel.send(Progress(len(self._courses), len(self._pumps)), timeout_s=0)
        except ChannelTimeout:
            pass  # a heartbeat that nobody has room for is of no use later
        except ChannelClosed:
            self._open = False
        self._after(HEARTBEAT_S, "beat", self._beat)

    def _say(self, message: Message) -> None:
        """What must not be lost: waits for the parent, who reads or is replaced."""
        try:
            self._channel.send(message, timeout_s=None)
        except ChannelClosed:
            self._open = False

    def _after(self, delay_s: float, key: Hashable, call: Callable[[], Any]) -> None:
        """Make a call later: one for each key, however often it is asked for meanwhile."""
        self._timers.setdefault(key, (time.monotonic() + delay_s, call))

    def _pause_s(self) -> float:
        return max(0.0, min(due for due, _ in self._timers.values()) - time.monotonic())

    def _run_timers(self) -> None:
        now = time.monotonic()
        for key in [key for key, (due, _) in self._timers.items() if due <= now]:
            _, call = self._timers.pop(key)
            call()
