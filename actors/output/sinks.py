"""Where lines go besides the journal.  A sink is described by data; here it becomes something that takes lines.

What a sink has taken is on record as a `SinkPosition`: how far its reader is in the output directory, the partial line of each
stream, and for a file its length, to which a successor cuts it before it goes on.  So a file has each line exactly once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

import msgspec
from loguru import logger

from actors.output.follower import Position
from actors.sandbox.messages import Sink


class SinkPosition(msgspec.Struct, frozen=True):
    """What is durable of one sink's work."""

    source: Position = Position()
    stdout_rest: bytes = b""
    stderr_rest: bytes = b""
    length_bytes: int = 0


class Taker(Protocol):
    def take(self, stream: str, lines: Sequence[bytes]) -> None:
        """Take lines of one stream, in their order.  Raises OSError when it has not taken them all; the same are given again."""

    def make_durable(self) -> int:
        """What was taken survives a power cut from now on → the sink's length in bytes."""

    def close(self) -> None: ...


class ConsoleSink:
    """Logs each line with its task and stream.  Lines in flight when the mover is killed come twice."""

    def __init__(self, task: str) -> None:
        self._task = task

    def take(self, stream: str, lines: Sequence[bytes]) -> None:
        for line in lines:
            logger.info("{} {}: {}", self._task, stream, line.rstrip(b"\n").decode("utf-8", "backslashreplace"))

    def make_durable(self) -> int:
        return 0

    def close(self) -> None:
        pass


class FileSink:
    """Appends lines to a file, which is cut to `length_bytes` first: what is behind that was taken and not recorded."""

    def __init__(self, path: str, length_bytes: int) -> None:
        os.makedirs(os.path.dirname(path) or ".", mode=0o755, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        self._length = length_bytes
        if os.fstat(self._file).st_size > length_bytes:
            os.ftruncate(self._file, length_bytes)

    def take(self, stream: str, lines: Sequence[bytes]) -> None:
        data = memoryview(b"".join(lines))
        done = 0
        while done < len(data):  # at the offset, so that what a full disk cut short is written over
            done += os.pwrite(self._file, data[done:], self._length + done)
        self._length += len(data)

    def make_durable(self) -> int:
        os.fdatasync(self._file)
        return self._length

    def close(self) -> None:
        os.close(self._file)


def open_sink(sink: Sink, task: str, position: SinkPosition) -> Taker:
    """The sink that `sink` describes, which goes on from `position`.  Raises OSError; ValueError for a kind that there is not."""
    match sink.kind:
        case "console":
            return ConsoleSink(task)
        case "file":
            return FileSink(sink.path, position.length_bytes)
    raise ValueError(f"no sink is called {sink.kind!r}")


def name_of(sink: Sink) -> str:
    """What a sink is called in positions and messages."""
    return f"{sink.kind}:{sink.path}"
