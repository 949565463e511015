"""One task's output on its way to one sink."""

from __future__ import annotations

import time
from itertools import groupby
from operator import attrgetter

from actors.output.follower import Reader
from actors.output.lines import LineSplitter
from actors.output.sinks import SinkPosition, Taker, name_of, open_sink
from actors.sandbox.messages import Sink

RECORD_S = 0.5  # between two reports of a sink's position
PAUSES = 4  # as many times as long as the last one took, at least: while a disk takes its seconds for it, no lines are moved
TURN_BYTES = 64 << 10  # read for one sink before the next one has its turn: 65,536 lines at most, a second for the console


class Course:
    """What was ordered: that one task's output goes to one sink.  `position` is what is on record.

    An error is to be answered with `close`, which does what a kill does: the next `move` goes on at `position`.

    `watch`: the inotify watch of `directory`, once there is one.
    `finishing`: nobody writes any more; what is left, a line without a newline included, is moved before `move` returns False.
    `failing`: an error was said, and what was moved since is not all on record.  `dirty`: something was moved that is not on record.
    """

    def __init__(self, task: str, directory: str, sink: Sink, position: SinkPosition) -> None:
        self.task = task
        self.directory = directory
        self.name = name_of(sink)
        self.path = sink.path
        self.position = position
        self.watch: int | None = None
        self.finishing = False
        self.failing = False
        self.dirty = False
        self._sink = sink
        self._due_s = 0.0
        self._taker: Taker | None = None
        self._begin()

    def _begin(self) -> None:
        self._reader = Reader(self.directory, self.position.source)
        self._stdout = LineSplitter(self.position.stdout_rest)
        self._stderr = LineSplitter(self.position.stderr_rest)
        self.dirty = False

    def move(self) -> bool:
        """Bring lines to the sink → whether there may be more at once.  Raises OSError; nothing is lost."""
        if self._taker is None:
            self._taker = open_sink(self._sink, self.task, self.position)
        splitters = {"stdout": self._stdout, "stderr": self._stderr}
        chunks = self._reader.read(TURN_BYTES)
        if not chunks and self.finishing:
            chunks = self._reader.finish()
        lines = []
        for stream, run in groupby(chunks, key=attrgetter("stream")):
            if stream in splitters:
                lines += [(stream, line) for line in splitters[stream].feed(b"".join(chunk.data for chunk in run))]
        if not chunks and self.finishing:
            lines = [(stream, line) for stream, splitter in splitters.items() for line in splitter.flush()]
        self.dirty = self.dirty or bool(chunks or lines)
        self._taker.take(lines)
        # A read that completes no line is still a read that may have left something: only one that finds nothing is the end.
        return bool(chunks)

    def record(self, now_s: float, at_once: bool) -> SinkPosition | None:
        """The new position, durable, when it has moved and it is time to say so.  Raises OSError."""
        if self._taker is None or not self.dirty or (not at_once and now_s < self._due_s):
            return None
        began_s = time.monotonic()
        length_bytes = self._taker.make_durable()
        took_s = time.monotonic() - began_s
        self.position = SinkPosition(self._reader.position, self._stdout.rest, self._stderr.rest, length_bytes)
        self.dirty, self._due_s = False, now_s + took_s + max(RECORD_S, PAUSES * took_s)
        return self.position

    def close(self) -> None:
        self._reader.close()
        if self._taker is not None:
            self._taker.close()
            self._taker = None
        self._begin()
