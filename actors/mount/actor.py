"""The MountActor of one task: its workspace, from the store's listing to the last byte synced back.

It decides when the mount is made, served, served again, synced and removed.  The mount itself, the FUSE server and the
connection's descriptor belong to the keeper and the kernel: this actor may be restarted at any moment and finds them again.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

from loguru import logger

from actors.lazytree import mounts
from actors.lazytree.objects import Objects
from actors.lazytree.served import LazyServer, Program
from actors.lazytree.table import ObjectTable
from actors.lazytree.trees import Trees
from actors.lazytree.wire import Progress, ReadFailed, Ready, ServeTree
from actors.mount import messages, wire
from actors.mount.journal import staged
from actors.mount.listing import private_directory
from actors.mount.syncer import bounds, keep_for_later, remove_staging
from actors.sandbox.messages import ReadFailed as TaskReadFailed
from actors.services import SYNCER, Services, sandbox_name
from supervisor.actor import Actor
from supervisor.answers import Answer, Refused, Worked, WorkFailed
from supervisor.frames import Codec, Message
from supervisor.tree import System

SERVER_SAYS = Codec(Ready, Progress, ReadFailed, wire.ReadWhole)
SYNCING_SHARE_MAX = 0.05  # of the time may be spent on syncs of one running task


class _NotReady(Message, frozen=True):
    """The time for a mount to be ready is over."""


class _SyncNow(Message, frozen=True):
    """It is time to bring what a running task wrote to its store."""


class MountActor(Actor):
    """Messages: MountWorkspace, SyncWorkspace, UnmountWorkspace, MountPath."""

    def __init__(self, system: System, name: str, services: Services, task: str) -> None:
        super().__init__(system, name)
        self._services = services
        self._task = task
        self._layout = services.layout.task(task)
        program = Program("actors.mount.serve:serve", self._order, SERVER_SAYS)
        self._server = LazyServer(
            self,
            services,
            f"workspace mount {task}",
            task,
            self._layout.workspace_lazy,
            program,
        )
        self._workspace = ""
        self._mounted = False
        self._releasing = False
        self._mounting: list[Any] = []
        self._syncing: list[Any] = []
        self._unmounting: list[Any] = []
        self._keep_staging = False
        self._asked: dict[int, str] = {}
        self._sync_began_s = 0.0  # the last one of the running task
        self._sync_error = ""

    def on_begin(self) -> None:
        """Find what an earlier incarnation left: a mount, its server, or nothing."""
        # A new task has no mount points, and need not look through those of all others.
        found = mounts.mounts_below(str(self._layout.volatile)) if self._layout.volatile.exists() else []
        self._mounted = str(self._layout.workspace) in {mount.target for mount in found}
        if (mark := self._layout.workspace_home / "name").exists():
            self._workspace = mark.read_text()
        if self._mounted:
            if self._server.find():
                self._server.adopt()
            self._sync_later(0.0)

    def on_end(self, reason: object) -> None:
        self._server.let_go()

    def on_message(self, message: Any) -> Any:
        match message:
            case messages.MountWorkspace(_, workspace):
                return self._mount(workspace)
            case messages.SyncWorkspace():
                return self._sync()
            case messages.UnmountWorkspace(_, keep_staging):
                return self._unmount(keep_staging)
            case messages.MountPath():
                return messages.Path(str(self._layout.workspace) if self._mounted else "")
            case Answer(number, value) if number in self._asked:
                self._syncer_answered(self._asked.pop(number), value)
            case Refused(number, error) if number in self._asked:
                self._syncer_answered(self._asked.pop(number), wire.JobFailed("", error))
            case Worked("mount", greeted):
                self._is_mounted()
                if greeted:
                    self._server.stand_by()
            case WorkFailed("mount", error):
                self._failed(str(error))
            case Worked("open", minor):
                self._server.start(minor)
            case WorkFailed("open", error):
                self._failed(str(error))
            case Worked("unmount", _):
                self._is_unmounted()
            case WorkFailed("unmount", error):
                logger.error("the workspace of {} could not be unmounted, trying again: {}", self._task, error)
                self.after(1.0, messages.UnmountWorkspace(self._task, self._keep_staging))
                self._releasing = False
                self._server.want(True)
            case _NotReady() if self._mounting:
                self._failed(f"the workspace was not ready within {self._services.settings.mount.ready_timeout_s:g} s")
            case _SyncNow():
                self._sync_running()
            case _:
                self._from_server(message)
        return None

    # --- mounting ---

    def _mount(self, workspace: str) -> Any:
        if self._mounted:
            return messages.WorkspaceMounted(str(self._layout.workspace))
        reply = self.deferred()
        self._mounting.append(reply)
        if len(self._mounting) == 1:
            self._workspace = workspace
            settings = self._services.settings
            self._layout.workspace_home.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self._layout.workspace_home / "name").write_text(workspace)
            job = wire.IndexWorkspace(
                f"index {self._task}",
                self._store,
                str(self._layout.workspace_home),
                settings.image.cache_dir,
                bounds(settings),
                settings.mount.small_bytes_max,
                hold=hold_name(self._task),
            )
            self._asked[self.request(SYNCER, job)] = "index"
            self.after(settings.mount.ready_timeout_s, _NotReady())
        return reply

    @property
    def _store(self) -> str:
        return str(self._services.layout.workspaces / self._workspace)

    def _syncer_answered(self, what: str, value: Any) -> None:
        match what, value:
            case "index", wire.Indexed():
                for text in value.skipped:
                    logger.warning("not in the workspace of {}: {}", self._task, text)
                if not value.objects:
                    self._put_together()
                elif not value.missing:
                    self.work("mount", self._mount_unserved)
                else:
                    self.work("open", self._server.open)
            case "index", wire.JobFailed(_, error):
                self._failed(error)
            case "sync", wire.Synced():
                self._synced(messages.WorkspaceSynced(value.outcome, value.conflicts, value.error or None, value.skipped))
            case "sync", wire.JobFailed(_, error):
                self._synced(messages.WorkspaceSynced("sync_failed", [], error))
            case "sync running", _:
                self._synced_running(value.error)
            case "cache", wire.JobFailed(_, error):
                logger.warning("what task {} has read is not cached for the next one: {}", self._task, error)

    def _order(self, init_request: bytes, replacement: bool) -> ServeTree:
        settings = self._services.settings
        return ServeTree(
            table=str(self._layout.workspace_home / "table"),
            store=self._store,
            init_request=init_request,
            replacement=replacement,
            read_timeout_s=settings.mount.read_timeout_s,
            uid=settings.sandbox.uid,
            gid=settings.sandbox.gid,
            aside=os.fsdecode(private_directory(self._task)),
        )

    def _from_server(self, message: Any) -> None:
        match self._server.take(message):
            case Ready():
                self._put_together()
            case wire.ReadWhole(rows):
                home, objects = str(self._layout.workspace_home), self._services.settings.image.cache_dir
                job = wire.CacheObjects(f"cache {self._task} {rows[0]}", self._store, home, objects, rows)
                self._asked[self.request(SYNCER, job)] = "cache"
            case ReadFailed(_, reason):
                self.system.tell(sandbox_name(self._task), TaskReadFailed(self._task, reason))

    def _put_together(self) -> None:
        self.work("mount", self._mount_tree)

    def _mount_unserved(self) -> bool:
        """Every object is there: nobody need wait for a server."""
        with self._server.greeting():
            self._mount_tree(served=False)
        return True

    def _mount_tree(self, served: bool = True) -> None:
        """Put META, OBJECTS and LAZY together, and prove that LAZY answers; in a worker thread, for the kernel may wait for the server."""
        layout = self._layout
        objects = self._services.settings.image.cache_dir
        for part in (layout.workspace_meta, layout.workspace):
            part.mkdir(mode=0o755, parents=True, exist_ok=True)
        mounts.unmount(str(layout.workspace_meta), lazily=True)
        mounts.mount_erofs(str(layout.workspace_home / "meta.erofs"), str(layout.workspace_meta))
        data = [objects]
        if self._server.minor:
            data.append(str(layout.workspace_lazy))
            if served:  # else it is tuned when a server is wanted
                mounts.tune_fuse(self._server.minor)
                self._read_through()
        if not layout.staging.exists():
            mounts.make_upper(str(layout.staging), str(layout.staging_work), str(layout.workspace_meta))
        mounts.mount_overlay(
            str(layout.workspace), [str(layout.workspace_meta)], data, str(layout.staging), str(layout.staging_work)
        )

    def _read_through(self) -> None:
        """Read a byte of some object: ready is who has answered.  An object that cannot be had is an answer too."""
        table = ObjectTable(str(self._layout.workspace_home / "table"))
        try:
            path = self._layout.workspace_lazy / Objects.path(table.row(0).key)
        finally:
            table.close()
        try:
            with open(path, "rb", buffering=0) as file:
                file.read(1)
        except OSError as error:
            logger.debug("the first read of {} was answered with {}", self._layout.workspace_lazy, error)

    def _is_mounted(self) -> None:
        self._mounted = True
        self._answer(self._mounting, messages.WorkspaceMounted(str(self._layout.workspace)))
        if self._unmounting:
            self._release()
        else:
            self._sync_later(0.0)

    def _failed(self, error: str) -> None:
        """The mount could not be made: whoever waits is told, and nothing of it stays."""
        waiting, self._mounting = self._mounting, []
        for reply in waiting:
            reply.set_exception(OSError(error))
        self._server.abort()  # frees who waits for a server in the kernel, our own worker thread included
        self._keep_staging = staged(str(self._layout.workspace_home))
        if self._keep_staging:
            keep_for_later(self._layout.workspace_home, self._store)
        self._release()

    # --- the way back ---

    def _sync(self) -> Any:
        reply = self.deferred()
        self._syncing.append(reply)
        if len(self._syncing) == 1:
            self._ask_to_sync("sync", running=False)
        return reply

    def _ask_to_sync(self, what: str, running: bool) -> None:
        home = str(self._layout.workspace_home)
        job = wire.SyncWorkspace(
            f"{what} {self._task}", self._task, self._store, home, running, bounds(self._services.settings)
        )
        self._asked[self.request(SYNCER, job)] = what

    def _synced(self, answer: messages.WorkspaceSynced) -> None:
        if answer.outcome == "sync_failed":
            keep_for_later(self._layout.workspace_home, self._store)
        self._answer(self._syncing, answer)

    def _sync_later(self, took_s: float) -> None:
        """Sync the running task's workspace again, the later the longer the last time `took_s`."""
        interval_s = self._services.settings.mount.sync_interval_s
        if interval_s:
            self.after(max(interval_s, took_s / SYNCING_SHARE_MAX), _SyncNow())

    def _sync_running(self) -> None:
        if self._mounted and not self._syncing and not self._releasing:
            self._sync_began_s = time.monotonic()
            self._ask_to_sync("sync running", running=True)

    def _synced_running(self, error: str) -> None:
        if error and error != self._sync_error:  # what counts is the sync at the end
            logger.warning("what task {} wrote so far could not be brought to its store: {}", self._task, error)
        self._sync_error = error
        self._sync_later(time.monotonic() - self._sync_began_s)

    # --- the end ---

    def _unmount(self, keep_staging: bool) -> Any:
        reply = self.deferred()
        self._unmounting.append(reply)
        self._keep_staging = keep_staging
        if not self._mounting:  # else as soon as what is being made is there, or has failed
            self._release()
        return reply

    def _release(self) -> None:
        if not self._releasing:
            self._releasing = True
            self._server.want(False)
            self.work("unmount", self._unmount_tree)

    def _unmount_tree(self) -> None:
        unmount_tree(self._services, self._task, self._keep_staging)

    def _is_unmounted(self) -> None:
        self._mounted = False
        self._server.release()
        self._answer(self._unmounting, messages.Unmounted())
        self.finish()

    def _answer(self, waiting: list[Any], answer: Message) -> None:
        for reply in waiting:
            reply.set(answer)
        waiting.clear()


def hold_name(task: str) -> str:
    """Under which a task's workspace holds its objects."""
    return f"task.{task}"


def unmount_tree(services: Services, task: str, keep_staging: bool) -> None:
    """Remove whatever of a task's workspace is there.  Waits for a sync that is under way.  Raises OSError."""
    layout = services.layout.task(task)
    for target in (layout.workspace, layout.workspace_meta, layout.workspace_lazy):
        mounts.unmount(str(target), lazily=True)
    with contextlib.suppress(FileNotFoundError):
        objects = os.open(services.settings.image.cache_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            Trees(objects, services.settings.run.dir).release(hold_name(task))
        finally:
            os.close(objects)
    if not keep_staging:
        remove_staging(services, layout.workspace_home)
    layout.remove_mount_points(layout.workspace, layout.workspace_meta, layout.workspace_lazy)
