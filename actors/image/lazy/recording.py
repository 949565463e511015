"""Recording traces, in an image mount's server: it sees what is asked of LAZY, and who records has his task ask LAZY for everything.

The kernel does not ask again for pages that it has.  So what is opened brings all along that was ever read of it from this server, when
it comes into a trace: too much rather than too little.  Several recordings at a time each get everything.  No I/O.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from actors.image.archives.trace import BLOCK_BYTES, BLOCKS_MAX, WINDOW_S, Block

TOUCHED_MAX = 100_000  # objects of which is remembered what was read


@dataclass
class _Recording:
    ends_at: float
    blocks: dict[Block, None] = field(default_factory=dict)  # a set that keeps the order
    reported: int = 0

    @property
    def is_full(self) -> bool:
        return len(self.blocks) >= BLOCKS_MAX


class Recorder:
    """The recordings that are under way, by name.  `clock`: seconds, monotonic."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._recordings: dict[str, _Recording] = {}
        self._touched: dict[int, int] = {}  # object → its blocks that were read, as bits

    def begin(self, name: str) -> None:
        """Record, from now on, for WINDOW_S at most."""
        self._recordings.setdefault(name, _Recording(self._clock() + WINDOW_S))

    def opened(self, index: int) -> None:
        touched = self._touched.get(index, 0)
        for recording in self._running():
            self._add(recording, index, touched)

    def read(self, index: int, offset: int, size: int) -> None:
        first, last = offset // BLOCK_BYTES, (offset + size - 1) // BLOCK_BYTES
        bits = ((1 << (last - first + 1)) - 1) << first
        if index in self._touched or len(self._touched) < TOUCHED_MAX:
            self._touched[index] = self._touched.get(index, 0) | bits
        for recording in self._running():
            self._add(recording, index, bits)

    def end(self, name: str) -> list[Block] | None:
        """It is over → what was recorded; None when there is no recording of that name."""
        recording = self._recordings.pop(name, None)
        return None if recording is None else list(recording.blocks)

    def ended(self) -> list[str]:
        """The recordings that are over: nothing more comes into them."""
        now = self._clock()
        return [name for name, recording in self._recordings.items() if recording.is_full or recording.ends_at <= now]

    def _running(self) -> list[_Recording]:
        if not self._recordings:
            return []
        now = self._clock()
        return [recording for recording in self._recordings.values() if recording.ends_at > now]

    def _add(self, recording: _Recording, index: int, bits: int) -> None:
        block = 0
        while bits and not recording.is_full:
            zeros = (bits & -bits).bit_length() - 1
            block += zeros
            recording.blocks[Block(index, block)] = None
            bits >>= zeros + 1
            block += 1
