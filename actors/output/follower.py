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
READ_BYTES: Final = 1 << 20


class Position(msgspec.Struct, frozen=True):
    """How far a reader is: bytes of the journal, of each spill, and of the gap records.

    `torn`: the journal's last record, cut off by the death of its writer, has been read too.
    """

    journal: int = 0
    stdout: int = 0
    stderr: int = 0
    gaps: int = 0
    torn: bool = False


class Follower:
    """Reads `directory` from `position`.  Its files may appear later, the directory itself is there."""

    def __init__(self, directory: str | Path, position: Position | None = None) -> None:
        self._directory = Path(directory)
        position = position or Position()
        self._journal = Journal(position.journal)
        self._read = position.journal  # bytes of the journal handed to the parser
        self._offsets = {"stdout": position.stdout, "stderr": position.stderr, "gap": position.gaps}
        self._torn = position.torn
        self._files: dict[str, int] = {}
        self._inotify = INotify(nonblocking=True)
        self._inotify.add_watch(str(self._directory), flags.MODIFY | flags.CREATE | flags.MOVED_TO)

    @property
    def position(self) -> Position:
        """Where the next reader goes on: after everything given out."""
        return Position(
            self._journal.position, self._offsets["stdout"], self._offsets["stderr"], self._offsets["gap"], self._torn
        )

    def fileno(self) -> int:
        """Readable when the directory may have grown."""
        return int(self._inotify.fileno())

    def wait(self, timeout_s: float | None) -> bool:
        """Wait until it may have grown; False when the time is over."""
        waiting = select.poll()
        waiting.register(self._inotify.fileno(), select.POLLIN)
        return bool(waiting.poll(None if timeout_s is None else timeout_s * 1000))

    def read(self, bytes_max: int = READ_BYTES) -> list[Chunk]:
        """What there is after the position, at most about `bytes_max`; nothing when all was read."""
        self._inotify.read(timeout=0)  # what is read now need not wake anybody later
        journal = self._open(JOURNAL)
        data = os.pread(journal, bytes_max, self._read) if journal is not None else b""
        if data:
            self._read += len(data)
            return self._journal.feed(data)
        # Nobody writes to a spill while conmon lives, and conmon is dead when one appears: so the journal is complete then.
        chunks = []
        if any(self._open(name) is not None for name in SPILLS.values()):
            chunks += self._torn_record()
        for stream, name in (("gap", GAPS), *SPILLS.items()):
            file = self._open(name)
            data = os.pread(file, bytes_max, self._offsets[stream]) if file is not None else b""
            if data:
                self._offsets[stream] += len(data)
                chunks.append(Chunk(stream, data))
        return chunks

    def finish(self) -> list[Chunk]:
        """All that is left, once the task has ended and nobody writes any more."""
        chunks = []
        while more := self.read():
            chunks += more
        return chunks + self._torn_record()

    def close(self) -> None:
        self._inotify.close()
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
