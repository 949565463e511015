"""One image on its way to this node: its builder, and another one when that dies."""

from __future__ import annotations

import itertools
from typing import Any

from loguru import logger

from actors.image import wire
from actors.image.registry.login import Access, Login
from actors.image.registry.mirrors import mirrors_of
from actors.image.registry.reference import Reference
from actors.services import Services
from supervisor.actor import Actor
from supervisor.frames import Codec
from supervisor.isolation import Process
from supervisor.processes import ProcessRow
from supervisor.worker import Ended, Said, Started, Worker

BUILDER_SAYS = Codec(wire.Progress, wire.Resolved, wire.Built, wire.Shared, wire.BuildFailed)
BUILDER = "image builder"
BUILDER_DEATHS_MAX = 5  # in one build; then it is the image that kills them

_numbers = itertools.count(1)


class Building:
    """The building of `reference`, which begins at once.  `known_digest`: the image it named before, whose archive is here.

    `login` is the asking task's, None for Docker's.

    The actor hands every message to `take`, and calls `let_go` after the last word or when it ends.  In a fleet (`shares`) the
    builder goes on after `Built`: `Shared` is its last word.
    """

    def __init__(
        self, actor: Actor, services: Services, reference: Reference, known_digest: str | None, login: Login | None
    ) -> None:
        self.reference = reference
        self.login = login
        s3 = services.settings.s3
        self._bucket = wire.Bucket(s3.bucket, s3.prefix, s3.endpoint, s3.region) if s3.bucket else None
        self._actor = actor
        self._services = services
        self._known_digest = known_digest
        # With a number, so that a late word of an earlier builder is not taken for this one's.
        self._worker = Worker(actor, services.watcher, f"{BUILDER} {reference} {next(_numbers)}")
        self._worker.start(self._make)

    @property
    def shares(self) -> bool:
        """Whether the builder goes on after `Built`."""
        return self._bucket is not None

    def take(self, message: Any) -> wire.Progress | wire.Resolved | wire.Built | wire.Shared | wire.BuildFailed | None:
        """What a message that arrived at the actor means for it; all but `Progress` (and `Built`, if it `shares`) end it."""
        match self._worker.take(message):
            case Started():
                row = ProcessRow(BUILDER, self._worker.pid or 0, self._worker.restarts)
                self._services.processes.put(self._actor.name, row, self._worker.name)
            case Said(_, _, said) if isinstance(
                said, wire.Progress | wire.Resolved | wire.Built | wire.Shared | wire.BuildFailed
            ):
                return said
            case Ended(_, _, how):
                # Killed, most likely; what it had published whole stays, so its successor has less to do.
                self._services.processes.remove(self._actor.name, self._worker.name)
                if self._worker.restarts > BUILDER_DEATHS_MAX:
                    error = f"{self.reference}: its builder died again and again, last: {how}"
                    return wire.BuildFailed("died", error)
                logger.warning("the image builder of {} has ended ({}); another one takes over", self.reference, how)
                self._worker.start(self._make)
        return None

    def let_go(self) -> None:
        self._worker.let_go()
        self._services.processes.remove(self._actor.name, self._worker.name)

    def _make(self) -> Process:
        settings = self._services.settings.image
        order = wire.BuildImage(
            reference=str(self.reference),
            archive_dir=settings.archive_dir,
            cache_dir=settings.cache_dir,
            known_digest=self._known_digest,
            unpacked_bytes_max=settings.unpacked_bytes_max,
            entries_max=settings.entries_max,
            time_max_s=settings.build_timeout_s,
            lazy=True,
            small_inside=settings.prefetch != "off",  # which means that nothing but archives lies with the archives
            access=Access(self.login, mirrors_of(self.reference.registry, settings.mirrors)),
            bucket=self._bucket,
        )
        return self._services.isolation.start(BUILDER, "actors.image.archives.process:serve", order, BUILDER_SAYS)


def shown(reference: str, progress: wire.Progress) -> str:
    """A builder's progress as one short line."""
    if not progress.layers:
        return f"{reference}: {progress.phase}"
    done, total = progress.bytes_done >> 20, progress.bytes_total >> 20
    return f"{reference}: {progress.phase}, {progress.layer} of {progress.layers}, {done} of {total} MiB, {progress.entries} entries"
