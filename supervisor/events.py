"""The event log: what has happened to the children of all supervisors, on disk, bounded, and readable while it is written.

What a keeper has started in place of something else is in it too, as soon as there is a root supervisor that can write it down.

One JSON object a line (`Event`), in PATH and, older ones, in PATH.1; each has at most half of the bound.  A record is one write(2)
with O_APPEND: it is whole, or the last one before the power failed, and then it is left out.  It is not synced; what must be
durable is the state store's.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec

TEXT_CHARS_MAX = 1000  # an exception may hold a megabyte, and a log must not
SIZE_BYTES_MAX = 2 << 20


class Event(msgspec.Struct, frozen=True):
    """`what` is one of `rules.What`'s, `cause` one of `exits.Cause`'s.  `at_s`: seconds since 1970.

    `generation`: of an actor or its process; of a keeper's child, how many it had replaced then.
    `pause_s`: the child is started again after so long; None: it is not.
    """

    at_s: float
    supervisor: str
    child: str
    generation: int
    what: str
    cause: str
    text: str
    pause_s: float | None = None


def shortened(text: str) -> str:
    """A text for a record: its beginning and its end, and nothing that UTF-8 cannot say."""
    text = text.encode(errors="backslashreplace").decode()
    half = TEXT_CHARS_MAX // 2
    return text if len(text) <= TEXT_CHARS_MAX else f"{text[:half]} … {text[-half:]}"


class EventLog:
    """Appends to the log at `path`.  Thread-safe.  Raises OSError when it cannot be opened."""

    def __init__(self, path: Path, size_bytes_max: int = SIZE_BYTES_MAX) -> None:
        self._path = path
        self._half_bytes_max = size_bytes_max // 2
        self._lock = threading.Lock()
        self._descriptor, self._size_bytes = _open(path)

    def append(self, event: Event) -> None:
        """Write it down.  A disk that is full or broken costs the record, and nothing else."""
        line = msgspec.json.encode(event) + b"\n"
        with self._lock:
            try:
                if self._size_bytes + len(line) > self._half_bytes_max and self._size_bytes:
                    os.close(self._descriptor)
                    os.replace(self._path, f"{self._path}.1")
                    self._descriptor, self._size_bytes = _open(self._path)
                self._size_bytes += os.write(self._descriptor, line)
            except OSError:
                pass  # who supervises must go on; that the disk is full is said by those who need it

    def close(self) -> None:
        with self._lock:
            os.close(self._descriptor)
            self._descriptor = -1


def _open(path: Path) -> tuple[int, int]:
    """→ the descriptor, and the size in bytes."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    size_bytes = os.fstat(descriptor).st_size
    if size_bytes and os.pread(descriptor, 1, size_bytes - 1) != b"\n":
        size_bytes += os.write(descriptor, b"\n")  # ends the half of a record that a power cut left
    return descriptor, size_bytes


def read_events(path: Path) -> Iterator[Event]:
    """The log at `path`, the oldest first; what is no record is left out.  Nothing when there is none."""
    decoder = msgspec.json.Decoder(Event)
    for part in (f"{path}.1", path):
        try:
            lines = Path(part).read_bytes().splitlines()
        except FileNotFoundError:
            continue
        for line in lines:
            try:
                yield decoder.decode(line)
            except msgspec.DecodeError:
                pass
