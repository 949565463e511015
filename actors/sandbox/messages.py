"""What may be said to the sandboxes and to one sandbox, and what they answer and tell."""

from __future__ import annotations

from typing import Literal

from actors.gateway.messages import TaskResult, TaskSpec
from supervisor.frames import Message


class RunTask(Message, frozen=True):
    """Create, start, wait for and delete a sandbox for a task that is recorded → TaskReleased, when all of it is over.

    Meanwhile the gateway is told `TaskChanged` and `TaskEnded`.  Asked again for a task whose sandbox lives, it only waits for the
    same end.
    """

    task: str
    spec: TaskSpec


class CreateSandbox(Message, frozen=True):
    """Make a sandbox that waits for `StartSandbox` → SandboxState, or Refused: an id that is taken is an error."""

    task: str
    spec: TaskSpec


class StartSandbox(Message, frozen=True):
    """Start a created sandbox → SandboxState."""

    task: str


class StopSandbox(Message, frozen=True):
    """SIGTERM to all, SIGKILL after the grace period or at once with `force` → SandboxState.

    `cause`: "cancelled" or "timeout"; the first one said counts.
    """

    task: str
    cause: Literal["cancelled", "timeout"] = "cancelled"
    force: bool = False


class DeleteSandbox(Message, frozen=True):
    """Give back all that an ended sandbox had; with `force` a running one is killed first → SandboxState."""

    task: str
    force: bool = False


class GetSandbox(Message, frozen=True):
    """→ SandboxState; Refused when there is none."""

    task: str


class ListSandboxes(Message, frozen=True):
    """→ SandboxList"""


class Sink(Message, frozen=True):
    """Where lines go besides the journal: `console`, or `file` with an absolute path, which begins empty and is this task's alone."""

    kind: str
    path: str = ""


class SetOutput(Message, frozen=True):
    """Choose the sinks of a sandbox that has not been started → SandboxState, when it is on record; Refused afterwards, for an unknown
    kind, and for a file that is another sink's, of this task or another.
    """

    task: str
    sinks: list[Sink]


class SandboxState(Message, frozen=True):
    """`status`: pending, creating, running, stopped or failed."""

    id: str
    status: str
    pid: int | None
    exit_code: int | None
    error: str | None
    address: str | None
    created_at: str
    started_at: str | None
    finished_at: str | None


class SandboxList(Message, frozen=True):
    sandboxes: list[SandboxState]


# --- told to the gateway -----------------------------------------------------------------------------------------------------


class TaskChanged(Message, frozen=True):
    """The result as it stands, not final."""

    result: TaskResult


class TaskEnded(Message, frozen=True):
    """The result, which is durable."""

    result: TaskResult


class TaskReleased(Message, frozen=True):
    """Everything that the task had is given back."""

    task: str


# --- told to a sandbox -------------------------------------------------------------------------------------------------------


class ReadFailed(Message, frozen=True):
    """A read inside the task ended in EIO; the reason belongs in the task's record."""

    task: str
    reason: str


class OutputGap(Message, frozen=True):
    """Output of the task is known to be missing, or may be."""

    task: str


TO_ONE = (StartSandbox, StopSandbox, DeleteSandbox, GetSandbox, SetOutput)
"""What is asked of one sandbox, and answered with its state."""
