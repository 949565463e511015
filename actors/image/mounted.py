"""One image, mounted: META, and LAZY with its server when content is missing.

    MAKING      the archive is opened and, unless all content is known to be here, looked for; LAZY is mounted and served; META comes
                last: where META is mounted, all of it is
    THERE       what the server has fetched is published, a batch at a time
    REMOVING    everything is unmounted, when what is whole in the spool has been published

Mounts, connection, server and spool outlive the actor: its next incarnation adopts them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

from loguru import logger

from actors.image import wire
from actors.image.archives import pack, trace
from actors.image.archives.archive import Archive, archive_path
from actors.image.errors import ArchiveInvalid
from actors.image.holding import Holding
from actors.image.lazy import spool
from actors.image.prefetch.policy import How, Plan, Sizes, plan
from actors.image.prefetch.prefetching import Prefetching, Prepared
from actors.image.prefetch.programs import Programs
from actors.image.prefetch.tracing import Recorded, Tracing
from actors.image.registry.credentials import docker_login
from actors.image.registry.login import Access, Login
from actors.image.registry.mirrors import mirrors_of
from actors.image.registry.reference import Reference
from actors.lazytree import mounts
from actors.lazytree.objects import Objects
from actors.lazytree.served import LazyServer, Program
from actors.lazytree.wire import Progress, ReadFailed, Ready
from actors.services import Services
from supervisor.actor import Actor
from supervisor.answers import Worked, WorkFailed
from supervisor.frames import Codec

SAMPLE = 256  # objects
READ_AHEAD_KIB = 128
"""Of the kernel, which does not know what is far away: around each page that is missing, it would fetch a mebibyte.  The server reads
ahead of whom reads on."""
SERVER_SAYS = Codec(Ready, Progress, ReadFailed, wire.Completed, wire.LoginWanted, wire.TracePart)


class State(Enum):
    MAKING = auto()
    THERE = auto()
    REMOVING = auto()
    GONE = auto()


@dataclass(frozen=True)
class Mounted:
    """The image is mounted.  `complete`: all of its content is on this node, and durable."""

    complete: bool


@dataclass(frozen=True)
class NotMounted:
    """The image could not be mounted, and nothing of it is left."""

    error: Exception


@dataclass(frozen=True)
class Removed:
    """The image is not mounted any more.  `complete`: as for `Mounted`."""

    complete: bool


@dataclass(frozen=True, eq=False)
class _NotReady:
    mount: ImageMount


@dataclass(frozen=True, eq=False)
class _Login:
    """Docker's login for a registry is looked for, beside all other work."""

    mount: ImageMount
    registry: str


@dataclass(frozen=True, eq=False)
class _Save:
    """A trace is put beside the archive, beside all other work."""

    mount: ImageMount
    workload: str


