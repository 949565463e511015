"""Which images are on this node, and what each reference named when the registry was last asked: kept in the store."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from actors.image import messages
from actors.image.archives.archive import Archive, archive_path
from actors.image.errors import ArchiveInvalid
from actors.image.mounted import ImageMount, State
from actors.image.registry.login import Login
from actors.image.registry.reference import Reference
from actors.image.wire import Built
from supervisor.answers import Deferred
from supervisor.store import Store


@dataclass(frozen=True)
class Resolution:
    """What a reference named when the registry was last asked, at `at` (seconds since 1970), with some login or none."""

    digest: str
    at: float


@dataclass
class Asked:
    """Somebody who waits for a lease."""

    message: messages.PrepareRootfs
    reply: Deferred


@dataclass
class Image:
    """An image whose archive is on this node.  `complete`: so is all of its content, durable."""

    digest: str
    reference: str
    unpacked_bytes: int
    complete: bool
    mount: ImageMount | None = None
    login: Login | None = None  # of the last task that brought one: for what is still to be fetched
    leases: set[str] = field(default_factory=set)
    waiting: list[Asked] = field(default_factory=list)  # for the mount
    idle: Any = None  # the timer that unmounts it

    @property
    def is_mounted(self) -> bool:
        return self.mount is not None and self.mount.state is State.THERE


def name_of(reference: Reference, login: Login | None) -> str:
    """Names a reference as it is seen with a login: a registry may show each login something else."""
    return f"{reference} as {login.fingerprint}" if login else str(reference)


class Catalogue:
    """The images by digest.  What is written is durable a moment later: a row lost is an image resolved or looked for again."""

    def __init__(self, store: Store, archive_dir: str) -> None:
        self._store = store
        self._archive_dir = archive_dir
        self._believed_until_s: dict[str, float] = {}  # on time.monotonic()
        self._resolved = {
            reference: Resolution(digest, resolved_at)
            for reference, digest, resolved_at in store.read("SELECT reference, digest, resolved_at FROM resolutions")
        }
        self.images = {
            digest: Image(digest, reference, unpacked_bytes, bool(complete))
            for digest, reference, unpacked_bytes, complete in store.read(
                "SELECT digest, reference, unpacked_bytes, complete FROM contents"
            )
        }

    def known(self, reference: Reference, login: Login | None) -> Image | None:
        """The image that the reference named when the registry was last asked with this login.

        Who knows an image's digest has seen its manifest: that is leave enough.
        """
        found = self._resolved.get(name_of(reference, login))
        return self.images.get(reference.digest or "") or self.images.get(found.digest if found else "")

    def is_fresh(self, reference: Reference, login: Login | None, interval_s: float) -> bool:
        """Whether the registry need not be asked: a digest never changes, a tag is believed for a while."""
        if reference.digest:
            return True
        name = name_of(reference, login)
        found = self._resolved.get(name)
        return found is not None and (
            time.time() - found.at < interval_s or time.monotonic() < self._believed_until_s.get(name, 0.0)
        )

    def believe(self, reference: Reference, login: Login | None, time_s: float) -> None:
        """The registry cannot be asked: what the reference named last is believed for so long."""
        self._believed_until_s[name_of(reference, login)] = time.monotonic() + time_s

    def resolve(self, reference: Reference, login: Login | None, digest: str) -> None:
        """The registry says what the reference names now, to whom has this login."""
        found = self._resolved[name_of(reference, login)] = Resolution(digest, time.time())
        if login is None:  # what a login was shown is not kept longer than the login
            self._store.write(("INSERT OR REPLACE INTO resolutions VALUES (?, ?, ?)", (str(reference), digest, found.at)))

    def add(self, reference: Reference, built: Built) -> Image:
        """The archive of an image is here."""
        image = self.images.setdefault(built.digest, Image(built.digest, str(reference), built.unpacked_bytes, built.complete))
        image.complete |= built.complete
        self._store.write(
            (
                "INSERT OR REPLACE INTO contents (digest, reference, unpacked_bytes, complete_at, complete) VALUES (?, ?, ?, ?, ?)",
                (image.digest, image.reference, image.unpacked_bytes, time.time(), int(image.complete)),
            )
        )
        return image

    def name(self, image: Image, reference: Reference) -> None:
        """The image is wanted by this reference now: it leads to a registry that is there, most likely."""
        if image.reference != str(reference):
            image.reference = str(reference)
            self._store.write(("UPDATE contents SET reference = ? WHERE digest = ?", (image.reference, image.digest)))

    def find(self, digest: str) -> Image | None:
        """The image, also when its row had not reached the store before everything was killed.  Blocks."""
        if digest not in self.images:
            try:
                info = Archive.open(archive_path(self._archive_dir, digest)).info
            except (OSError, ArchiveInvalid):
                return None
            self.images[digest] = Image(digest, info.reference, info.unpacked_bytes, complete=False)
        return self.images[digest]

    def note_complete(self, image: Image, complete: bool) -> None:
        """Whether all content of the image is here and durable."""
        if complete != image.complete:
            image.complete = complete
            self._store.write(("UPDATE contents SET complete = ? WHERE digest = ?", (int(complete), image.digest)))

    def remove(self, image: Image) -> None:
        """The archive of an image cannot be used any more."""
        del self.images[image.digest]
        self._store.write(("DELETE FROM contents WHERE digest = ?", (image.digest,)))

    def with_lease(self, lease: str) -> Image | None:
        return next((image for image in self.images.values() if lease in image.leases), None)
