"""The output mover as a real process, killed and replaced by whoever plays the OutputActor."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loguru import logger

from actors.output import process, wire
from actors.sandbox.messages import Sink
from supervisor.boot import only_these
from supervisor.channel import Channel, ChannelClosed, ChannelTimeout
from supervisor.frames import Codec, Message

PATIENCE_S = 60.0  # for the mover's next step: a disk may take seconds for one fsync


def file_sink(path: Path) -> Sink:
    return Sink("file", str(path))


def forked(work: Callable[[], object]) -> int:
    """A child that does `work()` and ends."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


class RunningMover:
    """A mover, the orders it was given, and the positions it reported: what its successor is told."""

    def __init__(self, lock: Path) -> None:
        self._arguments = Codec(wire.MoverArguments).encode(wire.MoverArguments(str(lock)))
        self.positions: dict[str, dict[str, bytes]] = {}
        self.heard: list[Any] = []
        self.pid, self._channel = self._fork()

    def _fork(self) -> tuple[int, Channel]:
        channel, there = Channel.pair(wire.ANSWERS)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                only_these([there.fileno()])  # what pytest captures with goes too, and with it its sys.stderr
                sys.stderr = os.fdopen(2, "w", closefd=False)
                logger.remove()
                logger.add(sys.stderr)
                process.serve(there, [], self._arguments)
                code = 0
            finally:
                os.write(2, traceback.format_exc().encode() if code else b"")
                os._exit(code)  # never back into pytest
        there.close()
        return pid, channel

    def follow(self, task: str, directory: Path, sinks: list[Sink]) -> None:
        self._send(wire.FollowTask(task, str(directory), sinks, self.positions.get(task, {})))

    def finish(self, task: str) -> None:
        self._send(wire.FinishTask(task))

    def pump(self, task: str, directory: Path, pipes: dict[str, int]) -> None:
        self._send(wire.PumpTask(task, str(directory), list(pipes)), list(pipes.values()))

    def _send(self, order: Message, descriptors: Sequence[int] = ()) -> None:
        self._channel.send(order, descriptors, PATIENCE_S)

    def hear(self, *kinds: type, within_s: float | None = None) -> Any:
        """The next message of these kinds; None when the time is over.  Positions are recorded on the way.

        Without a time: PATIENCE_S since it has moved something.  Raises ChannelClosed when the mover is gone.
        """
        deadline = time.monotonic() + (PATIENCE_S if within_s is None else within_s)
        while (left_s := deadline - time.monotonic()) > 0:
            message = self.next(left_s)
            if isinstance(message, kinds):
                return message
            if within_s is None and isinstance(message, wire.Moved):
                deadline = time.monotonic() + PATIENCE_S
        return None

    def next(self, within_s: float) -> Any:
        try:
            message, _ = self._channel.receive(within_s)
        except ChannelTimeout:
            return None
        self.heard.append(message)
        if isinstance(message, wire.Moved):
            self.positions.setdefault(message.task, {})[message.sink] = message.position
        return message

    def stop(self) -> None:
        """SIGSTOP: whatever happens before `resume` happens at once for the mover."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def replace(self, listen: bool = True) -> None:
        """SIGKILL it, and start another.  Without `listen` its last words are lost, as when the daemon dies with it."""
        os.kill(self.pid, signal.SIGKILL)
        self.end(listen)
        self.pid, self._channel = self._fork()

    def end(self, listen: bool = True) -> int:
        """Close the channel, at which it ends → its exit code."""
        if self.pid:
            try:
                while listen and self.next(0) is not None:
                    pass
            except ChannelClosed:
                pass
            self._channel.close()
            _, status = os.waitpid(self.pid, 0)
            self.pid = 0
            return os.waitstatus_to_exitcode(status)
        return 0

    def processor_s(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
