"""Archives are bounded too: which goes when all together are too large, which stays, and that one that went is made again."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.actors.image.images import RunningRegistry, member, symlink, tar
from tests.actors.image.proxy import Proxy, silent
from tests.node.conftest import busybox_layer
from tests.node.daemon import PATIENCE_S, Daemon, running
from tests.node.test_cache import unmounted, usage

NAMES = ("a", "b", "c")
LINKS, TARGET_BYTES = 100, 4000  # of each image: nearly half a mebibyte of names, and so of archive
CAP_BYTES = 1 << 20  # two of the three
SCRIPT = "cat /name; readlink /links/7 | wc -c"


@pytest.fixture(scope="module")
def proxy(registry: RunningRegistry) -> Iterator[Proxy]:
    for name in NAMES:
        links = [symlink(f"links/{number}", f"{name}{number}".ljust(TARGET_BYTES, "x")) for number in range(LINKS)]
        registry.repository(f"archive-{name}").push(
            busybox_layer(), tar(member("name", name.encode()), *links), tag="1", process={"Env": ["PATH=/bin"]}
        )
    with Proxy(registry.address) as proxy:
        yield proxy


class Archives:
    """A daemon's archives, of the images NAMES."""

    def __init__(self, daemon: Daemon, proxy: Proxy) -> None:
        self._daemon = daemon
        self._proxy = proxy
        self._directory = daemon.state / "images/archives"
        self._paths: dict[str, Path] = {}

    def of(self, daemon: Daemon) -> None:
        """Another daemon has them now."""
        self._daemon = daemon

    def reference(self, name: str) -> str:
        return f"{self._proxy.address}/archive-{name}:1"

    def make(self) -> None:
        for name in NAMES:
            before = set(self._directory.iterdir())
            self.use(name)
            [self._paths[name]] = set(self._directory.iterdir()) - before
        assert self._size_bytes() > CAP_BYTES > self._size_bytes() * 2 / 3

    def use(self, name: str) -> None:
        result = self._daemon.run(SCRIPT, image=self.reference(name))
        assert (result.exit_code, result.error, self._daemon.logs(result.task)[0]) == (0, None, printed(name))
        unmounted(self._daemon)

    def age(self) -> None:
        """They were used hours ago, in the order of their names: nobody waits for that."""
        for hours, path in enumerate(reversed(self._paths.values()), 1):
            os.utime(path, (time.time() - 3600 * hours,) * 2)

    def use_again(self) -> None:
        """Those that are there were used just now: nobody takes them who happens to look."""
        for name in self.there():
            os.utime(self._paths[name])

    def there(self) -> list[str]:
        return [name for name, path in self._paths.items() if path.exists()]

    def check_usage(self) -> None:
        found = usage(self._daemon)
        assert (found["archives"], found["archive_bytes"]) == (len(self.there()), self._size_bytes())
        assert (found["archive_bytes_max"], found["short"]) == (CAP_BYTES, "")

    def _size_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._directory.iterdir())


def printed(name: str) -> bytes:
    return f"{name}{TARGET_BYTES + 1}\n".encode()


def capped(home: Path) -> AbstractContextManager[Daemon]:
    return running(home, "none", AERIE_IMAGE_ARCHIVE_MAX=str(CAP_BYTES), AERIE_IMAGE_IDLE_UNMOUNT="0s")


def test_the_longest_unused_archive_goes_unless_its_image_is_mounted_and_is_made_again(tmp_path: Path, proxy: Proxy) -> None:
    with capped(tmp_path) as daemon:
        archives = Archives(daemon, proxy)
        archives.make()
        task = daemon.submit(f"echo begun; until [ -e /go ]; do sleep 0.05; done; {SCRIPT}", image=archives.reference("a"))
        daemon.wait_printed(task, b"begun\n")
        archives.age()
        assert daemon.command("image", "prune").returncode == 0
        assert archives.there() == ["a", "c"]
        archives.check_usage()
        archives.use_again()
        (daemon.run_dir / "tasks" / task / "root/go").touch()
        assert (daemon.result(task).exit_code, daemon.logs(task)[0]) == (0, b"begun\n" + printed("a"))
        proxy.forget()
        archives.use("b")
        assert archives.there() == ["a", "b", "c"]
        assert proxy.body_bytes("/archive-b/blobs/") > 0


def test_a_daemon_that_is_killed_while_archives_go_lets_them_go_when_it_starts_again(tmp_path: Path, proxy: Proxy) -> None:
    with running(tmp_path, "none", AERIE_IMAGE_IDLE_UNMOUNT="0s") as daemon:
        archives = Archives(daemon, proxy)
        archives.make()
    archives.age()
    proxy.on("/archive-./blobs/", silent(600))  # whether it could be made again is asked for before it goes
    proxy.forget()
    with capped(tmp_path) as daemon:  # looks at them when it starts
        archives.of(daemon)
        deadline = time.monotonic() + PATIENCE_S
        while not proxy.seen("/archive-a/blobs/"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        daemon.kill()
        daemon.close_client()
        proxy.behave()
        assert archives.there() == ["a", "b", "c"]
        daemon.start()
        deadline = time.monotonic() + PATIENCE_S
        while archives.there() != ["b", "c"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        archives.check_usage()
        archives.use("a")
