"""The ImageActor: from a reference to a lease on a mounted root.

It decides which image a reference means, and for how long each is mounted.  Content, archives, mounts, servers and leases survive
it: what an earlier incarnation has mounted is adopted, and who held a lease on it still does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loguru import logger

from actors.image import messages, wire
from actors.image.archives.building import Building, shown
from actors.image.catalogue import Asked, Catalogue, Image, name_of
from actors.image.errors import ArchiveInvalid, ReferenceInvalid
from actors.image.leases import Leases, held_still, login_of, task_of
from actors.image.mounted import ImageMount, Mounted, NotMounted, Removed, unmount_others
from actors.image.prefetch.prefetching import Prepared
from actors.image.registry.reference import Reference
from actors.image.wire import RESOLVING
from actors.lazytree import mounts
from actors.lazytree.wire import ReadFailed
from actors.sandbox.messages import ReadFailed as TaskReadFailed
from actors.services import GATEWAY, Services, sandbox_name
from supervisor.actor import Actor
from supervisor.answers import Deferred, Worked, WorkFailed
from supervisor.tree import System

SHARING_PATIENCE_S = (
    10.0  # for archives on their way to the bucket when the daemon stops; another node builds what is not there
)
# How long a task whose image is here waits for the registry's word on what its tag names now; and how long the last word is believed after
# the registry was found to be away: not every task waits.
RESOLVING_S, BELIEVED_S = 3.0, 30.0
AWAY = ("unreachable", "registry")  # kinds of errors that say nothing about the image


@dataclass
class Preparing:
    """A builder at work for a reference, and who waits for it.  `known`: what the reference named before, and is here."""

    building: Building
    waiting: list[Asked]
    known: Image | None
    resolving: bool = True  # it still asks what the reference names
    late: bool = False  # and has done so for longer than anybody waits


@dataclass(frozen=True, eq=False)
class _ResolvingLate:
    """To itself: a registry has not said in time what a reference names."""

    preparing: Preparing


class Refusal(Exception):
    """Why there is no lease: for whoever asked."""


class ImageActor(Actor):
    def __init__(self, system: System, name: str, services: Services) -> None:
        super().__init__(system, name)
        self._services = services
        self._settings = services.settings.image
        self._mounts = Path(self._settings.mount_dir)
        self._images: dict[str, Image] = {}
        self._given: dict[str, messages.RootfsReady] = {}
        self._preparing: dict[str, Preparing] = {}
        self._sharing: list[Building] = []  # builders that have said `Built`, and push its archive for the fleet
        self._mounting_root: dict[str, list[Asked]] = {}  # by lease
        self._closing: list[Deferred] = []

    # --- life ---

    def on_begin(self) -> None:
        for directory in (self._settings.cache_dir, self._settings.archive_dir, self._settings.mount_dir):
            Path(directory).mkdir(mode=0o755, parents=True, exist_ok=True)
        self._catalogue = Catalogue(self._services.store, self._settings.archive_dir)
        self._images = self._catalogue.images
        store = self._services.store
        self._leases = Leases(self._services.layout.leases)
        leased = {lease: self._catalogue.find(digest) for lease, digest in held_still(self._leases, store).items()}
        for lease, found in leased.items():
            if found is not None and (login := login_of(lease, store)):
                found.login = login
        for image in self._images.values():
            mount = self._mount_of(image)
            if mount.adopt():
                image.mount = mount
        mounted = self._mounted()
        for lease, found in leased.items():
            path = str(self._mounts / lease)
            if found is None or (task_of(lease) is None and path not in mounted):
                self._leases.give_back(lease)
                continue
            found.leases.add(lease)
            if found.is_mounted:
                self._given[lease] = self._lease_on(found, lease, path if task_of(lease) is None else None)
        for image in self._images.values():
            self._watch_idle(image)
        kept = {lease for image in self._images.values() for lease in image.leases}
        kept |= {Path(place).name for image in self._images.values() if image.mount for place in image.mount.places}
        for _ in unmount_others(self._mounts, kept):
            self._services.recovered.cleaned("mount")

    def on_end(self, reason: object) -> None:
        for preparing in self._preparing.values():
            preparing.building.let_go()
        for building in self._sharing:
            building.let_go()
        for image in self._images.values():
            if image.mount is not None:
                image.mount.let_go()

    def on_message(self, message: Any) -> Any:
        match message:
            case messages.PrepareRootfs():
                return self._prepare(message)
            case messages.ReleaseRootfs(lease):
                return self._release(lease)
            case messages.HearReads():
                return messages.Heard()  # what the servers had said lay before this in the inbox
            case messages.ListImages():
                return self._list()
            case messages.UnmountIdle(digest):
                self._unmount_idle(digest)
            case messages.UnmountAllIdle():
                for image in self._images.values():
                    self._unmount_idle(image.digest)
            case messages.CloseImages():
                return self._close()
            case _ResolvingLate(preparing):
                self._resolving_late(preparing)
            case messages.StopSharing():
                for building in list(self._sharing):
                    self._share_over(building)
            case Worked(("root", lease), path):
                self._root_mounted(lease, path)
            case WorkFailed(("root", lease), error):
                self._root_failed(lease, error)
            case Worked(("unmount", _), _):
                self._check_closed()
            case WorkFailed(("unmount", path), error):
                logger.error("{} could not be unmounted: {}", path, error)
                self._check_closed()
            case _:
                for image in list(self._images.values()):
                    self._from_mount(image, message)
                for preparing in list(self._preparing.values()):
                    self._from_builder(preparing, message)
                for building in list(self._sharing):
                    self._from_sharer(building, message)
        return None

    # --- leases ---

    def _prepare(self, message: messages.PrepareRootfs) -> Any:
        if message.lease in self._given:
            return self._given[message.lease]
        asked = Asked(message, self.deferred())
        try:
            reference = Reference.parse(message.reference)
        except ReferenceInvalid as error:
            asked.reply.set_exception(error)
            return asked.reply
        known = self._catalogue.known(reference, message.login)
        name = name_of(reference, message.login)
        if name in self._preparing and self._preparing[name].late and known is not None:
            self._lease(known, asked)
        elif name in self._preparing:
            self._preparing[name].waiting.append(asked)
        elif known is not None and self._catalogue.is_fresh(reference, message.login, self._settings.resolve_interval_s):
            self._lease(known, asked)
        else:
            self._build(reference, known, asked)
        return asked.reply

    def _lease(self, image: Image, asked: Asked) -> None:
        """Give a lease on an image whose archive is here; the first one has it mounted."""
        try:
            self._leases.take(asked.message.lease, image.digest)
        except OSError as error:
            asked.reply.set_exception(error)
            return
        image.leases.add(asked.message.lease)
        if asked.message.login is not None:
            image.login = asked.message.login
            if image.mount is not None:
                image.mount.login = image.login
        if image.idle is not None:
            image.idle.cancel()
            image.idle = None
        if image.is_mounted:
            self._give(image, asked)
            return
        image.waiting.append(asked)
        if image.mount is None:  # else it is on its way, or on its way out
            self._make_mount(image)

    def _give_waiting(self, image: Image) -> None:
        waiting, image.waiting = image.waiting, []
        for asked in waiting:
            self._give(image, asked)

    def _give(self, image: Image, asked: Asked) -> None:
        lease = asked.message.lease
        if lease not in image.leases:
            asked.reply.set_exception(Refusal("the lease was given back before it was there"))
        elif image.mount is not None and not image.mount.prepare(asked.message.workload):
            image.waiting.append(asked)
        elif asked.message.root:
            self._mounting_root.setdefault(lease, []).append(asked)
            if len(self._mounting_root[lease]) == 1:
                self.work(("root", lease), self._mount_root, image, lease)
        else:
            assert image.mount is not None
            workload, program = asked.message.workload, asked.message.program
            self._given[lease] = given = self._lease_on(image, lease, None, image.mount.data_for(lease, workload))
            if workload:
                image.mount.begin(workload, given.config.line([program] if program else []))
            asked.reply.set(given)

    def _lease_on(self, image: Image, lease: str, path: str | None, data: list[str] | None = None) -> messages.RootfsReady:
        assert image.mount is not None and image.mount.archive is not None
        info = image.mount.archive.info
        config = messages.ImageConfig(info.env, info.entrypoint, info.command)
        return messages.RootfsReady(
            lease, image.reference, image.digest, image.mount.lower, data or image.mount.data, config, path
        )

    def _mount_root(self, image: Image, lease: str) -> str:
        assert image.mount is not None
        path = self._mounts / lease
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
        mounts.mount_overlay(str(path), [image.mount.lower], image.mount.data)
        return str(path)

    def _root_mounted(self, lease: str, path: str) -> None:
        image = self._catalogue.with_lease(lease)
        for asked in self._mounting_root.pop(lease, []):
            if image is None:  # given back meanwhile
                self.work(("unmount", path), self._unmount_root, path)
                asked.reply.set_exception(Refusal("the lease was given back before it was there"))
            else:
                self._given[lease] = self._lease_on(image, lease, path)
                asked.reply.set(self._given[lease])

    def _root_failed(self, lease: str, error: Exception) -> None:
        for asked in self._mounting_root.pop(lease, []):
            self._release(lease)
            asked.reply.set_exception(error)

    def _release(self, lease: str) -> messages.Released:
        for preparing in self._preparing.values():
            # The build goes on: what it fetched is of use to the next one who asks.
            for asked in [asked for asked in preparing.waiting if asked.message.lease == lease]:
                preparing.waiting.remove(asked)
                asked.reply.set_exception(Refusal("the lease was given back before it was there"))
        known = self._leases.has(lease)
        self._leases.give_back(lease)
        self._given.pop(lease, None)
        # Whatever became of its image, which may have had to be built again under it.
        if known and task_of(lease) is None and (path := str(self._mounts / lease)) in self._mounted():
            self.work(("unmount", path), self._unmount_root, path)
        image = self._catalogue.with_lease(lease)
        if image is not None:
            image.leases.discard(lease)
            if image.mount is not None:
                image.mount.released(lease)
            self._watch_idle(image)
        return messages.Released(known or image is not None)

    def _mounted(self) -> set[str]:
        return {mount.target for mount in mounts.mounts_below(str(self._mounts))}

    def _unmount_root(self, path: str) -> None:
        mounts.unmount(path, lazily=True)
        Path(path).rmdir()

    # --- mounts ---

    def _mount_of(self, image: Image, workload: str = "") -> ImageMount:
        mount = ImageMount(self, self._services, image.digest, image.reference, image.complete, workload)
        mount.login = image.login
        return mount

    def _make_mount(self, image: Image) -> None:
        """For those who wait for it; what is missing is fetched from where the last of them named it."""
        self._catalogue.name(image, Reference.parse(image.waiting[-1].message.reference))
        image.mount = self._mount_of(image, image.waiting[-1].message.workload)
        image.mount.make()

    def _from_mount(self, image: Image, message: Any) -> None:
        if image.mount is None:
            return
        match image.mount.take(message):
            case Mounted(complete):
                self._catalogue.note_complete(image, complete)
                self._give_waiting(image)
                self._watch_idle(image)
            case Prepared():
                if image.is_mounted:
                    self._give_waiting(image)
            case NotMounted(error):
                image.mount = None
                self._not_mounted(image, error)
                self._check_closed()
            case Removed(complete):
                image.mount = None
                self._catalogue.note_complete(image, complete)
                if image.waiting:
                    self._make_mount(image)
                self._check_closed()
            case ReadFailed(_, reason):
                self._read_failed(image, reason)

    def _not_mounted(self, image: Image, error: Exception) -> None:
        """The archive is gone or damaged: it is built again for those who wait; anything else is theirs to know."""
        waiting, image.waiting = image.waiting, []
        for asked in waiting:
            self._leases.give_back(asked.message.lease)
            image.leases.discard(asked.message.lease)
        rebuild = isinstance(error, FileNotFoundError | ArchiveInvalid)
        if rebuild:
            logger.warning("the archive of {} cannot be used ({}); it is built again", image.reference, error)
            self._catalogue.remove(image)
        for asked in waiting:
            if rebuild:
                self._build_again(asked)
            else:
                asked.reply.set_exception(error)

    def _read_failed(self, image: Image, reason: str) -> None:
        logger.warning("{}: a read failed: {}", image.reference, reason)
        for lease in image.leases:
            if (task := task_of(lease)) is not None:
                self.system.tell(sandbox_name(task), TaskReadFailed(task, reason))

    def _watch_idle(self, image: Image) -> None:
        if not image.leases and image.is_mounted and image.idle is None:
            image.idle = self.after(0.0 if self._closing else self._settings.idle_unmount_s, messages.UnmountIdle(image.digest))

    def _unmount_idle(self, digest: str) -> None:
        image = self._images.get(digest)
        if image is not None and image.mount is not None and image.is_mounted and not image.leases:
            if image.idle is not None:
                image.idle.cancel()
            image.idle = None
            image.mount.remove()

    # --- building ---

    def _build(self, reference: Reference, known: Image | None, asked: Asked) -> None:
        login = asked.message.login
        building = Building(self, self._services, reference, known.digest if known else None, login)
        preparing = self._preparing[name_of(reference, login)] = Preparing(building, [asked], known)
        if known is not None:
            self.after(RESOLVING_S, _ResolvingLate(preparing))

    def _build_again(self, asked: Asked) -> None:
        reference = Reference.parse(asked.message.reference)
        name = name_of(reference, asked.message.login)
        if name in self._preparing:
            self._preparing[name].waiting.append(asked)
        else:
            self._build(reference, None, asked)

    def _from_builder(self, preparing: Preparing, message: Any) -> None:
        reference, login = preparing.building.reference, preparing.building.login
        match preparing.building.take(message):
            case wire.Progress() as progress:
                preparing.resolving = progress.phase == RESOLVING
                leases = [asked.message.lease for asked in preparing.waiting]
                self.system.tell(GATEWAY, messages.ImageProgress(leases, shown(str(reference), progress)))
            case wire.Resolved(digest):
                self._catalogue.resolve(reference, login, digest)
                self._built(preparing, self._images.get(digest))
            case wire.Built() as built:
                self._catalogue.resolve(reference, login, built.digest)
                self._built(preparing, self._catalogue.add(reference, built), goes_on=preparing.building.shares)
            case wire.BuildFailed(kind, error):
                self._build_failed(preparing, kind, error)

    def _built(self, preparing: Preparing, image: Image | None, goes_on: bool = False) -> None:
        for asked in self._over(preparing, goes_on):
            if image is not None:
                self._lease(image, asked)
            else:  # it was known when the builder began, and its archive has been found damaged meanwhile
                self._build_again(asked)

    def _build_failed(self, preparing: Preparing, kind: str, error: str) -> None:
        reference, login = preparing.building.reference, preparing.building.login
        known = self._catalogue.known(reference, login)
        if kind in AWAY and known is not None:
            if not preparing.late:
                logger.warning("{}: {}; the image it named last, {}, is used", reference, error, known.digest)
            self._catalogue.believe(reference, login, BELIEVED_S)
            self._built(preparing, known)
            return
        for asked in self._over(preparing):
            asked.reply.set_exception(Refusal(error))

    def _resolving_late(self, preparing: Preparing) -> None:
        """What is here is used; the builder may go on asking, for those who come later."""
        if preparing.known is None or not preparing.resolving or preparing not in self._preparing.values():
            return
        reference, known = preparing.building.reference, preparing.known
        logger.warning(
            "{}: its registry has not said within {:g} s what it names; the image it named last, {}, is used",
            reference,
            RESOLVING_S,
            known.digest,
        )
        preparing.late = True
        waiting, preparing.waiting = preparing.waiting, []
        for asked in waiting:
            self._lease(known, asked)

    def _over(self, preparing: Preparing, goes_on: bool = False) -> list[Asked]:
        """The builder has said its last word (it ends by itself), or `goes_on` to share what it built → who waits for it."""
        if goes_on:
            self._sharing.append(preparing.building)
        else:
            preparing.building.let_go()
        del self._preparing[name_of(preparing.building.reference, preparing.building.login)]
        self._check_closed()
        return preparing.waiting

    def _from_sharer(self, building: Building, message: Any) -> None:
        match building.take(message):
            case wire.Shared(_, problem):
                if problem:
                    logger.warning(problem)
                self._share_over(building)
            case wire.Resolved() | wire.BuildFailed():  # of one that took the place of a dead one, and has nothing to share
                self._share_over(building)

    def _share_over(self, building: Building) -> None:
        self._sharing.remove(building)
        building.let_go()
        self._check_closed()

    # --- the rest ---

    def _list(self) -> messages.ImageList:
        return messages.ImageList(
            [
                messages.ImageRow(
                    image.reference,
                    image.digest,
                    image.mount.lower if image.mount is not None and image.is_mounted else None,
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
        for lease in {lease for image in self._images.values() for lease in image.leases} | self._leases.all().keys():
            self._release(lease)
        for image in self._images.values():
            if image.idle is not None:
                image.idle.cancel()
                image.idle = None
            self._watch_idle(image)
        for preparing in [preparing for preparing in self._preparing.values() if preparing.late and preparing.resolving]:
            self._over(preparing)  # it builds nothing
        # Running tasks would get no longer, either.
        self.after(min(SHARING_PATIENCE_S, self._services.settings.daemon.drain_timeout_s), messages.StopSharing())
        self._check_closed()
        return done

    def _check_closed(self) -> None:
        if (
            not self._closing
            or self._preparing
            or self._sharing
            or any(image.mount is not None for image in self._images.values())
        ):
            return
        if mounts.mounts_below(str(self._mounts)):
            return
        for done in self._closing:
            done.set(messages.Released(True))
        self._closing.clear()
