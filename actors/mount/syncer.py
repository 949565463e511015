"""The actor of the node's one syncer process: hands it jobs, and hands them to its successor when it dies.

A workspace whose sync failed keeps its staging directory, and is tried again here, at the start and every RETRY_S, until it succeeds,
and the directory goes; also after a restart of the daemon, for the directory itself says that it is not done.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from loguru import logger

from actors.mount import wire
from actors.mount.journal import no_more_syncs
from actors.mount.listing import LISTING, Bounds
from actors.services import SYNCER, Services
from actors.settings import Settings
from supervisor.actor import Actor
from supervisor.answers import Worked, WorkFailed
from supervisor.frames import Message
from supervisor.isolation import Process
from supervisor.lockfile import evict
from supervisor.processes import ProcessRow
from supervisor.tree import System
from supervisor.worker import Ended, Said, Started, Worker

RETRY_S = 60.0
AGAIN = "again "  # what the names of jobs of `unfinished` workspaces begin with
RESTART_S = 0.2  # after a syncer that could not do without dying


class _Retry(Message, frozen=True):
    pass


class _StartAgain(Message, frozen=True):
    pass


class SyncerActor(Actor):
    """Messages: `wire.IndexWorkspace`, `wire.SyncWorkspace` and `wire.CacheObjects`; the answer is the process's, later."""

    def __init__(self, system: System, name: str, services: Services) -> None:
        super().__init__(system, name)
        self._services = services
        self._worker = Worker(self, services.watcher, SYNCER)
        self._jobs: dict[str, tuple[Message, list[Any]]] = {}

    def on_begin(self) -> None:
        self._worker.start(self._make)
        self.mailbox(_Retry())

    def on_end(self, reason: object) -> None:
        self._worker.let_go()

    def on_message(self, message: Any) -> Any:
        match message:
            case wire.IndexWorkspace() | wire.SyncWorkspace() | wire.CacheObjects():
                return self._take(message)
            case _Retry():
                self._retry()
                self.after(RETRY_S, message)
                return None
            case _StartAgain():
                self._worker.start(self._make)
                return None
            case Worked("remove", task):
                logger.info("what task {} wrote is in its store now", task)
                return None
            case WorkFailed("remove", error):
                logger.error("what a task wrote is in its store, but could not be removed from its directory: {}", error)
                return None
        match self._worker.take(message):
            case Started():
                self._services.processes.put(self.name, ProcessRow(SYNCER, self._worker.pid or 0, self._worker.restarts))
                for job, _ in self._jobs.values():
                    self._worker.send(job)
            case Said(_, _, wire.Indexed() | wire.Synced() | wire.Cached() | wire.JobFailed() as answer):
                done, waiting = self._jobs.pop(answer.job, (None, []))
                for reply in waiting:
                    reply.set(answer)
                if isinstance(done, wire.SyncWorkspace) and answer.job.startswith(AGAIN):
                    self._tried_again(done, answer)
            case Ended(_, _, how):
                logger.warning("the syncer has ended ({}); its {} jobs go to another one", how, len(self._jobs))
                self._services.processes.remove(self.name, SYNCER)
                self.after(RESTART_S if self._worker.restarts > 1 else 0.0, _StartAgain())
        return None

    def _take(self, job: wire.IndexWorkspace | wire.SyncWorkspace | wire.CacheObjects) -> Any:
        """Hand a job over, once: who asks again while it is done gets the same answer."""
        reply = self.deferred()
        if job.job in self._jobs:
            self._jobs[job.job][1].append(reply)
        else:
            self._jobs[job.job] = (job, [reply])
            self._worker.send(job)
        return reply

    def _retry(self) -> None:
        for job in unfinished(self._services):
            if job.job not in self._jobs:
                self._jobs[job.job] = (job, [])
                self._worker.send(job)

    def _tried_again(self, job: wire.SyncWorkspace, answer: Message) -> None:
        if isinstance(answer, wire.Synced) and answer.outcome != "sync_failed":
            self.work("remove", self._remove, job)

    def _remove(self, job: wire.SyncWorkspace) -> str:
        remove_staging(self._services, Path(job.directory))
        return job.task

    def _make(self) -> Process:
        lock = self._services.layout.run / "syncer.lock"
        evict(lock)
        order = wire.SyncerArguments(str(lock), self._services.settings.run.dir)
        return self._services.isolation.start(SYNCER, "actors.mount.process:serve", order, wire.ANSWERS)


def keep_for_later(home: Path, store: str) -> None:
    """Note in a workspace's directory that its staging has not reached the store."""
    unnamed = home / ".unsynced"
    unnamed.write_text(store)
    unnamed.rename(home / "unsynced")  # whole or not at all, for it says where the staging is to go


def waits_for_later(home: Path) -> bool:
    """Whether a workspace's directory holds what has not reached its store.  One without a listing is about to be removed."""
    return (home / "unsynced").exists() and (home / LISTING).exists()


def unfinished(services: Services) -> list[wire.SyncWorkspace]:
    """Jobs for the workspaces whose last sync failed."""
    found = []
    for mark in (services.layout.state / "tasks").glob("*/workspace/unsynced"):
        with contextlib.suppress(FileNotFoundError):  # it is removed just now
            task, store = mark.parent.parent.name, mark.read_text()
            found.append(wire.SyncWorkspace(AGAIN + task, task, store, str(mark.parent), bounds=bounds(services.settings)))
    return found


def remove_staging(services: Services, home: Path) -> None:
    """Remove a workspace's directory, when no sync is at work on it.  Blocks.  Raises OSError."""
    with no_more_syncs(str(home)):
        services.removal.remove(home)


def bounds(settings: Settings) -> Bounds:
    """On every workspace of the node."""
    mount = settings.mount
    return Bounds(mount.entries_max, mount.depth_max, mount.staged_bytes_max)
