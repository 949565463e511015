"""The ImageActor: from a reference to a lease on a mounted root.

It owns the images' mounts and leases.  Content and archives are files that survive it; a task's lease is asked for again by the
task's sandbox after a restart, and an `image mount` lease is a row in the store.  Mounts are adopted as they are found.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loguru import logger

from actors.image import messages, wire
from actors.image.archive import Archive, archive_path
from actors.image.errors import ArchiveInvalid, ReferenceInvalid
from actors.image.reference import Reference
from actors.lazytree import mounts
from actors.services import GATEWAY, Services
from supervisor.actor import Actor
from supervisor.answers import Deferred, Worked, WorkFailed
from supervisor.frames import Codec
from supervisor.isolation import Process
from supervisor.processes import ProcessRow
from supervisor.tree import System
from supervisor.worker import Ended, Said, Started, Worker

BUILDER_SAYS = Codec(wire.Progress, wire.Resolved, wire.Built, wire.BuildFailed)
BUILDER = "image builder"
BUILDER_DEATHS_MAX = 5  # in one build; then it is the image that kills them


@dataclass(frozen=True)
class Resolution:
    """What a reference named when the registry was last asked, at `at` (seconds since 1970)."""

    digest: str
    at: float


@dataclass
class Image:
    """An image whose archive and content are on this node."""

    digest: str
    reference: str
    unpacked_bytes: int
    archive: Archive | None = None  # opened, and META mounted
    leases: set[str] = field(default_factory=set)
    idle: Any = None  # the timer that unmounts it


@dataclass
class Asked:
    """Somebody who waits for a lease."""

    message: messages.PrepareRootfs
    reply: Deferred


@dataclass
class Preparing:
    """A builder at work for a reference, and who waits for it."""

    reference: Reference
    worker: Worker
    waiting: list[Asked] = field(default_factory=list)


class Refusal(Exception):
    """Why there is no lease: for whoever asked."""


class ImageActor(Actor):
    def __init__(self, system: System, name: str, services: Services) -> None:
        super().__init__(system, name)
        self._services = services
        self._settings = services.settings.image
        self._resolved: dict[str, Resolution] = {}
        self._images: dict[str, Image] = {}
        self._leases: dict[str, messages.RootfsReady] = {}
        self._preparing: dict[str, Preparing] = {}
        self._mounting: dict[str, list[Asked]] = {}
        self._closing: list[Deferred] = []
        self._builds = 0
        self._mounts = Path(self._settings.mount_dir)

    # --- life ---

    def on_begin(self) -> None:
        for directory in (self._settings.cache_dir, self._settings.archive_dir, self._settings.mount_dir):
            Path(directory).mkdir(mode=0o755, parents=True, exist_ok=True)
        store = self._services.store
        for reference, digest, resolved_at in store.read("SELECT reference, digest, resolved_at FROM resolutions"):
            self._resolved[reference] = Resolution(digest, resolved_at)
        for digest, reference, unpacked_bytes in store.read("SELECT digest, reference, unpacked_bytes FROM contents"):
            self._images[digest] = Image(digest, reference, unpacked_bytes)
        mounted = {mount.target for mount in mounts.mounts_below(str(self._mounts))}
        for lease, digest in store.read("SELECT lease, digest FROM leases"):
            path = self._mounts / lease
            image = self._images.get(digest)
            if image is None or str(path) not in mounted:
                self._forget_lease(lease)
                continue
            image.leases.add(lease)
            self._leases[lease] = self._ready(image, lease, None, str(path))
        for image in self._images.values():
            if str(self._meta(image.digest)) in mounted:
                self._open_again(image)

    def _open_again(self, image: Image) -> None:
        """Adopt META as an earlier incarnation mounted it."""
        try:
            image.archive = Archive.open(archive_path(self._settings.archive_dir, image.digest))
        except (OSError, ArchiveInvalid) as error:
            logger.warning("{}: its archive is gone ({}); it is built again when it is wanted", image.reference, error)
            return
        self._watch_idle(image)

    def on_end(self, reason: object) -> None:
        for preparing in self._preparing.values():
            preparing.worker.let_go()

    def on_message(self, message: Any) -> Any:
        match message:
            case messages.PrepareRootfs():
                return self._prepare(message)
            case messages.ReleaseRootfs(lease):
                return self._release(lease)
            case messages.ListImages():
                return self._list()
            case messages.UnmountIdle(digest):
                self._unmount_idle(digest)
            case messages.CloseImages():
                return self._close()
            case Worked(("mount", digest), archive):
                self._mounted(digest, archive)
            case WorkFailed(("mount", digest), error):
                self._not_mounted(digest, error)
            case Worked(("root", lease), path):
                self._root_mounted(lease, path)
            case WorkFailed(("root", lease), error):
                self._root_failed(lease, error)
            case Worked(("unmount", _), _):
                self._check_closed()
            case WorkFailed(("unmount", target), error):
                logger.error("{} could not be unmounted: {}", target, error)
                self._check_closed()
            case _:
                for name, preparing in list(self._preparing.items()):
                    self._from_builder(name, preparing, message)
        return None

    # --- leases ---

    def _prepare(self, message: messages.PrepareRootfs) -> Any:
        if message.lease in self._leases:
            return self._leases[message.lease]
        asked = Asked(message, self.deferred())
        try:
            reference = Reference.parse(message.reference)
        except ReferenceInvalid as error:
            asked.reply.set_exception(error)
            return asked.reply
        name = str(reference)
        if name in self._preparing:
            self._preparing[name].waiting.append(asked)
            return asked.reply
        known = self._known(reference)
        if known is not None and self._is_fresh(reference):
            self._lease(known, asked)
            return asked.reply
        self._build(reference, known, asked)
        return asked.reply

    def _known(self, reference: Reference) -> Image | None:
        """The image that the reference named when it was last asked for."""
        if reference.digest:
            return self._images.get(reference.digest) or self._images.get(self._resolution(reference))
        return self._images.get(self._resolution(reference))

    def _resolution(self, reference: Reference) -> str:
        found = self._resolved.get(str(reference))
        return found.digest if found else ""

    def _is_fresh(self, reference: Reference) -> bool:
        """Whether the registry need not be asked: a digest never changes, a tag is believed for a while."""
        if reference.digest:
            return True
        found = self._resolved.get(str(reference))
        return found is not None and time.time() - found.at < self._settings.resolve_interval_s

    def _lease(self, image: Image, asked: Asked) -> None:
        """Give a lease on an image whose content is here; its META is mounted by the first one."""
        image.leases.add(asked.message.lease)
        if image.idle is not None:
            image.idle.cancel()
            image.idle = None
        if image.archive is not None:
            self._give(image, asked)
        elif image.digest in self._mounting:
            self._mounting[image.digest].append(asked)
        else:
            self._mounting[image.digest] = [asked]
            self.work(("mount", image.digest), self._mount_meta, image.digest)

    def _mount_meta(self, digest: str) -> Archive:
        archive = Archive.open(archive_path(self._settings.archive_dir, digest))
        target = self._meta(digest)
        target.mkdir(mode=0o755, parents=True, exist_ok=True)
        mounts.unmount(str(target), lazily=True)
        mounts.mount_erofs(archive.path, str(target))
        return archive

    def _mounted(self, digest: str, archive: Archive) -> None:
        image = self._images[digest]
        image.archive = archive
        for asked in self._mounting.pop(digest, []):
            if asked.message.lease in image.leases:
                self._give(image, asked)
            else:
                asked.reply.set_exception(Refusal("the lease was given back before it was there"))
        self._watch_idle(image)

    def _not_mounted(self, digest: str, error: Exception) -> None:
        """The archive is gone or damaged: it is built again for those who wait; anything else is theirs to know."""
        waiting = self._mounting.pop(digest, [])
        image = self._images[digest]
        image.leases -= {asked.message.lease for asked in waiting}
        rebuild = isinstance(error, FileNotFoundError | ArchiveInvalid)
        if rebuild:
            logger.warning("the archive of {} cannot be used ({}); it is built again", image.reference, error)
            del self._images[digest]
            self._services.store.write(("DELETE FROM contents WHERE digest = ?", (digest,)))
        for asked in waiting:
            reference = Reference.parse(asked.message.reference)
            if not rebuild:
                asked.reply.set_exception(error)
            elif str(reference) in self._preparing:
                self._preparing[str(reference)].waiting.append(asked)
            else:
                self._build(reference, None, asked)

    def _give(self, image: Image, asked: Asked) -> None:
        lease = asked.message.lease
        if asked.message.root:
            self._mounting.setdefault(lease, []).append(asked)
            self.work(("root", lease), self._mount_root, image, lease)
            return
        self._leases[lease] = self._ready(image, lease, image.archive, None)
        asked.reply.set(self._leases[lease])

    def _mount_root(self, image: Image, lease: str) -> str:
        path = self._mounts / lease
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
        mounts.mount_overlay(str(path), [str(self._meta(image.digest))], [self._settings.cache_dir])
        self._services.store.write(
            ("INSERT INTO leases VALUES (?, ?, ?, 1)", (lease, image.reference, image.digest)),
        ).result()
        return str(path)

    def _root_mounted(self, lease: str, path: str) -> None:
        for asked in self._mounting.pop(lease, []):
            image = next(image for image in self._images.values() if lease in image.leases)
            self._leases[lease] = self._ready(image, lease, image.archive, path)
            asked.reply.set(self._leases[lease])

    def _root_failed(self, lease: str, error: Exception) -> None:
        for asked in self._mounting.pop(lease, []):
            self._release(lease)
            asked.reply.set_exception(error)

    def _ready(self, image: Image, lease: str, archive: Archive | None, path: str | None) -> messages.RootfsReady:
        info = archive.info if archive else None
        config = messages.ImageConfig(info.env, info.entrypoint, info.command) if info else messages.ImageConfig([], [], [])
        data = [self._settings.cache_dir]
        return messages.RootfsReady(lease, image.reference, image.digest, str(self._meta(image.digest)), data, config, path)

    def _release(self, lease: str) -> messages.Released:
        for preparing in self._preparing.values():
            # The build goes on: what it fetched is of use to the next one who asks.
            for asked in [asked for asked in preparing.waiting if asked.message.lease == lease]:
                preparing.waiting.remove(asked)
                asked.reply.set_exception(Refusal("the lease was given back before it was there"))
        ready = self._leases.pop(lease, None)
        if ready is not None and ready.path is not None:
            self.work(("unmount", ready.path), self._unmount_root, lease, ready.path)
        for image in self._images.values():
            if lease in image.leases:
                image.leases.discard(lease)
                self._watch_idle(image)
                return messages.Released(True)
        return messages.Released(ready is not None)

    def _unmount_root(self, lease: str, path: str) -> None:
        mounts.unmount(path, lazily=True)
        Path(path).rmdir()
        self._forget_lease(lease)

    def _forget_lease(self, lease: str) -> None:
        self._services.store.write(("DELETE FROM leases WHERE lease = ?", (lease,)))

    def _meta(self, digest: str) -> Path:
        return self._mounts / digest.replace(":", "-")

    # --- idle images ---

    def _watch_idle(self, image: Image) -> None:
        if not image.leases and image.archive is not None and image.idle is None:
            image.idle = self.after(0.0 if self._closing else self._settings.idle_unmount_s, messages.UnmountIdle(image.digest))

    def _unmount_idle(self, digest: str) -> None:
        image = self._images.get(digest)
        if image is None or image.leases or image.archive is None:
            return
        image.archive = image.idle = None
        self.work(("unmount", digest), self._unmount_meta, digest)

    def _unmount_meta(self, digest: str) -> None:
        target = self._meta(digest)
        mounts.unmount(str(target), lazily=True)
        target.rmdir()

    # --- building ---

    def _build(self, reference: Reference, known: Image | None, asked: Asked) -> None:
        name = str(reference)
        self._builds += 1  # so that a late word of an earlier builder is not taken for this one's
        worker = Worker(self, self._services.watcher, f"{BUILDER} {name} {self._builds}")
        self._preparing[name] = Preparing(reference, worker, [asked])
        order = self._order(reference, known)
        worker.start(lambda: self._make_builder(order))

    def _order(self, reference: Reference, known: Image | None) -> wire.BuildImage:
        return wire.BuildImage(
            reference=str(reference),
            archive_dir=self._settings.archive_dir,
            cache_dir=self._settings.cache_dir,
            known_digest=known.digest if known else None,
            unpacked_bytes_max=self._settings.unpacked_bytes_max,
            entries_max=self._settings.entries_max,
            time_max_s=self._settings.build_timeout_s,
        )

    def _make_builder(self, order: wire.BuildImage) -> Process:
        return self._services.isolation.start(BUILDER, "actors.image.process:serve", order, BUILDER_SAYS)

    def _from_builder(self, name: str, preparing: Preparing, message: Any) -> None:
        match preparing.worker.take(message):
            case Started():
                self._services.processes.put(self.name, ProcessRow(BUILDER, preparing.worker.pid or 0, 0))
            case Said(_, _, wire.Progress() as progress):
                leases = [asked.message.lease for asked in preparing.waiting]
                self.system.tell(GATEWAY, messages.ImageProgress(leases, shown(name, progress)))
            case Said(_, _, wire.Resolved(digest)):
                self._resolve(preparing, digest)
                self._built(preparing, self._images[digest])
            case Said(_, _, wire.Built() as built):
                self._resolve(preparing, built.digest)
                image = self._images.setdefault(built.digest, Image(built.digest, name, built.unpacked_bytes))
                self._services.store.write(
                    (
                        "INSERT OR REPLACE INTO contents VALUES (?, ?, ?, ?)",
                        (built.digest, name, built.unpacked_bytes, time.time()),
                    )
                )
                self._built(preparing, image)
            case Said(_, _, wire.BuildFailed(kind, error)):
                self._build_failed(preparing, kind, error)
            case Ended(_, _, how):
                self._builder_died(preparing, how)

    def _resolve(self, preparing: Preparing, digest: str) -> None:
        now, name = time.time(), str(preparing.reference)
        self._resolved[name] = Resolution(digest, now)
        self._services.store.write(("INSERT OR REPLACE INTO resolutions VALUES (?, ?, ?)", (name, digest, now)))

    def _built(self, preparing: Preparing, image: Image) -> None:
        for asked in self._over(preparing):
            self._lease(image, asked)

    def _build_failed(self, preparing: Preparing, kind: str, error: str) -> None:
        known = self._known(preparing.reference)
        if kind == "unreachable" and known is not None:
            logger.warning("{}: {}; the image it named last, {}, is used", preparing.reference, error, known.digest)
            self._built(preparing, known)
            return
        for asked in self._over(preparing):
            asked.reply.set_exception(Refusal(error))

    def _builder_died(self, preparing: Preparing, how: str) -> None:
        """Killed, most likely; what it had published whole stays, so its successor has less to do."""
        self._services.processes.remove(self.name, BUILDER)
        if preparing.worker.restarts > BUILDER_DEATHS_MAX:
            for asked in self._over(preparing):
                asked.reply.set_exception(Refusal(f"{preparing.reference}: its builder died again and again, last: {how}"))
            return
        logger.warning("the image builder of {} has ended ({}); another one takes over", preparing.reference, how)
        order = self._order(preparing.reference, self._known(preparing.reference))
        preparing.worker.start(lambda: self._make_builder(order))

    def _over(self, preparing: Preparing) -> list[Asked]:
        """The builder has said its last word (it ends by itself) → who waits for it."""
        preparing.worker.let_go()
        self._services.processes.remove(self.name, BUILDER)
        del self._preparing[str(preparing.reference)]
        self._check_closed()
        return preparing.waiting

    # --- the rest ---

    def _list(self) -> messages.ImageList:
        return messages.ImageList(
            [
                messages.ImageRow(
                    image.reference,
                    image.digest,
                    str(self._meta(image.digest)) if image.archive else None,
                    sorted(image.leases),
                    image.unpacked_bytes,
                )
                for image in sorted(self._images.values(), key=lambda image: image.reference)
            ]
        )

    def _close(self) -> Any:
        """Give everything back; an archive that is being built is completed first."""
        done = self.deferred()
        self._closing.append(done)
        for lease in list(self._leases):
            self._release(lease)
        for image in self._images.values():
            self._watch_idle(image)
            if image.idle is not None:
                image.idle.cancel()
                self._unmount_idle(image.digest)
        self._check_closed()
        return done

    def _check_closed(self) -> None:
        if not self._closing or self._preparing or mounts.mounts_below(str(self._mounts)):
            return
        for done in self._closing:
            done.set(messages.Released(True))
        self._closing.clear()


def shown(reference: str, progress: wire.Progress) -> str:
    """A builder's progress as one short line."""
    if not progress.layers:
        return f"{reference}: {progress.phase}"
    done, total = progress.bytes_done >> 20, progress.bytes_total >> 20
    return f"{reference}: {progress.phase}, {progress.layer} of {progress.layers}, {done} of {total} MiB, {progress.entries} entries"
