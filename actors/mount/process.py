"""The syncer: one isolated process for the node.  It indexes stores and syncs workspaces, and may be killed at any instant."""

from __future__ import annotations

import ctypes
import gc
import os
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

from actors.lazytree.objects import Objects
from actors.mount.changes import Changes
from actors.mount.indexing import Indexer, StagedChanges, cache
from actors.mount.listing import TreeTooLarge, make_listing_durable
from actors.mount.staging import UPPER
from actors.mount.sync import SYNCED, sync
from actors.mount.wire import (
    JOBS,
    TEXT_BYTES_MAX,
    Cached,
    CacheObjects,
    Indexed,
    IndexWorkspace,
    JobFailed,
    Progress,
    Synced,
    SyncerArguments,
    SyncWorkspace,
)
from supervisor.channel import Channel, ChannelClosed, ChannelTimeout
from supervisor.frames import Codec, Message
from supervisor.lockfile import LockFile

HEARTBEAT_S = 1.0
# Jobs at once.  A listing never waits for an upload, nor a task that has ended for one that runs.
INDEXING_MAX, SYNCING_MAX, SYNCING_RUNNING_MAX = 2, 4, 2
SETTLING_MAX = 8  # they do nothing but wait for the disk, for which one wait does as well as eight

_libc = ctypes.CDLL(None)
_M_ARENA_MAX = -8  # mallopt(3)


def serve(end: socket.socket, descriptors: list[int], arguments: bytes) -> None:
    """The entry: do jobs until the channel is closed; jobs in hand then end with the process."""
    for descriptor in descriptors:
        os.close(descriptor)
    order: SyncerArguments = Codec(SyncerArguments).decode(arguments)
    LockFile(Path(order.lock)).acquire(wait=True)  # held for as long as this process lives; a predecessor may be dying
    # A listing makes some hundred thousand objects; collections on the way would cost as much as the rest.  One comes after it.
    gc.freeze()
    gc.disable()
    _libc.mallopt(_M_ARENA_MAX, 1)  # an arena to each thread would keep three times as much from being given back
    channel = Channel(end, JOBS)
    settling = _Workers(channel, SETTLING_MAX, _each(_settle), gives_back=False)
    indexing = _Workers(channel, INDEXING_MAX, partial(_index, Indexer(order.run_dir), settling.put), together=_listed_alike)
    changes = Changes()
    syncing = _Workers(channel, SYNCING_MAX, _each(partial(_sync, changes)))
    syncing_running = _Workers(channel, SYNCING_RUNNING_MAX, _each(partial(_sync_running, changes)))
    caching = _Workers(channel, 1, _each(_cache))
    everybody = (indexing, settling, syncing, syncing_running, caching)
    beat_s = time.monotonic()
    while True:
        try:
            job, came = channel.receive(max(0.0, beat_s - time.monotonic()))
            for descriptor in came:
                os.close(descriptor)
            match job:
                case IndexWorkspace():
                    indexing.put(job)
                case CacheObjects():
                    caching.put(job)
                case SyncWorkspace():
                    (syncing_running if job.running else syncing).put(job)
        except ChannelTimeout:
            beat_s = time.monotonic() + HEARTBEAT_S
            beat = Progress(sum(who.running for who in everybody), sum(who.waiting for who in everybody))
            try:
                channel.send(beat, timeout_s=0)
            except ChannelTimeout:
                pass  # the parent has not read the last ones yet; it is not for us to wait
            except ChannelClosed:
                return
        except ChannelClosed:
            return


class _Workers:
    """Threads that do jobs and send the answers.  They are no reason for the process to stay.

    `gives_back`: when there is nothing more to do, the memory that listings took goes back to the node.  `together`: `work` gets all
    jobs that wait and of which this says the same; without it, each by itself.
    """

    def __init__(
        self,
        channel: Channel,
        count: int,
        work: Callable[[list[Any], Callable[[Message], None]], object],
        gives_back: bool = True,
        together: Callable[[Any], object] | None = None,
    ) -> None:
        self.running = 0
        self._channel = channel
        self._work = work
        self._gives_back = gives_back
        self._together = together
        self._jobs: deque[IndexWorkspace | SyncWorkspace | CacheObjects] = deque()
        self._change = threading.Condition()
        for _ in range(count):
            threading.Thread(target=self._run, daemon=True).start()

    def put(self, job: IndexWorkspace | SyncWorkspace | CacheObjects) -> None:
        with self._change:
            self._jobs.append(job)
            self._change.notify()

    @property
    def waiting(self) -> int:
        return len(self._jobs)

    def _run(self) -> None:
        while True:
            jobs = self._take()
            try:
                self._work(jobs, self._send)
            except ChannelClosed:
                return
            except Exception as error:  # noqa: BLE001 (whatever it is, the jobs have an answer, and the others go on)
                traceback.print_exc()
                for job in jobs:
                    self._send(JobFailed(job.job, f"{type(error).__name__}: {error}"))
            if self._gives_back and not self._jobs:
                gc.collect()
                _libc.malloc_trim(0)
            with self._change:
                self.running -= len(jobs)

    def _take(self) -> list[IndexWorkspace | SyncWorkspace | CacheObjects]:
        with self._change:
            while not self._jobs:
                self._change.wait()
            jobs = [self._jobs.popleft()]
            if self._together is not None:
                alike = self._together(jobs[0])
                jobs += [job for job in self._jobs if self._together(job) == alike]
                self._jobs = deque(job for job in self._jobs if self._together(job) != alike)
            self.running += len(jobs)
            return jobs

    def _send(self, answer: Message) -> None:
        self._channel.send(answer, timeout_s=None)


