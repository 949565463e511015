"""Messages between the OutputActor and the output mover.

Whatever is ordered is ordered again of a successor; each order may be carried out twice.
"""

from __future__ import annotations

from typing import Final

from actors.sandbox.messages import Sink
from supervisor.frames import Codec, Message


class MoverArguments(Message, frozen=True):
    """`lock`: a file that a mover locks for its life, so that two never write to one sink."""

    lock: str


class FollowTask(Message, frozen=True):
    """Bring the lines in `directory` to the sinks, each from its position (`sinks.SinkPosition` as msgpack), or from the start."""

    task: str
    directory: str
    sinks: list[Sink]
    positions: dict[str, bytes]


class FinishTask(Message, frozen=True):
    """Nobody writes to the task's output any more → Drained when every sink has it all."""

    task: str


class PumpTask(Message, frozen=True):
    """Move what comes through the pipes, whose read ends came along in the order of `streams`, to the spills → Pumped at their end."""

    task: str
    directory: str
    streams: list[str]


class Moved(Message, frozen=True):
    """How far a sink is, durably."""

    task: str
    sink: str
    position: bytes


class Drained(Message, frozen=True):
    task: str


class Pumped(Message, frozen=True):
    task: str


class SinkFailed(Message, frozen=True):
    """A sink (or a spill, which is called "spill") does not take lines; they are kept and tried again.  Once for each outage."""

    task: str
    sink: str
    error: str


class Progress(Message, frozen=True):
    """Heartbeat, every second: tasks followed, and pipes pumped."""

    followed: int
    pumped: int


# A position holds a partial line of each stream (lines.LINE_BYTES_MAX), FollowTask the positions of all sinks: of four at least.
# The kernel takes packets of up to net.core.wmem_default, 208 KiB.
FRAME_BYTES_MAX: Final = 160 << 10
ORDERS: Final = Codec(FollowTask, FinishTask, PumpTask, size_bytes_max=FRAME_BYTES_MAX)
ANSWERS: Final = Codec(Moved, Drained, Pumped, SinkFailed, Progress, size_bytes_max=FRAME_BYTES_MAX)
