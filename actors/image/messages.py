"""What may be said to the ImageActor, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence

from actors.image.registry.login import Login
from supervisor.frames import Message


class PrepareRootfs(Message, frozen=True):
    """Lease the root file system of an image → RootfsReady, or Refused with a text for the submitter.

    `lease` is the asker's name for the lease: asked again with the same name, the answer is the same lease.  With `root` the
    image is also mounted as one read-only tree (`image mount`); a task brings its own upper directory and needs only the layers.
    `login` is for the image's registry, None for what Docker's config has: what a tag names is asked of the registry once for each
    login, so that nobody gets a private image by its name because another task might.  `workload`: of what tasks this is one, for what is
    fetched ahead (`trace.workload_of`); "" of none.  `program`: the first word of its command; "" when that is the image's.
    """

    lease: str
    reference: str
    root: bool = False
    login: Login | None = None
    workload: str = ""
    program: str = ""


class ImageConfig(Message, frozen=True):
    """What a task needs of the image's configuration."""

    env: list[str]
    entrypoint: list[str]
    command: list[str]

    def line(self, command: Sequence[str]) -> list[str]:
        """A task's command line, as Docker and the OCI image specification make it: Entrypoint, then the command, or Cmd when there is
        none.  Empty when nothing is left to run.
        """
        return [*self.entrypoint, *(command or self.command)]


class RootfsReady(Message, frozen=True):
    """`lower` and `data`: the layers for an overlay mount; `path`: the mounted root, when one was asked for."""

    lease: str
    reference: str
    digest: str
    lower: str
    data: list[str]
    config: ImageConfig
    path: str | None


class ReleaseRootfs(Message, frozen=True):
    """Give a lease back → Released.  A lease that is not held (any more) is no error: `known` says so."""

    lease: str


class Released(Message, frozen=True):
    known: bool


class HearReads(Message, frozen=True):
    """→ Heard, when whoever has a lease has been told of every read that failed before this was asked."""


class Heard(Message, frozen=True):
    pass


class ListImages(Message, frozen=True):
    """→ ImageList"""


class ImageRow(Message, frozen=True):
    reference: str
    digest: str
    path: str | None
    leases: list[str]
    unpacked_bytes: int


class ImageList(Message, frozen=True):
    images: list[ImageRow]


class UnmountIdle(Message, frozen=True):
    """To itself: the idle time of an image is over."""

    digest: str


class UnmountAllIdle(Message, frozen=True):
    """There is no room: what nobody uses need not stay mounted."""


class CloseImages(Message, frozen=True):
    """Release every lease and unmount everything → Released."""


class StopSharing(Message, frozen=True):
    """To itself: what is still being pushed to the fleet's bucket is given up."""


class ImageProgress(Message, frozen=True):
    """Told to the gateway: what those who want these leases wait for."""

    leases: list[str]
    text: str
