"""What may be said to the OutputActor, and what it answers."""

from __future__ import annotations

from actors.sandbox.messages import Sink
from supervisor.frames import Message


class FollowOutput(Message, frozen=True):
    """Bring a task's lines to these sinks, each from the position that is on record → OutputDrained, when all is there.

    Not answered before: an OutputActor that is started again is asked again.
    """

    task: str
    sinks: list[Sink]


class PumpOutput(Message, frozen=True):
    """conmon was killed: empty the task's pipes, which are held, in its place → Pumped when both are at their end."""

    task: str


class Pumped(Message, frozen=True):
    """`gaps`: records of output that may be missing."""

    gaps: int


class FinishOutput(Message, frozen=True):
    """Nothing more will be printed by a followed task → OutputDrained, too."""

    task: str


class OutputDrained(Message, frozen=True):
    pass