class ImageMount:
    """One mount of the image `digest`, known as `reference`, from `make` or `adopt` to its end.

    The actor hands every message to `take` and calls the rest from its own thread; its `on_end` must `let_go`.  At most one piece of
    blocking work is under way at a time, so none of them meets another.
    """

    def __init__(
        self, actor: Actor, services: Services, digest: str, reference: str, complete: bool, workload: str = ""
    ) -> None:
        self.state = State.MAKING
        self.archive: Archive | None = None
        self._actor = actor
        self._services = services
        self._settings = services.settings.image
        self.login: Login | None = None  # of the last task that brought one
        self._reference = reference
        self._complete = complete
        self._digest = digest
        self._workload = workload  # for whose tasks it is made
        self._prefetches = services.settings.image.prefetch != "off"
        self._tracing: Tracing | None = None
        self._prefetching: Prefetching | None = None
        self._packs: set[str] = set()
        self._packs_found: set[str] = set()  # workloads whose pack is somewhere
        self._programs: Programs | None = None
        self._holding = Holding(services, digest)
        self._plan = Plan(How.LAZY)
        self._archive_path = archive_path(self._settings.archive_dir, digest)
        name = digest.replace(":", "-")
        self._meta = Path(self._settings.mount_dir) / name
        self._lazy_target = self._meta.with_name(f"{name}.lazy")
        self._spool = f"spool/image/{digest}"
        self._lazy = LazyServer(
            actor,
            services,
            f"image mount {reference}",
            f"image/{digest}",
            self._lazy_target,
            Program("actors.image.serve:serve", self._order, SERVER_SAYS, [self._spool]),
        )
        self._ready = False  # LAZY answers, or there is none
        self._failure: Exception | None = None
        self._completed: set[int] = set()  # and not yet published
        self._doing = ""

    @property
    def lower(self) -> str:
        """The layer with the names, for an overlay mount."""
        return str(self._meta)

    @property
    def data(self) -> list[str]:
        """The layers with the content, for the same."""
        return [self._settings.cache_dir, *([str(self._lazy_target)] if self._lazy.minor else [])]

    def prepare(self, workload: str) -> bool:
        """See to what is fetched ahead for a workload → whether its tasks may begin; if not, `Prepared` follows."""
        return (
            self._prefetching is None
            or self._complete
            or self._plan.how is How.PULL
            or not workload
            or self._prefetching.prepare(workload)
        )

    def data_for(self, lease: str, workload: str) -> list[str]:
        """The layers with the content for a new task, which is recorded if its workload has no trace yet."""
        if self._tracing is None or not self._lazy.minor or not self._tracing.wants(workload):
            return self.data
        self._tracing.begin(lease, workload)
        self._lazy.send(wire.BeginTrace(lease))
        return [str(self._lazy_target)]

    def begin(self, workload: str, line: Sequence[str]) -> None:
        """A task of this workload begins, with that command line, as far as it is known."""
        if self.archive is None or not self._lazy.minor or workload in self._packs or workload in self._packs_found:
            return  # a pack has all of that, too
        if self._tracing is not None and workload not in self._tracing.known:
            return  # it is recorded, and its trace is not to have what it does not read
        if not line:
            return
        if self._programs is None:
            arguments = (self._actor, self._services, self._reference, self.lower, self.data, self.archive.info.env)
            self._programs = Programs(*arguments)
        self._programs.read(line[0])

    def released(self, lease: str) -> None:
        """A lease is given back."""
        if self._tracing is not None and self._tracing.is_recorded(lease):
            self._lazy.send(wire.EndTrace(lease))

    @property
    def places(self) -> list[str]:
        """Where it is mounted."""
        return [str(self._meta), str(self._lazy_target)]

    # --- the actor's orders ---

    def adopt(self) -> bool:
        """Take over what an earlier incarnation has mounted → whether it is whole; what is not is unmounted.  Blocks."""
        try:
            if str(self._meta) in {mount.target for mount in mounts.mounts_below(str(self._meta))} and self._lazy.find():
                if self._lazy.minor:
                    self._keep_spool()  # first: a server that is started is given it, and we publish from it
                self._lazy.adopt()
                self._holding.keep(self._archive_path)
                self.archive = Archive.open(self._archive_path)
                self._holding.hold(self.archive, self._reference, self.login is not None)
                if self._prefetches and self._lazy.minor:
                    self._look_for_packs()
                    self._begin_prefetching()
                self.state, self._ready = State.THERE, True
                return True
        except (OSError, ArchiveInvalid) as error:
            logger.warning("{} is mounted, and its archive cannot be used any more: {}", self._reference, error)
        self._unmount()
        self._end()
        return False

    def make(self) -> None:
        """Mount it → `Mounted` or `NotMounted`."""
        self._actor.after(self._services.settings.mount.ready_timeout_s, _NotReady(self))
        self._go_on()

    def remove(self) -> None:
        """Unmount what is there → `Removed`."""
        self.state, self._lazy.wanted = State.REMOVING, False
        self._go_on()

    def let_go(self) -> None:
        """The actor ends, and another incarnation adopts what there is."""
        self._lazy.let_go()
        self._let_prefetchers_go()
        self._holding.let_go()

    # --- what comes back ---

    def take(self, message: Any) -> Mounted | NotMounted | Removed | ReadFailed | Prepared | None:
        """What a message that arrived at the actor means for this mount."""
        event: Mounted | NotMounted | Removed | ReadFailed | Prepared | None = None
        match message:
            case Worked((owner, step), value) if owner is self:
                self._doing = ""
                event = self._worked(step, value)
            case WorkFailed((owner, step), error) if owner is self:
                self._doing = ""
                event = self._work_failed(step, error)
            case Worked(_Login(owner, registry), login) if owner is self:
                self._lazy.send(wire.LoginFound(registry, login))
            case WorkFailed(_Login(owner, registry), error) if owner is self:
                self._lazy.send(wire.LoginFound(registry, None, str(error)))
            case Worked(_Save(owner, workload), _) if owner is self:
                if self._prefetching is not None:
                    self._prefetching.make(workload)
            case WorkFailed(_Save(owner, _), error) if owner is self:
                logger.warning("{}: a trace could not be kept: {}", self._reference, error)
            case _NotReady(owner):
                if owner is self and self.state is State.MAKING:
                    time_s = self._services.settings.mount.ready_timeout_s
                    self._fail(TimeoutError(f"{self._reference} was not mounted within {time_s:g} s"))
            case _:
                event = self._from_server(message) or self._from_prefetcher(message)
        self._go_on()
        return event

    def _from_server(self, message: Any) -> ReadFailed | None:
        match self._lazy.take(message):
            case Ready():
                self._ready = True
            case wire.Completed(rows):
                self._completed.update(rows)
            case wire.LoginWanted(registry):
                self._find_login(registry)
            case wire.TracePart() as part if self._tracing is not None:
                if (recorded := self._tracing.take(part)) is not None:
                    self._keep_trace(recorded)
            case ReadFailed() as failed:
                return failed
        return None

    def _from_prefetcher(self, message: Any) -> Prepared | None:
        if self._programs is not None:
            self._programs.take(message)
        if self._prefetching is None:
            return None
        match self._prefetching.take(message):
            case wire.Completed(rows):
                self._completed.update(rows)
            case Prepared(workload, found) as prepared:
                if found:
                    self._packs_found.add(workload)
                    if self._tracing is not None:
                        self._tracing.known.add(workload)
                return prepared
        return None

    def _find_login(self, registry: str) -> None:
        """A registry or mirror refuses the server's login: that of the last task that brought one, or Docker's, may be newer."""
        if self.login is not None and registry == Reference.parse(self._reference).registry:
            self._lazy.send(wire.LoginFound(registry, self.login))
        else:
            self._actor.work(_Login(self, registry), docker_login, registry)

    def _keep_trace(self, recorded: Recorded) -> None:
        arguments = (self._settings.archive_dir, self._digest, recorded.workload, recorded.trace)
        self._actor.work(_Save(self, recorded.workload), trace.save, *arguments)

    def _go_on(self) -> None:
        """Begin what is to be done next, unless something is being done."""
        if self._doing:
            return
        match self.state:
            case State.MAKING if self._failure is not None:
                self._do("remove", self._remove)
            case State.MAKING if self.archive is None:
                self._do("look", self._look)
            case State.MAKING if self._ready:
                self._do("mount", self._mount)
            case State.THERE if self._completed:
                self._do("publish", self._publish)
            case State.REMOVING:
                self._do("remove", self._remove)

    def _do(self, step: str, function: Callable[[], Any]) -> None:
        self._doing = step
        self._actor.work((self, step), function)

    def _worked(self, step: str, value: Any) -> Mounted | NotMounted | Removed | None:
        match step:
            case "look" if self._failure is None:
                self.archive, self._complete, minor = value
                if minor:
                    self._lazy.start(minor)
                    self._begin_prefetching()
                    if not self._complete and self._plan.how is not How.PULL:
                        self.prepare(self._workload)
                else:
                    self._ready = True
            case "mount" if self._failure is None:
                self.state = State.THERE
                return Mounted(self._complete)
            case "publish":
                self._completed.difference_update(value)
                if not value:  # there is no room for them, and they are served and not kept; the server says it again
                    self._completed.clear()
                self._lazy.send(wire.Taken(value))
            case "remove":
                return self._removed(value)
        return None

    def _work_failed(self, step: str, error: Exception) -> NotMounted | Removed | None:
        match step:
            case "publish":  # a full disk, most likely; the server says it again
                logger.error("{}: what was fetched cannot be published: {}", self._reference, error)
                self._completed.clear()
            case "remove":
                logger.error("{} could not be unmounted: {}", self._reference, error)
                return self._removed(self._complete)
            case _:
                self._fail(error)
        return None

    def _removed(self, complete: bool) -> NotMounted | Removed:
        self._end()
        return NotMounted(self._failure) if self._failure is not None else Removed(complete)

    def _fail(self, error: Exception) -> None:
        """It cannot be made.  A worker thread of ours that waits for LAZY in the kernel is freed by this."""
        self._failure = self._failure or error
        self._lazy.wanted = False
        self._lazy.abort()

    def _end(self) -> None:
        self.state = State.GONE
        self._let_prefetchers_go()
        self._lazy.release()
        self._holding.release()
        self._services.descriptors.drop(self._spool)

    def _let_prefetchers_go(self) -> None:
        if self._prefetching is not None:
            self._prefetching.let_go()
        if self._programs is not None:
            self._programs.let_go()

    # --- what blocks, one at a time, in the worker pool ---

    def _look(self) -> tuple[Archive, bool, int]:
        """Open the archive and, if content is missing or the task is to be recorded, mount LAZY.

        → archive, whether all content is here, LAZY's minor or 0.
        """
        for target in (self._meta, self._lazy_target):
            mounts.unmount(str(target), lazily=True)
        self._holding.keep(self._archive_path)
        archive = Archive.open(self._archive_path)
        stays = self._holding.hold(archive, self._reference, self.login is not None)
        # Of an image that was whole a sample is looked for: somebody may have emptied the cache.
        complete = stays and self._is_complete(archive, SAMPLE if self._complete and self._holding.is_whole() else None)
        if complete:
            self._holding.note_whole()
        if self._prefetches:
            self._look_for_packs()
        if complete and (self._tracing is None or not self._tracing.wants(self._workload)):
            return archive, True, 0
        if self._prefetches and not complete:
            self._make_plan(archive)
        self._keep_spool()
        return archive, complete, self._lazy.open()

    def _make_plan(self, archive: Archive) -> None:
        sizes = Sizes(sum(layer.size_bytes for layer in archive.info.layers), archive.info.unpacked_bytes)
        recorded = trace.load(self._settings.archive_dir, self._digest, self._workload) if self._workload else None
        self._plan = plan(self._settings.prefetch, sizes, recorded, self._workload in self._packs)

    def _look_for_packs(self) -> None:
        self._packs = pack.workloads(self._settings.archive_dir, self._digest)
        self._tracing = Tracing(set(self._packs))

    def _begin_prefetching(self) -> None:
        if self._prefetches:
            arguments = (self._actor, self._services, self._reference, self._archive_path, self._spool, self._packs)
            self._prefetching = Prefetching(*arguments)

    def _keep_spool(self) -> None:
        if self._services.descriptors.get(self._spool) is None:
            self._services.descriptors.keep({self._spool: spool.create(self._settings.cache_dir)})

    def _order(self, init_request: bytes, replacement: bool) -> wire.ServeImage:
        settings = self._services.settings
        return wire.ServeImage(
            archive=self._archive_path,
            reference=self._reference,
            objects=settings.image.cache_dir,
            init_request=init_request,
            replacement=replacement,
            read_timeout_s=settings.mount.read_timeout_s,
            uid=settings.sandbox.uid,
            gid=settings.sandbox.gid,
            spool_bytes_max=settings.image.spool_bytes_max,
            access=Access(self.login, mirrors_of(Reference.parse(self._reference).registry, settings.image.mirrors)),
            traces=self._prefetches,
            fill_parallel=self._plan.fill_parallel,
            fill_bytes_per_s=self._plan.fill_bytes_per_s,
            fill_delay_s=self._plan.fill_delay_s,
        )

    def _mount(self) -> None:
        if self._lazy.minor:
            mounts.tune_fuse(self._lazy.minor, read_ahead_kib=READ_AHEAD_KIB)
            os.statvfs(self._lazy_target)  # ready is who has answered
        self._meta.mkdir(mode=0o755, parents=True, exist_ok=True)
        mounts.mount_erofs(self._archive_path, str(self._meta))

    def _publish(self) -> list[int]:
        held = self._services.descriptors.get(self._spool)
        if held is None or self.archive is None:
            return []
        with self._objects() as objects:
            return spool.publish(self.archive.path, held, objects, sorted(self._completed))

    def _remove(self) -> bool:
        """→ whether all content is here now."""
        complete = self._complete
        if self._lazy.minor and self._failure is None and self.archive is not None:
            try:
                while self._completed and (published := self._publish()):
                    self._completed.difference_update(published)
                complete = self._is_complete(self.archive)
                if not complete:
                    with self._objects() as objects:
                        objects.sync()  # or a power cut would cost what was fetched
            except (OSError, ArchiveInvalid) as error:
                logger.warning("{}: not all that was fetched could be kept: {}", self._reference, error)
        self._unmount()
        return complete

    def _unmount(self) -> None:
        for target in (self._meta, self._lazy_target):
            mounts.unmount(str(target), lazily=True)
            with contextlib.suppress(FileNotFoundError):
                target.rmdir()

    def _is_complete(self, archive: Archive, sample: int | None = None) -> bool:
        """Whether OBJECTS have all that the archive names, or a `sample` of it; if all, it is durable."""
        with self._objects() as objects:
            with contextlib.closing(archive.objects()) as table:
                step = 1 if sample is None else -(-len(table) // sample) or 1
                rows = (table.row(index) for index in range(0, len(table), step))
                complete = all(objects.has_of_size(row.key, row.size_bytes) for row in rows)
            if complete and sample is None and not self._complete:
                objects.sync()
        return complete

    def _objects(self) -> contextlib.closing[Objects]:
        return contextlib.closing(Objects(self._settings.cache_dir))


def unmount_others(directory: Path, kept: Collection[str]) -> Iterator[str]:
    """Unmount what is mounted in `directory` under names that are not `kept` → each place; a kill came before it had an owner."""
    for entry in directory.iterdir():
        if entry.name not in kept:
            for mount in mounts.mounts_below(str(entry)):
                logger.warning("{} is mounted for nobody; it is unmounted", mount.target)
                mounts.unmount(mount.target, lazily=True)
                yield mount.target
            with contextlib.suppress(OSError):  # a file of somebody's
                entry.rmdir()
