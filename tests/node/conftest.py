"""One registry with one small image, and one daemon to a module; after each test nothing of its tasks may be left."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.actors.image.images import Member, RunningRegistry, directory, member, symlink, tar
from tests.node.daemon import PATIENCE_S, Daemon, running

APPLETS = (
    "cat chmod cp dd df echo env false find head id ip kill ln ls md5sum mkdir mknod mv pwd rm seq sh sleep stat sync tail "
    "touch true wc yes"
)


def busybox_layer() -> bytes:
    return tar(*busybox_members())


def busybox_members() -> list[Member]:
    links = [symlink(f"bin/{name}", "busybox") for name in APPLETS.split()]
    etc = [directory("etc"), member("etc/passwd", b"root:x:0:0::/:/bin/sh\n"), member("etc/data", bytes(range(256)) * 4000)]
    folders = [directory(name) for name in ("bin", "proc", "sys", "dev", "tmp")]
    return [*folders, member("bin/busybox", Path("/bin/busybox").read_bytes(), mode=0o755), *links, *etc]


@contextmanager
def own_disk(tmp_path: Path, size_bytes: int) -> Iterator[Path]:
    """A file system that nobody else writes to, mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    picture = tmp_path / "disk.img"
    with open(picture, "wb") as file:
        file.truncate(size_bytes)
    subprocess.run(["mkfs.ext4", "-q", picture], check=True)
    subprocess.run(["mount", "-o", "loop", picture, disk], check=True)
    try:
        yield disk
    finally:
        # What was unmounted lazily, and lay there, may be on its way out still.
        deadline = time.monotonic() + PATIENCE_S
        while (done := subprocess.run(["umount", disk], capture_output=True, check=False)).returncode:
            assert b"busy" in done.stderr and time.monotonic() < deadline, done
            time.sleep(0.05)


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    running_registry = RunningRegistry(tmp_path_factory.mktemp("registry"))
    yield running_registry
    running_registry.stop()


@pytest.fixture(scope="session")
def image(registry: RunningRegistry) -> str:
    repository = registry.repository("busybox")
    repository.push(
        busybox_layer(), tag="1", process={"Env": ["PATH=/bin", "FROM_IMAGE=yes"], "Cmd": ["/bin/sh"], "User": "root"}
    )
    return repository.reference("1")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, image: str) -> Iterator[Daemon]:
    with running(tmp_path_factory.mktemp("node"), image) as started:
        yield started


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "daemon" in request.fixturenames:
        daemon: Daemon = request.getfixturevalue("daemon")
        daemon.wait_nothing_left()
