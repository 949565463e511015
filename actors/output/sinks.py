"""Where lines go besides the journal.  A sink is described by data; here it becomes something that takes lines.

What a sink has taken is on record as a `SinkPosition`: how far its reader is in the output directory, the partial line of each
stream, and for a file its length, to which a successor cuts it before it goes on.  So a file has each line exactly once.  It
follows that a file begins empty, as with a shell's `>`, and is one task's alone for as long as that runs (`faults`).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import Final, Protocol

import msgspec
from loguru import logger

from actors.output.follower import Position
from actors.sandbox.messages import Sink

Line = tuple[str, bytes]  # its stream, and its bytes with the newline


class SinkPosition(msgspec.Struct, frozen=True):
    """What is durable of one sink's work."""

    source: Position = Position()
    stdout_rest: bytes = b""
    stderr_rest: bytes = b""
    length_bytes: int = 0


class Taker(Protocol):
    def take(self, lines: Sequence[Line]) -> None:
        """Take lines, in their order.  Raises OSError; some may have been taken then, and a new one goes on from what is on record."""

    def make_durable(self) -> int:
        """What was taken survives a power cut from now on → the sink's length in bytes.  Raises OSError, as `take` does."""

    def close(self) -> None: ...


# A task's bytes must not drive the terminal that shows the log, nor begin a line of their own in it.
CONTROLS: Final = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if code != ord("\t")}


class ConsoleSink:
    """Logs each line with its task and stream, control characters escaped.  Lines in flight when the mover is killed come twice."""

    def __init__(self, task: str) -> None:
        self._task = task

    def take(self, lines: Sequence[Line]) -> None:
        for stream, line in lines:
            text = line.removesuffix(b"\n").decode("utf-8", "backslashreplace").translate(CONTROLS)
            logger.info("{} {}: {}", self._task, stream, text)

    def make_durable(self) -> int:
        return 0

    def close(self) -> None:
        pass


class FileSink:
    """Appends lines to a file, which is cut to `length_bytes` first: what is behind that was taken and not recorded.

    Raises OSError when it cannot be opened.
    """

    def __init__(self, path: str, length_bytes: int) -> None:
        os.makedirs(os.path.dirname(path) or ".", mode=0o755, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            # Shorter only when somebody else has cut or removed it: a hole in its place would bring nothing back.
            self._length = min(length_bytes, os.fstat(self._file).st_size)
            os.ftruncate(self._file, self._length)
        except OSError:
            os.close(self._file)
            raise

    def take(self, lines: Sequence[Line]) -> None:
        left = memoryview(b"".join(line for _, line in lines))
        while left:
            written = os.pwrite(self._file, left, self._length)
            self._length += written
            left = left[written:]

    def make_durable(self) -> int:
        os.fdatasync(self._file)
        return self._length

    def close(self) -> None:
        os.close(self._file)


KINDS: Final = ("console", "file")


def faults(sinks: Sequence[Sink], taken: Collection[str] = ()) -> list[str]:
    """Everything that is wrong with a choice of sinks; `taken`: the files that other tasks write to."""
    found, seen = [], {os.path.normpath(path) for path in taken}
    for sink in sinks:
        if sink.kind not in KINDS:
            found.append(f"there is no sink of the kind {sink.kind!r}: there are {' and '.join(KINDS)}")
        elif sink.kind == "file" and (not os.path.isabs(sink.path) or "\0" in sink.path):
            found.append(f"{sink.path[:300]!r} is no absolute path")
        elif sink.kind == "file":
            path = os.path.normpath(sink.path)
            if path in seen:
                found.append(f"{path}: output goes there already, and each file is one sink's alone: choose another path")
            seen.add(path)
    return found


def open_sink(sink: Sink, task: str, position: SinkPosition) -> Taker:
    """The sink that `sink` describes, whose kind is one of KINDS; it goes on from `position`.  Raises OSError."""
    if sink.kind == "console":
        return ConsoleSink(task)
    return FileSink(sink.path, position.length_bytes)


def name_of(sink: Sink) -> str:
    """What a sink is called in positions and messages."""
    return f"{sink.kind}:{sink.path}"
