"""What may be said to the OutputActor, and what it answers."""

from __future__ import annotations

from actors.sandbox.messages import Sink
from supervisor.frames import Message


class FollowOutput(Message, frozen=True):
    """Bring a task's lines to these sinks, each from the position that is on record."""

    task: str
    sinks: list[Sink]


class PumpOutput(Message, frozen=True):
    """conmon was killed: empty the task's pipes, which are held, in its place → Pumped when both are at their end."""

    task: str


class Pumped(Message, frozen=True):
    """`gaps`: records of output that may be missing."""

    gaps: int


class FinishOutput(Message, frozen=True):
    """Nothing more will be written → OutputDrained once every sink has it all."""

    task: str


class OutputDrained(Message, frozen=True):
    pass
