"""What `run.py` and the daemon say to each other: the messages of the local gateway, and nothing else.

The daemon listens on the stream socket `RUN/aerie.sock` (0600).  A frame is a 4-byte big-endian length and that many bytes of
msgpack (`supervisor.frames`), at most FRAME_BYTES_MAX.  A client decodes `ANSWERS`, the daemon decodes `REQUESTS`.

Rules

- Each request carries `request`, a number above 0 that the client chose; every answer to it carries the same number.  Many
  requests may be in flight on one connection, and answers come in any order.
- Each request gets exactly one *last* answer, or `Failed` in its place.  Before it, `Submit` and `MountImage` may get any
  number of `Progress`, `ListTasks` any number of `Listed`, and `Submit(wait=True)` one `Accepted`.
- What cannot be decoded is answered with `Failed(request=0, kind="invalid")`, after which the daemon closes the connection.
- A connection that ends takes nothing with it: an accepted task runs on, a lease stays.
- Everything but `MountImage` may be sent again after a lost answer.  `Submit` can, because its task id is the client's: the same
  id with the same content is the same task.

Units are in the names; times are RFC 3339 in UTC with a `Z`.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from actors.cache.messages import Checked, Pruned, Usage
from actors.image.registry.login import Login
from actors.settings import Runtime
from supervisor.frames import Message

SOCKET_NAME: Final = "aerie.sock"  # in the run directory
FRAME_BYTES_MAX: Final = 1 << 20

State = Literal["pending", "creating", "running", "stopped", "failed"]
Reason = Literal["exited", "signalled", "oom", "timeout", "cancelled", "lost"]
Sync = Literal["none", "synced", "conflict", "sync_failed"]
Failure = Literal["not_found", "not_executable", "other"]
Kind = Literal["supervisor", "actor", "process"]
FailureKind = Literal[
    "invalid",  # the request itself is wrong; the text lists every fault
    "unknown_task",
    "unknown_lease",
    "conflict",  # the id is taken by a task with other content
    "busy",  # the queue is full; try again later
    "disk_full",  # no task is taken that could not be recorded
    "draining",  # the daemon is stopping and takes no new tasks
    "image",  # MountImage only: the image could not be found, fetched, unpacked or mounted
    "internal",  # the daemon's fault; its log has the traceback
]

EXIT_NOT_ENDED: Final = 3  # `result` of a task that has not ended
EXIT_NO_DAEMON: Final = 69  # EX_UNAVAILABLE of sysexits.h
EXIT_NOT_PERMITTED: Final = 77  # EX_NOPERM
EXIT_CODES: Final[dict[FailureKind, int]] = {
    "invalid": 2,
    "unknown_task": 4,
    "unknown_lease": 4,
    "conflict": 5,
    "busy": 75,  # EX_TEMPFAIL
    "disk_full": 74,  # EX_IOERR
    "draining": 75,
    "image": 125,
    "internal": 70,  # EX_SOFTWARE
}


# --- what messages carry; plain structs, so that their JSON is exactly what `--json` prints -------------------------------


class TaskSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to run.  The client has filled in every default; `actors.gateway.request.faults` says what is wrong with one."""

    image: str  # as the user wrote it; the ImageActor normalises it
    command: list[str]  # at least one, before the image's Entrypoint is put in front
    env: dict[str, str]  # wins over the image's Env
    workspace: str | None  # name of a directory in STATE/workspaces; None: empty, and thrown away
    cpu_cores: float
    memory_bytes: int
    timeout_s: float | None  # counted from the start of the command; None: no limit
    runtime: Runtime
    login: Login | None = None  # for the image's registry; None: the node's own, if it has one


class TaskResult(msgspec.Struct, frozen=True):
    """What is known of a task.  In the state `stopped` or `failed` it is final: output is whole and `sync` decided.

    The fields up to `duration_s` are the contract of `result --json`.
    """

    task: str
    state: State
    reason: Reason | None  # None: has not ended, or never ran
    exit_code: int | None
    signal: int | None  # the signal's number; exit_code is None then
    error: str | None  # what went wrong and what to do about it
    sync: Sync
    created_at: str
    started_at: str | None
    finished_at: str | None
    duration_s: float | None  # from started_at to finished_at
    failure: Failure | None = None  # state `failed` only: the command is not in the image, not executable, or anything else
    conflicts: list[str] = []  # paths in the workspace that were kept as NAME.aerie-conflict-TASK (the first 100)
    gaps: int = 0  # output gap records: places where output is known to be missing
    skipped: list[str] = []  # what in the workspace never comes back (devices, pipes, sockets), and why (the first 100)

    @property
    def ended(self) -> bool:
        return self.state in ("stopped", "failed")


class TreeNode(msgspec.Struct, frozen=True):
    """A supervisor, actor or process of the daemon.  The top one is the keeper."""

    name: str
    kind: Kind
    pid: int | None  # an actor has its process's
    state: str
    restarts: int
    children: list[TreeNode]


