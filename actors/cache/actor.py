"""The CacheActor: looks how full the disk is, and has room made when it is too full.

It holds nothing that a successor would miss: what is taken and by whom is in OBJECTS, and an evictor that was at work is started again.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inotify_simple import INotify, flags
from loguru import logger

from actors.cache import archives, messages, wire
from actors.cache.eviction import excess_bytes
from actors.image.messages import UnmountAllIdle
from actors.lazytree import ledger
from actors.lazytree.ledger import Limits
from actors.lazytree.objects import Objects
from actors.lazytree.trees import Trees
from actors.quantities import format_bytes
from actors.services import IMAGES, Services
from supervisor.actor import Actor
from supervisor.answers import Deferred, Worked, WorkFailed
from supervisor.frames import Codec, Message
from supervisor.isolation import Process
from supervisor.processes import ProcessRow
from supervisor.tree import System
from supervisor.worker import Ended, Said, Started, Worker

EVICTOR, CHECKER = "evictor", "checker"
EVICTOR_SAYS, CHECKER_SAYS = Codec(wire.Evicted, wire.Progress), Codec(messages.Checked, wire.Progress)
CHECKED = "checked"  # in OBJECTS: which prefix is next; its time is when the last one was begun, by whichever daemon
LOOK_S = 10.0
LOOK_AT_ARCHIVES_S = 60.0  # their directory may be large, and far away
UNMOUNT_S = 0.5  # for images that nobody uses
# After an eviction that made too little room: what could not go then cannot now, most likely; four times as long after each.
PAUSE_MIN_S, PAUSE_MAX_S = 1.0, 60.0


class CheckerEnded(Exception):
    """It was to look at everything, and has not; the text says how it has ended."""


class _Look(Message, frozen=True):
    pass


class _Wanted(Message, frozen=True):
    """Somebody was refused."""


@dataclass(frozen=True, eq=False)
class _Prune:
    """Somebody wants objects of so many bytes gone.  As a message to itself: idle images are unmounted by now."""

    object_bytes: int
    reply: Deferred


class _Again(Message, frozen=True):
    """The pause after an eviction in vain is over."""


@dataclass(frozen=True)
class _Found:
    """What a look found: bytes that should go."""

    object_bytes: int
    archives_over: bool
    prefix: str | None  # objects whose turn it is to be looked at


class CacheActor(Actor):
    def __init__(self, system: System, name: str, services: Services) -> None:
        super().__init__(system, name)
        self._services = services
        self._settings = services.settings.image
        self._worker = Worker(self, services.watcher, EVICTOR)
        self._order: wire.Evict | None = None  # of the evictor at work
        self._prunes: list[_Prune] = []
        self._pruning: list[_Prune] = []  # of them, those that the evictor at work is for
        self._checker = Worker(self, services.watcher, CHECKER)
        self._check_order: wire.CheckObjects | None = None
        self._checking: list[Deferred] = []
        self._check_all = False  # somebody waits for it
        self._inotify: INotify | None = None
        self._announced = False
        self._archives_at_s = 0.0
        self._looking = False
        self._look_again = False
        self._pause_s = 0.0
        self._not_before_s = 0.0
        self._why = ""

    def on_begin(self) -> None:
        settings = self._settings
        with contextlib.closing(Objects(settings.cache_dir)):
            pass  # made, if it is missing
        self._objects = os.open(settings.cache_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._inotify = INotify(nonblocking=True)
        self._inotify.add_watch(settings.cache_dir, flags.MOVED_TO | flags.ONLYDIR)
        self._listen()
        self._announce()
        self.mailbox(_Look())

    def on_end(self, reason: object) -> None:
        self._worker.let_go()
        self._checker.let_go()
        if self._inotify is not None:
            self._services.watcher.forget(self._inotify.fileno())
            self._inotify.close()
            os.close(self._objects)

    def on_message(self, message: Any) -> Any:
        match message:
            case messages.CacheUsage():
                reply = self.deferred()
                self.work(("usage", reply), self._usage)
                return reply
            case Worked(("usage", reply), usage):
                reply.set(usage)
            case WorkFailed(("usage", reply), error):
                reply.set_exception(error)
            case messages.Check():
                reply = self.deferred()
                self._checking.append(reply)
                self._check_all = True
                self._check([])
                return reply
            case messages.Prune(object_bytes):
                reply = self.deferred()
                self.system.tell(IMAGES, UnmountAllIdle())
                self.after(UNMOUNT_S, _Prune(object_bytes, reply))
                return reply
            case _Prune():
                self._prunes.append(message)
                self._evict(0)
            case _Look():
                if not self._announced:
                    self._announce()
                self._look(waited_for=False)
                self.after(LOOK_S, message)
            case _Wanted():
                if self._listen():
                    self._look(waited_for=True)
            case _Again():
                self._look(waited_for=False)
            case Worked("look", _Found() as found):
                self._looking = False
                if found.prefix is not None:
                    self._check([found.prefix])
                if found.object_bytes or found.archives_over:
                    self._evict(found.object_bytes)
                elif self._look_again:
                    self._look(waited_for=True)
            case WorkFailed("look", error):
                self._looking = False
                logger.error("how full the object cache is cannot be found out: {}", error)
            case _:
                self._from_evictor(message)
                self._from_checker(message)
        return None

    def _announce(self) -> None:
        """Before any of this daemon's holds is placed, unless the disk is full; then again and again."""
        settings, run_dir = self._settings, self._services.settings.run.dir
        try:
            Trees(self._objects, run_dir).announce(run_dir, settings.mount_dir)
            ledger.set_limits(self._objects, Limits(settings.cache_bytes_max, settings.free_bytes_min))
            self._announced = True
        except OSError as error:
            logger.warning("the bounds of {} cannot be written down there: {}", settings.cache_dir, error)

    # --- looking ---

    def _listen(self) -> bool:
        """Listen on → whether somebody was refused."""
        assert self._inotify is not None
        refused = any(event.name == ledger.WANTED for event in self._inotify.read(timeout=0))
        mailbox = self.mailbox
        self._services.watcher.readable(self._inotify.fileno(), lambda: mailbox(_Wanted()))
        return refused

    def _look(self, waited_for: bool) -> None:
        if self._looking or not self._worker.vacant:
            self._look_again |= waited_for
            return
        if time.monotonic() < self._not_before_s:
            return
        self._looking, self._look_again = True, False
        self.work("look", self._excess, waited_for)

    def _excess(self, waited_for: bool) -> _Found:
        settings = self._settings
        excess = excess_bytes(
            ledger.sum_of(self._objects).promised_bytes,
            ledger.wanted_bytes(self._objects) if waited_for else 0,
            settings.cache_bytes_max,
            ledger.free_bytes(self._objects),
            settings.free_bytes_min,
            waited_for,
        )
        over = False
        if time.monotonic() >= self._archives_at_s:
            self._archives_at_s = time.monotonic() + LOOK_AT_ARCHIVES_S
            over = sum(each.size_bytes for each in archives.look(settings.archive_dir)) > settings.archive_bytes_max
        return _Found(excess, over, self._prefix_to_check())

    def _prefix_to_check(self) -> str | None:
        """The objects whose turn it is to be looked at, which is noted; in a worker thread."""
        interval_s = self._settings.check_interval_s
        if not interval_s:
            return None
        path = Path(self._settings.cache_dir, CHECKED)
        try:
            number = int(path.read_text() or 0) % 256
            if time.time() - path.stat().st_mtime < interval_s / 256:
                return None
        except (FileNotFoundError, ValueError):
            path.write_text("0")
            return None
        path.write_text(str(number + 1))
        return f"{number:02x}"

    def _usage(self) -> messages.Usage:
        settings = self._settings
        found = archives.look(settings.archive_dir)
        return messages.Usage(
            cache_bytes=ledger.sum_of(self._objects).used_bytes,
            cache_bytes_max=settings.cache_bytes_max,
            unlinked_bytes=ledger.unlinked_bytes(self._objects),
            archive_bytes=sum(each.size_bytes for each in found),
            archive_bytes_max=settings.archive_bytes_max,
            archives=len(found),
            free_bytes=ledger.free_bytes(self._objects),
            free_bytes_min=settings.free_bytes_min,
            short=self._why,
        )

    # --- evicting ---

    def _evict(self, object_bytes: int) -> None:
        """Have room made, unless it just is: then whoever wants more has it made when that is over."""
        if self._order is None and self._worker.vacant:
            settings = self._settings
            self._pruning, self._prunes = self._prunes, []
            object_bytes = max([object_bytes, *(prune.object_bytes for prune in self._pruning)])
            self._order = wire.Evict(
                settings.cache_dir,
                settings.archive_dir,
                object_bytes,
                settings.archive_bytes_max,
                settings.mirrors,
                bool(self._pruning),
            )
            self._worker.start(self._make)

    def _make(self) -> Process:
        assert self._order is not None
        return self._services.isolation.start(EVICTOR, "actors.cache.process:serve", self._order, EVICTOR_SAYS)

    def _from_evictor(self, message: Any) -> None:
        match self._worker.take(message):
            case Started():
                row = ProcessRow(EVICTOR, self._worker.pid or 0, self._worker.restarts)
                self._services.processes.put(self.name, row, EVICTOR)
            case Said(_, _, wire.Evicted() as evicted):
                self._evicted(evicted)
            case Ended(_, _, how):
                self._services.processes.remove(self.name, EVICTOR)
                if self._order is not None:
                    logger.warning("the evictor has ended ({}); the next look starts another", how)
                    self._order = None
                    self._answer(messages.Pruned(0, 0, f"the evictor has ended: {how}"))
                if self._prunes:
                    self._evict(0)
                elif self._look_again:
                    self._look(waited_for=True)

    def _evicted(self, evicted: wire.Evicted) -> None:
        self._order = None
        if self._pruning:
            logger.info("{} objects were evicted, for somebody wanted it", evicted.objects)
            self._answer(messages.Pruned(evicted.objects, evicted.freed_bytes, evicted.why))
            return
        self._why = (evicted.why or "the rest is in use") if evicted.short else ""
        self._pause_s = min(PAUSE_MAX_S, max(PAUSE_MIN_S, 4 * self._pause_s)) if evicted.short else 0.0
        self._not_before_s = time.monotonic() + self._pause_s
        if evicted.objects or evicted.archives:
            logger.info(
                "evicted {} objects ({} are free again) and {} archives ({})",
                evicted.objects,
                format_bytes(evicted.freed_bytes),
                evicted.archives,
                format_bytes(evicted.archive_bytes),
            )
        if evicted.short:
            # Images that nobody uses are kept mounted for a while: not when there is no room.
            self.system.tell(IMAGES, UnmountAllIdle())
            self.after(self._pause_s, _Again())
            if evicted.why:
                logger.warning(
                    "there is too little room for images and workspaces, and more cannot be evicted: {}", evicted.why
                )

    def _answer(self, pruned: messages.Pruned) -> None:
        for prune in self._pruning:
            prune.reply.set(pruned)
        self._pruning.clear()

    # --- looking for damage ---

    def _check(self, prefixes: list[str]) -> None:
        """Have these objects looked at, unless some just are; all that somebody waits for, then."""
        if self._check_order is None and self._checker.vacant:
            settings = self._settings
            if self._check_all:
                prefixes = [f"{number:02x}" for number in range(256)]
            self._check_order = wire.CheckObjects(settings.cache_dir, settings.archive_dir, prefixes, settings.mirrors)
            self._checker.start(self._make_checker)

    def _make_checker(self) -> Process:
        assert self._check_order is not None
        return self._services.isolation.start(CHECKER, "actors.cache.process:check", self._check_order, CHECKER_SAYS)

    def _from_checker(self, message: Any) -> None:
        match self._checker.take(message):
            case Started():
                row = ProcessRow(CHECKER, self._checker.pid or 0, self._checker.restarts)
                self._services.processes.put(self.name, row, CHECKER)
            case Said(_, _, messages.Checked() as checked):
                for text in checked.texts:
                    logger.warning("{}", text)
                for reply in self._checked():
                    reply.set(checked)
            case Ended(_, _, how):
                self._services.processes.remove(self.name, CHECKER)
                if self._check_order is not None:
                    logger.warning("the checker has ended ({})", how)
                    for reply in self._checked():
                        reply.set_exception(CheckerEnded(f"the checker has ended: {how}"))
                if self._check_all:
                    self._check([])

    def _checked(self) -> list[Deferred]:
        """A checker is done → who waits for it."""
        assert self._check_order is not None
        everything = len(self._check_order.prefixes) > 1
        self._check_order = None
        if not everything:
            return []
        self._check_all = False
        waiting, self._checking = self._checking, []
        return waiting
