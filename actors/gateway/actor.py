"""The GatewayActor: takes tasks, queues them, and tells whoever asked what became of them.

It owns the list of tasks and nothing else: a task's life is its SandboxActor's.  Everything it acknowledges is durable first, and
what it knows it can read from the store, so a restart of it, or of the daemon, is the way it starts.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import msgspec
from loguru import logger

from actors.cache import messages as cache
from actors.gateway.ledger import Ledger, QueueFull, Task, rfc3339
from actors.gateway.local import LocalBridge
from actors.gateway.messages import (
    Accepted,
    CheckStorage,
    Done,
    Ended,
    Failed,
    FailureKind,
    ImageMounted,
    Images,
    ImageState,
    IsReady,
    Listed,
    ListImages,
    ListTasks,
    LogDirectory,
    Logs,
    MountImage,
    Progress,
    PruneStorage,
    Ready,
    Request,
    ShowStorage,
    StillRunning,
    Stop,
    StorageChecked,
    StoragePruned,
    StorageShown,
    Submit,
    TaskResult,
    TaskSpec,
    Tree,
    TreeShown,
    UnmountImage,
    Wait,
)
from actors.gateway.request import TIMEOUT_MAX_S, faults
from actors.gateway.retention import Retention
from actors.gateway.tree import draw_tree
from actors.image import messages as images
from actors.sandbox.messages import RunTask, StopSandbox, TaskChanged, TaskEnded, TaskReleased
from actors.services import CACHE, IMAGES, SANDBOXES, Services
from supervisor.actor import Actor
from supervisor.answers import Answer, Refused, Worked, WorkFailed
from supervisor.frames import Message
from supervisor.tree import System

JANITOR_S = 30.0
PRUNE_S = 25e-6  # for each result that is kept: to look at one takes a fortieth of that
RETRY_S = 1.0


class Drain(Message, frozen=True):
    """Take no more tasks → Drained once no task runs; those that do are cancelled after `timeout_s`."""

    timeout_s: float


class Drained(Message, frozen=True):
    pass


@dataclass(frozen=True)
class FromClient:
    """A request that arrived at the bridge."""

    client: int
    request: Request


@dataclass(frozen=True)
class _Recorded:
    """An accepted task is durable, or could not be made so."""

    task: str
    error: str | None


@dataclass(frozen=True)
class _NotCancelled:
    """The end of a task that was stopped in the queue could not be recorded, which is tried until it can; no `error`: now again."""

    task: str
    error: str = ""


@dataclass(frozen=True)
class _WaitOver:
    client: int
    request: int
    task: str


@dataclass(frozen=True)
class _Removal:
    """Of tasks that the retention no longer keeps: rows and logs."""

    tasks: list[str]


class _DrainOver(Message, frozen=True):
    pass


class _Janitor(Message, frozen=True):
    """Look for what is to be forgotten: since tasks have ended, or because time has passed."""

    tasks_ended: bool


class GatewayActor(Actor):
    def __init__(self, system: System, name: str, services: Services, listener: Any) -> None:
        super().__init__(system, name)
        self._services = services
        settings = services.settings.gateway
        self._ledger = Ledger(settings.parallel, settings.queue)
        self._recording: dict[str, list[tuple[int, Submit]]] = {}
        self._asked: dict[int, tuple[int, Request]] = {}  # requests to the ImageActor, and for whom they are
        self._draining: list[Any] = []
        self._closed = False
        self._retention = Retention(services)
        self._expired: set[str] = set()  # being removed, and known until that is done: then their ids may be used again
        self._bridge = LocalBridge(listener, settings.connections, self._arrived)

    def _arrived(self, client: int, request: Request) -> None:
        self.mailbox(FromClient(client, request))

    # --- life ---

    def on_begin(self) -> None:
        rows = self._services.store.read(
            "SELECT task, number, spec, accepted_at, intended_at, started_at, result, released FROM tasks ORDER BY number"
        )
        decode = msgspec.msgpack.Decoder(TaskSpec).decode
        for task, number, spec, accepted_at, intended_at, started_at, result, released in rows:
            known = msgspec.msgpack.decode(result, type=TaskResult) if result else pending(task, accepted_at, started_at)
            running = not released and (intended_at is not None or result is not None)
            self._ledger.add(Task(task, decode(spec), known, number, running))
        for task in list(self._ledger.running):
            self._run(self._ledger.tasks[task])
        self._bridge.start()
        self._admit()
        self._will_prune = False
        self.after(JANITOR_S, _Janitor(False))

    def on_end(self, reason: object) -> None:
        self._bridge.stop()

    def on_message(self, message: Any) -> Any:
        match message:
            case FromClient(client, request):
                self._serve(client, request)
            case _Recorded(task, error):
                self._recorded(task, error)
            case TaskChanged(result):
                if result.task in self._ledger.tasks:
                    self._ledger.tasks[result.task].result = result
            case TaskEnded(result):
                self._ended(result)
            case _NotCancelled():
                self._not_cancelled(message)
            case images.ImageProgress(leases, text):
                self._show_progress(leases, text)
            case _WaitOver(client, request, task):
                self._wait_over(client, request, task)
            case Answer(_, TaskReleased(task)):
                self._released(task)
            case Answer(request, value):
                self._images_answered(request, value)
            case Refused(request, error):
                if request in self._asked:
                    client, asked = self._asked.pop(request)
                    of_cache = isinstance(asked, ShowStorage | PruneStorage | CheckStorage)
                    self._fail(client, asked, "internal" if of_cache else "image", error)
            case Worked(("tree", client, request), keeper):
                self._bridge.send(client, TreeShown(request, keeper))
            case WorkFailed(("tree", client, request), error):
                self._bridge.send(client, Failed(request, "internal", f"the tree could not be drawn: {error}"))
            case Worked(_Removal(tasks)) | WorkFailed(_Removal(tasks)):
                self._removed(tasks, message)
            case _Janitor():
                self._prune(message)
            case Drain(timeout_s):
                return self._drain(timeout_s)
            case _DrainOver():
                for task in self._ledger.running:
                    self.request(SANDBOXES, StopSandbox(task))
        return None

    # --- requests ---

    def _serve(self, client: int, request: Request) -> None:
        match request:
            case Submit():
                self._submit(client, request)
            case Wait(number, task, timeout_s):
                self._wait(client, request, task, timeout_s)
            case Stop(_, task, force):
                self._stop_task(client, request, task, force)
            case Logs(number, task):
                if known := self._known(client, request, task):
                    path = str(self._services.layout.task(task).output)
                    self._bridge.send(client, LogDirectory(number, path, known.result.ended))
            case ListTasks(number):
                for known in self._ledger.tasks.values():
                    self._bridge.send(client, Listed(number, known.result))
                self._bridge.send(client, Done(number))
            case Ready(number):
                if self._closed:
                    self._fail(client, request, "draining", "the daemon is stopping; start it again to run tasks")
                else:
                    self._bridge.send(client, IsReady(number, self._services.descriptors.welcome.pid))
            case Tree(number):
                self.work(("tree", client, number), draw_tree, self.system, self._services)
            case ListImages():
                self._ask_for(client, request, images.ListImages())
            case MountImage(number, image):
                lease = f"mount-{self._services.boot_id[:8]}-{client}-{number}-{time.time_ns():x}"
                self._ask_for(client, request, images.PrepareRootfs(lease, image, root=True))
            case UnmountImage(_, lease):
                self._ask_for(client, request, images.ReleaseRootfs(lease))
            case ShowStorage():
                self._ask_for(client, request, cache.CacheUsage(), CACHE)
            case CheckStorage():
                self._ask_for(client, request, cache.Check(), CACHE)
            case PruneStorage(_, size_bytes):
                self._ask_for(client, request, cache.Prune(size_bytes), CACHE)

    def _submit(self, client: int, request: Submit) -> None:
        known = self._ledger.tasks.get(request.task)
        if known is not None:
            if known.spec != request.spec:
                self._fail(
                    client, request, "conflict", f"task {request.task!r} exists already, with other content: choose another id"
                )
            elif request.task in self._recording:
                self._recording[request.task].append((client, request))
            else:
                self._accepted(client, request, known)
            return
        if self._closed:
            self._fail(client, request, "draining", "the daemon is stopping and takes no new tasks; start it again to run them")
            return
        if wrong := faults(request.task, request.spec):
            self._fail(client, request, "invalid", "\n".join(wrong))
            return
        try:
            self._ledger.check_room()
        except QueueFull as error:
            self._fail(client, request, "busy", str(error))
            return
        if not self._services.reserve.is_spare():
            # What is left is for the results of tasks that were taken before.
            self._fail(
                client,
                request,
                "disk_full",
                f"no task is taken while {self._services.layout.state} is full: free space on its disk",
            )
            return
        now = time.time()
        task = Task(request.task, request.spec, pending(request.task, now, None), self._ledger.next_number())
        self._ledger.tasks[task.task] = task
        self._recording[task.task] = [(client, request)]
        recorded = self._services.store.write(
            (
                "INSERT INTO tasks (task, number, spec, boot_id, accepted_at) VALUES (?, ?, ?, ?, ?)",
                (task.task, task.number, msgspec.msgpack.encode(task.spec), self._services.boot_id, now),
            )
        )
        mailbox = self.mailbox

        def done(future: Future[None]) -> None:
            error = future.exception()
            mailbox(_Recorded(task.task, None if error is None else str(error)))

        recorded.add_done_callback(done)

    def _recorded(self, task: str, error: str | None) -> None:
        asked = self._recording.pop(task, [])
        known = self._ledger.tasks[task]
        if error is not None:
            self._ledger.forget([task])
            for client, request in asked:
                self._fail(client, request, "internal", f"the task could not be recorded: {error}")
            return
        self._ledger.add(known)
        for client, request in asked:
            self._accepted(client, request, known)
        self._admit()

    def _accepted(self, client: int, request: Submit, known: Task) -> None:
        self._bridge.send(client, Accepted(request.request, request.task))
        if request.wait:
            known.watching.append((client, request.request))
            self._await_end(client, request.request, known)

    def _wait(self, client: int, request: Wait, task: str, timeout_s: float | None) -> None:
        known = self._known(client, request, task)
        if known is None:
            return
        if timeout_s is not None and not 0 <= timeout_s <= TIMEOUT_MAX_S:
            self._fail(client, request, "invalid", f"timeout {timeout_s:g}: it must be from 0 to ten years")
            return
        if not known.result.ended and timeout_s == 0:
            self._bridge.send(client, StillRunning(request.request, known.result))
            return
        self._await_end(client, request.request, known)
        if not known.result.ended and timeout_s is not None:
            self.after(timeout_s, _WaitOver(client, request.request, task))

    def _wait_over(self, client: int, request: int, task: str) -> None:
        known = self._ledger.tasks.get(task)
        if known is not None and (client, request) in known.waiting:
            known.waiting.remove((client, request))
            self._bridge.send(client, StillRunning(request, known.result))

    def _stop_task(self, client: int, request: Stop, task: str, force: bool) -> None:
        known = self._known(client, request, task)
        if known is None:
            return
        if self._ledger.withdraw(task):
            self._cancel_queued(known)
        elif not known.result.ended:
            self.request(SANDBOXES, StopSandbox(task, "cancelled", force))
        self._await_end(client, request.request, known)

    def _cancel_queued(self, known: Task) -> None:
        """A task that never ran ends as failed."""
        now = time.time()
        result = msgspec.structs.replace(
            known.result, state="failed", error="stopped before it was started", finished_at=rfc3339(now)
        )
        task, mailbox = known.task, self.mailbox
        recorded = self._services.store.write(
            (
                "UPDATE tasks SET result = ?, finished_at = ?, released = 1 WHERE task = ?",
                (msgspec.msgpack.encode(result), now, task),
            )
        )

        def done(future: Future[None]) -> None:
            error = future.exception()
            mailbox(TaskEnded(result) if error is None else _NotCancelled(task, str(error)))

        recorded.add_done_callback(done)

    def _not_cancelled(self, failed: _NotCancelled) -> None:
        if failed.error:
            logger.error("that task {} was stopped could not be recorded, trying again: {}", failed.task, failed.error)
            self.after(RETRY_S, _NotCancelled(failed.task))
        else:
            self._cancel_queued(self._ledger.tasks[failed.task])

    def _await_end(self, client: int, request: int, known: Task) -> None:
        if known.result.ended:
            self._bridge.send(client, Ended(request, known.result))
        else:
            known.waiting.append((client, request))

    def _known(self, client: int, request: Request, task: str) -> Task | None:
        known = self._ledger.tasks.get(task)
        if known is None:
            self._fail(
                client, request, "unknown_task", f"no task {task!r}: it was never submitted here, or its record has expired"
            )
        return known

    def _fail(self, client: int, request: Request, kind: FailureKind, error: str) -> None:
        self._bridge.send(client, Failed(request.request, kind, error))

    # --- tasks ---

    def _admit(self) -> None:
        if not self._closed:
            for task in self._ledger.admit():
                self._run(task)

    def _run(self, task: Task) -> None:
        # Asked, not told: a Sandbox supervisor that is started again is asked again, until all of the task is over.
        self.request(SANDBOXES, RunTask(task.task, task.spec))

    def _ended(self, result: TaskResult) -> None:
        """May be told twice, by a sandbox that was started again between recording and telling: then nobody waits any more."""
        known = self._ledger.tasks.get(result.task)
        if known is None:
            return
        known.result = result
        for client, request in known.waiting:
            self._bridge.send(client, Ended(request, result))
        known.waiting.clear()
        known.watching.clear()
        if not self._will_prune:
            # Not each time: to look at ten thousand results takes 6 ms.
            self._will_prune = True
            self.after(len(self._ledger.tasks) * PRUNE_S, _Janitor(True))

    def _released(self, task: str) -> None:
        self._ledger.released(task)
        self._admit()
        self._check_drained()

    def _show_progress(self, leases: list[str], text: str) -> None:
        for lease in leases:
            task = self._ledger.tasks.get(lease.removeprefix("task/"))
            for client, request in task.watching if task else ():
                self._bridge.send(client, Progress(request, text))
        for client, asked in self._asked.values():
            if isinstance(asked, MountImage):
                self._bridge.send(client, Progress(asked.request, text))

    def _prune(self, message: _Janitor) -> None:
        """Forget what the retention no longer keeps: rows, logs, and then the place in the list."""
        if message.tasks_ended:
            self._will_prune = False
        else:
            self.after(JANITOR_S, message)
        expired = [task for task in self._retention.expired(self._ledger) if task not in self._expired]
        if expired:
            self._expired.update(expired)
            self.work(_Removal(expired), self._retention.remove, expired)

    def _removed(self, tasks: list[str], done: Worked | WorkFailed) -> None:
        self._expired.difference_update(tasks)
        if isinstance(done, Worked):
            self._ledger.forget(tasks)
        else:
            logger.error(
                "{} tasks have reached their retention and cannot be removed, trying again: {}", len(tasks), done.error
            )

    # --- images ---

    def _ask_for(self, client: int, request: Request, message: Message, whom: str = IMAGES) -> None:
        self._asked[self.request(whom, message)] = (client, request)

    def _images_answered(self, number: int, value: Any) -> None:
        if number not in self._asked:
            return
        client, asked = self._asked.pop(number)
        match value:
            case images.RootfsReady():
                self._bridge.send(client, ImageMounted(asked.request, value.lease, value.path or "", value.digest))
            case images.Released(known=False) if isinstance(asked, UnmountImage):
                self._fail(
                    client, asked, "unknown_lease", f"no lease {asked.lease!r}: it was given back already, or never given"
                )
            case images.Released():
                self._bridge.send(client, Done(asked.request))
            case images.ImageList(rows):
                shown = [ImageState(row.reference, row.digest, row.path, row.leases, row.unpacked_bytes) for row in rows]
                self._bridge.send(client, Images(asked.request, shown))
            case cache.Usage():
                self._bridge.send(client, StorageShown(asked.request, value))
            case cache.Checked():
                self._bridge.send(client, StorageChecked(asked.request, value))
            case cache.Pruned():
                self._bridge.send(client, StoragePruned(asked.request, value))

    # --- the end ---

    def _drain(self, timeout_s: float) -> Any:
        self._closed = True
        done = self.deferred()
        self._draining.append(done)
        self.after(timeout_s, _DrainOver())
        self._check_drained()
        return done

    def _check_drained(self) -> None:
        if self._draining and not self._ledger.running:
            for done in self._draining:
                done.set(Drained())
            self._draining.clear()


def pending(task: str, accepted_at: float, started_at: float | None) -> TaskResult:
    """The result of a task that has not ended, as far as the store knows."""
    return TaskResult(
        task=task,
        state="pending" if started_at is None else "running",
        reason=None,
        exit_code=None,
        signal=None,
        error=None,
        sync="none",
        created_at=rfc3339(accepted_at),
        started_at=None if started_at is None else rfc3339(started_at),
        finished_at=None,
        duration_s=None,
    )
