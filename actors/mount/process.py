"""The syncer: one isolated process for the node.  It indexes stores and syncs workspaces, and may be killed at any instant."""

from __future__ import annotations

import ctypes
import gc
import os
import queue
import socket
import threading
import time
import traceback
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
    settling = _Workers(channel, SETTLING_MAX, _settle, gives_back=False)
    indexing = _Workers(channel, INDEXING_MAX, partial(_index, Indexer(order.run_dir), settling.jobs.put))
    changes = Changes()
    syncing = _Workers(channel, SYNCING_MAX, partial(_sync, changes))
    syncing_running = _Workers(channel, SYNCING_RUNNING_MAX, partial(_sync_running, changes))
    caching = _Workers(channel, 1, _cache)
    everybody = (indexing, settling, syncing, syncing_running, caching)
    beat_s = time.monotonic()
    while True:
        try:
            job, came = channel.receive(max(0.0, beat_s - time.monotonic()))
            for descriptor in came:
                os.close(descriptor)
            match job:
                case IndexWorkspace():
                    indexing.jobs.put(job)
                case CacheObjects():
                    caching.jobs.put(job)
                case SyncWorkspace():
                    (syncing_running if job.running else syncing).jobs.put(job)
        except ChannelTimeout:
            beat_s = time.monotonic() + HEARTBEAT_S
            beat = Progress(sum(who.running for who in everybody), sum(who.jobs.qsize() for who in everybody))
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

    `gives_back`: when there is nothing more to do, the memory that listings took goes back to the node.
    """

    def __init__(
        self, channel: Channel, count: int, work: Callable[[Any, Callable[[Message], None]], object], gives_back: bool = True
    ) -> None:
        self.jobs: queue.SimpleQueue[IndexWorkspace | SyncWorkspace | CacheObjects] = queue.SimpleQueue()
        self.running = 0
        self._channel = channel
        self._work = work
        self._gives_back = gives_back
        self._lock = threading.Lock()
        for _ in range(count):
            threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            job = self.jobs.get()
            self._count(1)
            try:
                self._work(job, self._send)
            except ChannelClosed:
                return
            except Exception as error:  # noqa: BLE001 (whatever it is, the job has an answer, and the other jobs go on)
                traceback.print_exc()
                self._send(JobFailed(job.job, f"{type(error).__name__}: {error}"))
            if self._gives_back and self.jobs.empty():
                gc.collect()
                _libc.malloc_trim(0)
            self._count(-1)

    def _send(self, answer: Message) -> None:
        self._channel.send(answer, timeout_s=None)

    def _count(self, change: int) -> None:
        with self._lock:
            self.running += change


def _index(
    indexer: Indexer, settle: Callable[[IndexWorkspace], None], job: IndexWorkspace, send: Callable[[Message], None]
) -> None:
    with closing(Objects(job.objects_dir)) as objects:
        try:
            listed = indexer.index(job.store, job.directory, objects, job.bounds, job.small_bytes_max, job.small_s, job.hold)
        except (OSError, TreeTooLarge, StagedChanges) as error:
            send(JobFailed(job.job, str(error)))
            return
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
    if _sync(None, job, send) and found:
        changes.synced(upper, found)


def _sync(changes: Changes | None, job: SyncWorkspace, send: Callable[[Message], None]) -> bool:
    """Sync a workspace; whether nothing is left to do.  `changes` may forget it then."""
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
    return done.settled


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