class ImageState(msgspec.Struct, frozen=True):
    """An image that this node has an archive of."""

    image: str  # normalised reference
    digest: str  # of its manifest: sha256:…
    path: str | None  # where its root is mounted; None: it is not
    leases: list[str]  # of `image mount` and of tasks
    unpacked_bytes: int


# --- requests: client to daemon -------------------------------------------------------------------------------------------


class Ready(Message, frozen=True):
    """Does the daemon take tasks?  Answer: IsReady, as soon as it does."""

    request: int


class Submit(Message, frozen=True):
    """Run `spec` as `task`.

    Answers: Accepted once the task is recorded durably; with `wait` also Ended when it has ended, and Progress before that.
    """

    request: int
    task: str
    spec: TaskSpec
    wait: bool


class Wait(Message, frozen=True):
    """Wait for a task's end, at most `timeout_s` (None: as long as it takes; 0: just look).  Answer: Ended or StillRunning."""

    request: int
    task: str
    timeout_s: float | None


class Stop(Message, frozen=True):
    """End a task: SIGTERM and, after the grace period or at once with `force`, SIGKILL.  Answer: Ended, when it has ended."""

    request: int
    task: str
    force: bool


class Logs(Message, frozen=True):
    """Where is a task's output?  Answer: LogDirectory."""

    request: int
    task: str


class ListTasks(Message, frozen=True):
    """Answers: one Listed for each task that is known, oldest first, then Done."""

    request: int


class Tree(Message, frozen=True):
    """Answer: TreeShown."""

    request: int


class ListImages(Message, frozen=True):
    """Answer: Images."""

    request: int


class MountImage(Message, frozen=True):
    """Mount an image's root, read-only, until its lease is given back.  Answer: ImageMounted, and Progress before it."""

    request: int
    image: str


class UnmountImage(Message, frozen=True):
    """Give a lease back.  Answer: Done."""

    request: int
    lease: str


class ShowStorage(Message, frozen=True):
    """Answer: StorageShown."""

    request: int


class PruneStorage(Message, frozen=True):
    """Evict content of so many bytes, or all that may go, before it is necessary.  Answer: StoragePruned."""

    request: int
    size_bytes: int


class CheckStorage(Message, frozen=True):
    """Look at all content of images on this node, and repair what is damaged.  Answer: StorageChecked."""

    request: int


Request = (
    Ready | Submit | Wait | Stop | Logs | ListTasks | Tree | ListImages | MountImage | UnmountImage | ShowStorage
    | PruneStorage | CheckStorage
)  # fmt: skip
REQUESTS: Final = (
    Ready, Submit, Wait, Stop, Logs, ListTasks, Tree, ListImages, MountImage, UnmountImage, ShowStorage, PruneStorage,
    CheckStorage,
)  # fmt: skip


# --- answers: daemon to client --------------------------------------------------------------------------------------------


class IsReady(Message, frozen=True):
    request: int
    pid: int  # the keeper's


class Accepted(Message, frozen=True):
    """The task is recorded and will run (or has run: the same id may be submitted again)."""

    request: int
    task: str


class Progress(Message, frozen=True):
    """One short line for a human about what a request waits for: `docker.io/library/ubuntu:latest: 31 of 77 MiB`."""

    request: int
    text: str


class Ended(Message, frozen=True):
    request: int
    result: TaskResult


class StillRunning(Message, frozen=True):
    request: int
    result: TaskResult


class LogDirectory(Message, frozen=True):
    """Where `actors.output.follower.Follower` finds the task's output.  `ended`: it is whole, nothing will be added."""

    request: int
    path: str
    ended: bool


class Listed(Message, frozen=True):
    request: int
    result: TaskResult


class TreeShown(Message, frozen=True):
    request: int
    keeper: TreeNode


class Images(Message, frozen=True):
    request: int
    images: list[ImageState]


class ImageMounted(Message, frozen=True):
    request: int
    lease: str
    path: str
    digest: str


class StorageShown(Message, frozen=True):
    request: int
    usage: Usage


class StoragePruned(Message, frozen=True):
    request: int
    pruned: Pruned


class StorageChecked(Message, frozen=True):
    request: int
    checked: Checked


class Done(Message, frozen=True):
    request: int


class Failed(Message, frozen=True):
    """In place of the last answer.  `error` says what is wrong and what to do about it, for a human, without a traceback."""

    request: int  # 0: the request could not be read
    kind: FailureKind
    error: str


Answer = (
    IsReady
    | Accepted
    | Progress
    | Ended
    | StillRunning
    | LogDirectory
    | Listed
    | TreeShown
    | Images
    | ImageMounted
    | StorageShown
    | StoragePruned
    | StorageChecked
    | Done
    | Failed
)
ANSWERS: Final = (
    IsReady, Accepted, Progress, Ended, StillRunning, LogDirectory, Listed, TreeShown, Images, ImageMounted, StorageShown,
    StoragePruned, StorageChecked, Done, Failed,
)  # fmt: skip


def is_last(answer: Answer, request: Request | None) -> bool:
    """Whether nothing follows `answer` to `request`."""
    if isinstance(answer, Accepted):
        return isinstance(request, Submit) and not request.wait
    return not isinstance(answer, (Progress, Listed))
