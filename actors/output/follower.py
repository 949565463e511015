"""Reading one task's output directory while it grows: exact bytes, stream by stream, resumable by position."""

from __future__ import annotations

import os
import select
from pathlib import Path
from typing import Final

import msgspec
from inotify_simple import INotify, flags

from actors.output.journal import Chunk, Journal

JOURNAL: Final = "journal"
GAPS: Final = "gaps"
SPILLS: Final = {"stdout": "stdout.spill", "stderr": "stderr.spill"}
AFTER_JOURNAL: Final = {"gap": GAPS, **SPILLS}
READ_BYTES: Final = 1 << 20
GROWTH: Final = flags.MODIFY | flags.CREATE | flags.MOVED_TO  # inotify's events of a directory that has more to read


class Position(msgspec.Struct, frozen=True):
    """How far a reader is: bytes of the journal, of each spill, and of the gap records.

    `torn`: the journal's last record, cut off by the death of its writer, has been read too.
    """

    journal: int = 0
    stdout: int = 0
    stderr: int = 0
    gaps: int = 0
    torn: bool = False


class Reader:
    """Reads `directory` from `position`.  Its files may appear later."""

    def __init__(self, directory: str | Path, position: Position | None = None) -> None:
        self._directory = Path(directory)
        position = position or Position()
        self._journal = Journal(position.journal)
        self._read = position.journal  # bytes of the journal handed to the parser
        self._offsets = {"stdout": position.stdout, "stderr": position.stderr, "gap": position.gaps}
        self._torn = position.torn
        self._files: dict[str, int] = {}

    @property
    def position(self) -> Position:
        """Where the next reader goes on: after everything given out."""
        return Position(
            self._journal.position, self._offsets["stdout"], self._offsets["stderr"], self._offsets["gap"], self._torn
        )

    def read(self, bytes_max: int = READ_BYTES) -> list[Chunk]:
        """What there is after the position, at most about `bytes_max`; nothing when all was read."""
        # conmon is dead when a spill or a gap record appears, so the journal is complete then.  Looked for before the journal's
        # end is: after it, what conmon wrote in between would come behind the spills.
        complete = [(stream, file) for stream, name in AFTER_JOURNAL.items() if (file := self._open(name)) is not None]
        journal = self._open(JOURNAL)
        while journal is not None and (data := os.pread(journal, bytes_max, self._read)):
            self._read += len(data)
            if chunks := self._journal.feed(data):
                return chunks
        if complete and (torn := self._torn_record()):
            return torn
        for stream, file in complete:
            if data := os.pread(file, bytes_max, self._offsets[stream]):
                self._offsets[stream] += len(data)
                return [Chunk(stream, data)]
        return []

    def finish(self) -> list[Chunk]:
        """All that is left, once the task has ended and nobody writes any more."""
        chunks = []
        while more := self.read():
            chunks += more
        return chunks + self._torn_record()

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def _torn_record(self) -> list[Chunk]:
        torn = None if self._torn else self._journal.torn()
        self._torn = self._torn or torn is not None
        return [torn] if torn else []

    def _open(self, name: str) -> int | None:
        if name not in self._files:
            try:
                self._files[name] = os.open(self._directory / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                return None
        return self._files[name]


class Follower(Reader):
    """A reader that can be waited for.  The directory itself is there; raises OSError when it is not."""

    def __init__(self, directory: str | Path, position: Position | None = None) -> None:
        super().__init__(directory, position)
        self._inotify = INotify(nonblocking=True)
        try:
            self._inotify.add_watch(str(directory), GROWTH)
        except OSError:
            self._inotify.close()
            raise

    def fileno(self) -> int:
        """Readable when the directory may have grown."""
        return int(self._inotify.fileno())

    def wait(self, timeout_s: float | None) -> bool:
        """Wait until it may have grown; False when the time is over."""
        waiting = select.poll()
        waiting.register(self._inotify.fileno(), select.POLLIN)
        return bool(waiting.poll(None if timeout_s is None else timeout_s * 1000))

    def read(self, bytes_max: int = READ_BYTES) -> list[Chunk]:
        self._inotify.read(timeout=0)  # before the files: what grows from now on wakes who waits
        return super().read(bytes_max)

    def close(self) -> None:
        self._inotify.close()
        super().close()
