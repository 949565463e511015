"""Messages between the mount supervisor and the syncer process.

Jobs go one way, and each has one answer: `Indexed`, `Synced` or `Cached`, or `JobFailed` when it could not be done at all.  Jobs of a
syncer that died are sent again to its successor; to do one twice is harmless.
"""

from __future__ import annotations

from actors.mount.listing import Bounds
from supervisor.frames import Codec, Message

TEXT_BYTES_MAX = 32 << 10  # of all the paths in one answer


class SyncerArguments(Message, frozen=True):
    """`lock`: a file that a syncer locks for its life; the next one's parent finds by it one that was left behind.

    `run_dir`: the daemon's, in whose name what a workspace was indexed on is held.
    """

    lock: str
    run_dir: str = ""


class IndexWorkspace(Message, frozen=True):
    """Make META, object table and listing of `store`, which is made if it is missing, in the task's `directory`.

    Small files are copied to `objects_dir`, at most `small_bytes_max` in all and for at most `small_s`.  `hold`: under this name all
    that is there of its content is kept from being evicted, until the name is given back; "": it is not.
    """

    job: str
    store: str
    directory: str
    objects_dir: str
    bounds: Bounds = Bounds()
    small_bytes_max: int = 256 << 20
    small_s: float = 0.5
    hold: str = ""


class Indexed(Message, frozen=True):
    """`entries` are listed.  `objects`: files that are not empty, of `content_bytes`; at most `missing` are not in OBJECTS.

    `skipped`: what of the store is not in the snapshot, and why; cut at some thousand bytes, `skipped_count` is all of it.
    """

    job: str
    entries: int
    objects: int
    content_bytes: int
    missing: int
    skipped: list[str]
    skipped_count: int


class SyncWorkspace(Message, frozen=True):
    """Merge the staging directory `directory`/upper, of a workspace indexed there, into `store`.

    `running`: the task goes on, and a sync after its end will follow; what it may still read from the store is left alone, and
    nothing is done when nothing has changed since the one before.
    """

    job: str
    task: str
    store: str
    directory: str
    running: bool = False
    bounds: Bounds = Bounds()


class Synced(Message, frozen=True):
    """The outcome: `synced`, `conflict`, or `sync_failed` with the reason in `error`; the task's directory then stays for
    another sync.

    `settled`: nothing is left that the next one could do.  What is said to be in the store is durable.  `conflicts`: paths whose
    change was not applied, where the task's version went instead, and why; `skipped`: what is never synced (devices,
    sockets...).  Both are cut as above.  `files` and `written_bytes` were written by this job.
    """

    job: str
    outcome: str
    conflicts: list[str]
    conflicts_count: int
    skipped: list[str]
    skipped_count: int
    error: str
    files: int
    written_bytes: int
    settled: bool = True


class ReadWhole(Message, frozen=True):
    """From a workspace mount: a task has read these objects (indexes into the table) as a whole, through LAZY."""

    rows: list[int]


class CacheObjects(Message, frozen=True):
    """Copy the objects `rows` of the workspace indexed in `directory` from `store` to `objects_dir`, for tasks that come later."""

    job: str
    store: str
    directory: str
    objects_dir: str
    rows: list[int]


class Cached(Message, frozen=True):
    """So many of the objects are in OBJECTS now; of the others the store has another version by now, or they are too large."""

    job: str
    objects: int


class JobFailed(Message, frozen=True):
    """The job could not be done; the text says why."""

    job: str
    error: str


class Progress(Message, frozen=True):
    """Heartbeat, every second: jobs being done, and waiting to be."""

    running: int
    waiting: int


JOBS = Codec(IndexWorkspace, SyncWorkspace, CacheObjects)  # what the process accepts
ANSWERS = Codec(Indexed, Synced, Cached, JobFailed, Progress)  # what its parent accepts
