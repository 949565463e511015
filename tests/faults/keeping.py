"""Scenarios about the content of images: it is fetched ahead by packs, evicted, repaired, and its archives go.

For a daemon of their own, that makes packs and has a small bound for archives.  Each goes on until all that is armed has struck.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from actors.gateway.client import RequestFailed
from actors.gateway.messages import CheckStorage, PruneStorage
from tests.actors.image.images import member, symlink, tar
from tests.faults.armed_daemon import ArmedDaemon
from tests.faults.load import accounts, taken_bytes
from tests.faults.scenarios import Kill
from tests.node.daemon import PATIENCE_S

SETTINGS = {"AERIE_IMAGE_PREFETCH": "trace", "AERIE_IMAGE_ARCHIVE_MAX": "1Mi"}
FILES = range(6)
UNREAD = bytes(4 << 20)  # an image that is read whole is pulled whole, and not by its pack
LINKS, TARGET_BYTES = 60, 4000  # so that one archive, with its pack, takes more than all of them may
ROUNDS_MAX = 30
PACK_S, AGAIN_S = 300.0, 20.0  # a pack is made only while processors have nothing better to do, and while its image is mounted


class Image:
    """An image of the task's own, of which a task reads much, and not all."""

    def __init__(self, daemon: ArmedDaemon, task: str) -> None:
        self._daemon, self._task, self._uses = daemon, task, 0
        self._files = [f"{task} {number} ".encode() * 2000 for number in FILES]
        members = [
            member("bin/busybox", Path("/bin/busybox").read_bytes(), mode=0o755),
            member("unread", UNREAD + task.encode()),
        ]
        members += [member(f"data/{number}", content) for number, content in enumerate(self._files)]
        members += [symlink(f"links/{number}", f"{number}".ljust(TARGET_BYTES, "x")) for number in range(LINKS)]
        repository = daemon.registry.repository("kept")
        self._digest = repository.push(tar(*members), tag=task)["digest"].replace(":", "-")
        self._reference = repository.reference(task)

    def use(self) -> None:
        """A task reads it, and reads what is right."""
        self._uses += 1
        name = f"{self._task}-{self._uses}"
        command = ["/bin/busybox", "md5sum", *(f"/data/{number}" for number in FILES)]
        result = self._daemon.result(self._daemon.submit(command, task=name, image=self._reference))
        stdout, _ = self._daemon.logs(name)
        assert (result.exit_code, result.error) == (0, None)
        found = [line.split()[0].decode() for line in stdout.splitlines()]
        assert found == [hashlib.md5(content).hexdigest() for content in self._files]

    def objects(self) -> list[Path]:
        """Where its files' contents are on this node, those that are."""
        keys = [hashlib.sha256(content).hexdigest() for content in self._files]
        paths = [self._daemon.state / "images/cache" / key[:2] / key[2:] for key in keys]
        return [path for path in paths if path.exists()]

    def archive(self, suffix: str = "") -> list[Path]:
        """Its archive, and what lies beside it."""
        return list((self._daemon.state / "images/archives").glob(f"{self._digest}*{suffix}"))


def prefetched(daemon: ArmedDaemon, task: str, kill: Kill) -> None:
    """A task is recorded, a pack is made of that, and brings what it has when the content has been evicted."""
    image = Image(daemon, task)
    with kill(task):
        for left in rounds(daemon):
            image.use()
            await_pack(daemon, image, lambda left=left: daemon.left() != left)
            prune(daemon, image.objects)
    image.use()
    check_accounts(daemon)


def evicted(daemon: ArmedDaemon, task: str, kill: Kill) -> None:
    image = Image(daemon, task)
    with kill(task):
        for _ in rounds(daemon):
            image.use()
            prune(daemon, image.objects)
    image.use()
    check_accounts(daemon)


def repaired(daemon: ArmedDaemon, task: str, kill: Kill) -> None:
    image = Image(daemon, task)
    image.use()
    right = {path: path.read_bytes() for path in image.objects()}
    with kill(task):
        for _ in rounds(daemon):
            for path, content in right.items():
                path.write_bytes(b"damaged" + content[7:])
            while any(path.read_bytes() != content for path, content in right.items()):
                with suppress(RequestFailed):  # who looks has been killed, and nobody is told that all is right
                    daemon.client.ask(CheckStorage(daemon.client.number()), timeout_s=PATIENCE_S)
    image.use()
    check_accounts(daemon)


def archives_evicted(daemon: ArmedDaemon, task: str, kill: Kill) -> None:
    """What lies beside an archive goes with it."""
    image = Image(daemon, task)
    image.use()
    await_pack(daemon, image)
    with kill(task):
        deadline = time.monotonic() + PATIENCE_S
        while image.archive():
            assert time.monotonic() < deadline, image.archive()
            for path in image.archive(".aerie"):
                with suppress(FileNotFoundError):  # an evictor may be at it
                    os.utime(path, (time.time() - 3600,) * 2)  # so long ago it was used last
            daemon.client.ask(PruneStorage(daemon.client.number(), 0), timeout_s=PATIENCE_S)
        image.use()


SCENARIOS: dict[str, Callable[[ArmedDaemon, str, Kill], None]] = {
    "content prefetched": prefetched,
    "content evicted": evicted,
    "content repaired": repaired,
    "archives evicted": archives_evicted,
}


# --- what they are made of ---


def rounds(daemon: ArmedDaemon) -> Iterator[list[str]]:
    """Rounds until all that is armed has struck; in each, what has not yet."""
    for _ in range(ROUNDS_MAX):
        if not (left := daemon.left()):
            return
        yield left


def await_pack(daemon: ArmedDaemon, image: Image, is_struck: Callable[[], bool] = lambda: False) -> None:
    """Wait until the pack of what a task has read is there, unless something has been struck: then it may not be."""
    deadline, again_s = time.monotonic() + PACK_S, time.monotonic() + AGAIN_S
    while not image.archive(".pack") and not is_struck():
        assert time.monotonic() < deadline, daemon.log.read_text()[-3000:]
        time.sleep(0.01)
        if time.monotonic() > again_s:  # it was unmounted, for archives take too much, and who made the pack was ended
            image.use()
            again_s = time.monotonic() + AGAIN_S


def prune(daemon: ArmedDaemon, there: Callable[[], object]) -> None:
    """Ask for room until what is there is gone: whoever makes it may be killed, and then says so."""
    deadline = time.monotonic() + PATIENCE_S
    while there():
        assert time.monotonic() < deadline, there()
        daemon.client.ask(PruneStorage(daemon.client.number(), 1 << 40), timeout_s=PATIENCE_S)


def check_accounts(daemon: ArmedDaemon) -> None:
    """What the objects take is what their accounts say, as soon as nobody is just publishing one."""
    cache = daemon.state / "images/cache"
    deadline = time.monotonic() + PATIENCE_S
    while (found := accounts(cache)) != (there := taken_bytes(cache)):
        assert time.monotonic() < deadline, (found, there)
        time.sleep(0.02)