def _each(work: Callable[[Any, Callable[[Message], None]], object]) -> Callable[[list[Any], Callable[[Message], None]], None]:
    def work_on(jobs: list[Any], send: Callable[[Message], None]) -> None:
        for job in jobs:
            work(job, send)

    return work_on


def _listed_alike(job: IndexWorkspace) -> object:
    """Tasks that begin with the same store may have the same listing of it, if that was begun when all of them had asked."""
    return job.store, job.objects_dir, job.bounds, job.small_bytes_max, job.small_s


def _index(
    indexer: Indexer, settle: Callable[[IndexWorkspace], None], jobs: list[IndexWorkspace], send: Callable[[Message], None]
) -> None:
    first = jobs[0]
    with closing(Objects(first.objects_dir)) as objects:
        try:
            holds = [job.hold for job in jobs if job.hold]
            found = indexer.look(
                first.store, first.directory, objects, first.bounds, first.small_bytes_max, first.small_s, holds
            )
        except TreeTooLarge as error:
            for job in jobs:
                send(JobFailed(job.job, str(error)))
            return
        except OSError as error:
            if len(jobs) > 1:  # it may be one task's alone, whose directory is gone for instance
                for job in jobs:
                    _index(indexer, settle, [job], send)
            else:
                send(JobFailed(first.job, str(error)))
            return
    for job in jobs:
        try:
            listed = found.put(job.directory)
        except (OSError, StagedChanges) as error:
            send(JobFailed(job.job, str(error)))
            continue
        skipped, skipped_count = _shown(f"{_readable(path)}: {reason}" for path, reason in listed.skipped)
        send(Indexed(job.job, listed.entries, listed.objects, listed.content_bytes, listed.missing, skipped, skipped_count))
        settle(job)


def _settle(job: IndexWorkspace, send: Callable[[Message], None]) -> None:
    """Nobody needs to wait for it, for staging is empty still; the next listing neither."""
    with suppress(FileNotFoundError):  # the task is over already
        make_listing_durable(job.directory)


def _cache(job: CacheObjects, send: Callable[[Message], None]) -> None:
    with closing(Objects(job.objects_dir)) as objects:
        try:
            count = cache(job.store, job.directory, objects, job.rows)
        except FileNotFoundError:  # the task is over already
            count = 0
    send(Cached(job.job, count))


def _sync_running(changes: Changes, job: SyncWorkspace, send: Callable[[Message], None]) -> None:
    """Sync the workspace of a task that goes on, if something has changed in it."""
    upper = os.path.join(job.directory, UPPER)
    try:
        found = changes.look(upper, job.bounds)
    except (OSError, TreeTooLarge):
        found = b""  # it changes just now, or the sync will say what is wrong with it
    if found is None:
        send(Synced(job.job, SYNCED, [], 0, [], 0, "", 0, 0))
        return

    def remember_and_send(done: Message) -> None:  # in this order: who has the answer may ask again at once, of another thread
        if found and isinstance(done, Synced) and done.settled:
            changes.synced(upper, found)
        send(done)

    _sync(None, job, remember_and_send)


def _sync(changes: Changes | None, job: SyncWorkspace, send: Callable[[Message], None]) -> None:
    """Sync a workspace.  `changes` may forget it then."""
    if changes is not None:
        changes.forget(os.path.join(job.directory, UPPER))
    done = sync(job.store, job.directory, job.task, job.bounds, job.running)
    conflicts, conflicts_count = _shown(
        f"{_readable(conflict.path)}{f' (now {_readable(conflict.beside)})' if conflict.beside else ''}: {conflict.reason}"
        for conflict in done.conflicts
    )
    skipped, skipped_count = _shown(f"{_readable(path)}: {reason}" for path, reason in done.skipped)
    send(
        Synced(
            job.job,
            done.outcome,
            conflicts,
            conflicts_count,
            skipped,
            skipped_count,
            done.error,
            done.files,
            done.written_bytes,
            done.settled,
        )
    )


def _readable(path: bytes) -> str:
    return path.decode("utf-8", "backslashreplace")


def _shown(texts: Iterable[str]) -> tuple[list[str], int]:
    """As many of the texts as fit into half an answer, and how many there are."""
    shown, count, left_bytes = [], 0, TEXT_BYTES_MAX // 2
    for text in texts:
        count += 1
        left_bytes -= len(text.encode())
        if left_bytes >= 0:
            shown.append(text)
    return shown, count
