"""The traces of one mounted image, as its mount's owner sees them: which there are, which are being recorded, and which came in.  No I/O.

A task of a workload of which nothing is known, or whose trace never became a pack, is recorded: it is given LAZY alone for its content, or
what is in OBJECTS would be missing in its trace.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from actors.image.archives.trace import BLOCKS_MAX, Trace, TraceInvalid, unpack_blocks
from actors.image.wire import TracePart


@dataclass
class Recorded:
    """A trace that has come in whole."""

    workload: str
    trace: Trace


@dataclass
class _Recording:
    workload: str
    blocks: bytearray = field(default_factory=bytearray)


class Tracing:
    """`known`: the workloads that have a pack, or whose trace has come."""

    def __init__(self, known: set[str]) -> None:
        self.known = known
        self._recordings: dict[str, _Recording] = {}

    def wants(self, workload: str) -> bool:
        """Whether a task of that workload should be recorded."""
        recorded = {recording.workload for recording in self._recordings.values()}
        return bool(workload) and workload not in self.known and workload not in recorded

    def begin(self, name: str, workload: str) -> None:
        self._recordings[name] = _Recording(workload)

    def is_recorded(self, name: str) -> bool:
        return name in self._recordings

    def take(self, part: TracePart) -> Recorded | None:
        """A part of a trace has come → the trace, if it was the last one and there is anything in it."""
        recording = self._recordings.get(part.name)
        if recording is None:
            return None
        recording.blocks += part.blocks
        if len(recording.blocks) <= 8 * BLOCKS_MAX and not part.last:
            return None
        del self._recordings[part.name]
        try:  # the server is nobody whom to believe
            blocks = unpack_blocks(bytes(recording.blocks))
        except TraceInvalid:
            return None
        if not blocks or len(blocks) > BLOCKS_MAX:
            return None
        self.known.add(recording.workload)
        return Recorded(recording.workload, Trace(blocks, part.fetched_bytes, part.fetching_s))
