"""The disk is bounded: what goes when there is too much, what never does, and that nobody's task sees it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from actors.lazytree.mounts import mounts_below
from tests.actors.image.images import RunningRegistry, directory, member, tar
from tests.actors.image.proxy import Proxy, status
from tests.node.conftest import busybox_layer
from tests.node.daemon import PATIENCE_S, Daemon, running

MIB = 1 << 20
FILES, FILE_BYTES = 8, MIB // 4
SHARED_BYTES = Path("/bin/busybox").stat().st_size + MIB  # of every image
IMAGES = ("a", "b", "c", "d")
CAP = SHARED_BYTES + 5 * MIB  # two and a half of these images


def content(image: str, number: int) -> bytes:
    return random.Random(f"{image} {number}").randbytes(FILE_BYTES)


def sums(image: str) -> str:
    digest = hashlib.md5()
    for number in range(FILES):
        digest.update(content(image, number))
    return digest.hexdigest()


@pytest.fixture(scope="module")
def proxy(registry: RunningRegistry) -> Iterator[Proxy]:
    shared = busybox_layer()
    for image in (*IMAGES, "large"):
        files = [member(f"data/{n}", content(image, n)) for n in range(FILES * (5 if image == "large" else 1))]
        registry.repository(f"cap-{image}").push(
            shared, tar(directory("data"), *files), tag="1", process={"Env": ["PATH=/bin"]}
        )
    with Proxy(registry.address) as proxy:
        yield proxy


@contextmanager
def bounded(home: Path, proxy: Proxy, **settings: str) -> Iterator[Daemon]:
    home.mkdir(exist_ok=True)
    proxy.behave()
    defaults = {"AERIE_IMAGE_CACHE_MAX": str(CAP), "AERIE_IMAGE_IDLE_UNMOUNT": "0s", "AERIE_IMAGE_FREE_MIN": "0"}
    with running(home, "none", **(defaults | settings)) as daemon:
        yield daemon


def out(daemon: Daemon, proxy: Proxy, image: str, script: str = "cat /data/* | md5sum") -> str:
    result = daemon.run(script, image=f"{proxy.address}/cap-{image}:1")
    stdout, stderr = daemon.logs(result.task)
    assert (result.exit_code, result.error) == (0, None), (result, stderr, daemon.log.read_text()[-3000:])
    return stdout.decode().split()[0]


def usage(daemon: Daemon) -> dict[str, Any]:
    return dict(json.loads(daemon.command("image", "usage", "--json").stdout))


def there_bytes(cache: Path) -> int:
    """Of objects all of which are there at one moment, between two looks: while these are taken, some go and others come."""
    first, second = objects(cache), objects(cache)
    return sum(second[path] for path in first.keys() & second.keys())


def settled(daemon: Daemon, cache: Path) -> dict[str, Any]:
    """What is used, once that is what is there: an evictor may still be at work."""
    deadline = time.monotonic() + PATIENCE_S
    while (used := usage(daemon))["cache_bytes"] != (there := there_bytes(cache)):
        assert time.monotonic() < deadline, (used, there)
    return used


def objects(cache: Path) -> dict[Path, int]:
    found = {}
    for path in cache.glob("??/*"):
        with suppress(FileNotFoundError):
            found[path] = -(-path.stat().st_size // 4096) * 4096
    return found


def fill(disk: Path) -> None:
    """Take all that there is, whatever the daemon takes or gives back meanwhile."""
    with open(disk / "other", "wb", buffering=0) as file, suppress(OSError):
        while os.fstat(file.fileno()).st_size < 1 << 30:
            file.write(bytes(4096))
    assert os.statvfs(disk).f_bavail * 4096 < 64 << 10


def unmounted(daemon: Daemon) -> None:
    daemon.wait_released()
    eventually(lambda: not mounts_below(str(daemon.run_dir)))


def eventually(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_longest_unused_image_goes_and_comes_again(tmp_path: Path, proxy: Proxy) -> None:
    with bounded(tmp_path, proxy) as daemon:
        cache = daemon.state / "images/cache"
        most = [0]
        watching = threading.Event()

        def watch() -> None:
            while not watching.wait(0.02):
                most[0] = max(most[0], there_bytes(cache))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            for image in ("a", "b", "c"):
                assert out(daemon, proxy, image) == sums(image)
                unmounted(daemon)
            # What was used last is here; but where room was not made in time, it is kept only when it is fetched again.
            deadline = time.monotonic() + PATIENCE_S
            while True:
                proxy.forget()
                assert out(daemon, proxy, "c") == sums("c")
                unmounted(daemon)
                if proxy.body_bytes("/blobs/") == 0:
                    break
                assert time.monotonic() < deadline
            proxy.forget()
            assert out(daemon, proxy, "a") == sums("a")  # what of it has gone is fetched again
            assert proxy.body_bytes("/blobs/") > 0
            unmounted(daemon)
        finally:
            watching.set()
            watcher.join()
        most[0] = max(most[0], there_bytes(cache))
        used = settled(daemon, cache)
        assert used["cache_bytes"] <= most[0] <= used["cache_bytes_max"] == CAP
        assert used["short"] == ""
        assert daemon.command("image", "prune").returncode == 0
        assert settled(daemon, cache)["cache_bytes"] == 0
        assert out(daemon, proxy, "b") == sums("b")


def test_an_image_larger_than_the_cap_is_served_and_not_kept(tmp_path: Path, proxy: Proxy) -> None:
    with bounded(tmp_path, proxy, AERIE_IMAGE_CACHE_MAX=str(SHARED_BYTES + 4 * MIB)) as daemon:
        expected = hashlib.md5(b"".join(content("large", number) for number in sorted(range(FILES * 5), key=str))).hexdigest()
        for _ in range(2):
            assert out(daemon, proxy, "large") == expected
        assert there_bytes(daemon.state / "images/cache") <= SHARED_BYTES + 4 * MIB


def test_what_is_in_use_or_cannot_be_had_again_stays(tmp_path: Path, proxy: Proxy) -> None:
    with bounded(tmp_path, proxy) as daemon:
        assert out(daemon, proxy, "a") == sums("a")
        unmounted(daemon)
        image = f"{proxy.address}/cap-b:1"
        task = daemon.submit("until [ -e /go ]; do sleep 0.05; done; cat /data/* | md5sum", image=image)
        daemon.wait_running(task)
        proxy.on("/cap-a/blobs/", status(404))  # somebody has deleted it
        proxy.forget()
        assert out(daemon, proxy, "c") == sums("c")
        pruned = json.loads(daemon.command("image", "prune", "--json").stdout)
        assert "the registry has lost" in pruned["kept"]
        # The task has what it began with, and the other image is whole, without its registry.
        proxy.on("", status(503))
        proxy.forget()
        (daemon.run_dir / "tasks" / task / "root/go").touch()
        assert (daemon.result(task).exit_code, daemon.logs(task)[0].split()[0].decode()) == (0, sums("b"))
        assert out(daemon, proxy, "a") == sums("a")
        assert proxy.body_bytes("/blobs/") == 0


def test_two_daemons_share_one_cache(tmp_path: Path, proxy: Proxy) -> None:
    shared = str(tmp_path / "cache")
    with bounded(tmp_path / "1", proxy, AERIE_IMAGE_CACHE_DIR=shared) as one:
        with bounded(tmp_path / "2", proxy, AERIE_IMAGE_CACHE_DIR=shared) as two:
            image = f"{proxy.address}/cap-a:1"
            task = one.submit("until [ -e /go ]; do sleep 0.05; done; cat /data/* | md5sum", image=image)
            one.wait_running(task)
            stopped = (one.wait_pid("keeper"), one.wait_pid("root supervisor"))
            for pid in stopped:  # its mounts alone speak for it
                os.kill(pid, signal.SIGSTOP)
            one.close_client()
            for name in ("b", "c", "d"):
                assert out(two, proxy, name) == sums(name)
                unmounted(two)
            assert two.command("image", "prune").returncode == 0
            proxy.on("", status(503))
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
            (one.run_dir / "tasks" / task / "root/go").touch()
            assert (one.result(task).exit_code, one.logs(task)[0].split()[0].decode()) == (0, sums("a"))


def test_a_killed_evictor_is_followed_by_another(tmp_path: Path, proxy: Proxy) -> None:
    with bounded(tmp_path, proxy) as daemon:
        killed = 0
        stopping = threading.Event()

        def kill() -> None:
            nonlocal killed
            while not stopping.wait(0.001):
                for pid in daemon.processes():
                    try:
                        if Path(f"/proc/{pid}/comm").read_text() == "evictor\n" and killed < 5:
                            os.kill(pid, signal.SIGKILL)
                            killed += 1
                    except (FileNotFoundError, ProcessLookupError):
                        pass

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            deadline = time.monotonic() + PATIENCE_S
            while True:
                for image in IMAGES:
                    assert out(daemon, proxy, image) == sums(image)
                    unmounted(daemon)
                if killed:
                    break
                assert time.monotonic() < deadline  # else those that there were had ended before they were seen
        finally:
            stopping.set()
            killer.join()
        assert daemon.command("image", "prune").returncode == 0
        assert settled(daemon, daemon.state / "images/cache")["cache_bytes"] <= CAP


def test_damaged_content_is_found_and_fetched_again(tmp_path: Path, proxy: Proxy) -> None:
    with bounded(tmp_path, proxy, AERIE_IMAGE_IDLE_UNMOUNT="1h") as daemon:
        assert out(daemon, proxy, "a") == sums("a")
        cache = daemon.state / "images/cache"

        def damage(number: int) -> Path:
            key = hashlib.sha256(content("a", number)).hexdigest()
            path = cache / key[:2] / key[2:]
            with open(path, "r+b") as file:
                file.seek(1000)
                file.write(b"damage")
            return path

        paths = [damage(0), damage(1)]
        os.truncate(damage(2), 1000)
        assert out(daemon, proxy, "a", "md5sum /data/5") == hashlib.md5(content("a", 5)).hexdigest()
        checked = json.loads(daemon.command("image", "check", "--json").stdout)
        assert (checked["damaged"], checked["repaired"]) == (3, 3) and checked["objects"] >= FILES
        assert "was damaged on this node's disk; it is fetched again" in daemon.log.read_text()
        assert [path.read_bytes() for path in paths] == [content("a", 0), content("a", 1)]
        settled(daemon, cache)
        assert json.loads(daemon.command("image", "check", "--json").stdout)["damaged"] == 0
        # Without its registry it is removed: no bytes are better than wrong ones.
        damage(3)
        proxy.on("", status(503))
        checked = json.loads(daemon.command("image", "check", "--json").stdout)
        assert (checked["damaged"], checked["repaired"]) == (1, 0)
        assert not (
            cache / hashlib.sha256(content("a", 3)).hexdigest()[:2] / hashlib.sha256(content("a", 3)).hexdigest()[2:]
        ).exists()
        proxy.behave()
        assert json.loads(daemon.command("image", "check", "--json").stdout)["damaged"] == 0
        assert daemon.command("image", "prune").returncode == 0  # and so the image is unmounted, and mounted anew
        assert out(daemon, proxy, "a") == sums("a")


def test_a_full_disk_costs_no_task_its_content(tmp_path: Path, proxy: Proxy) -> None:
    """OBJECTS on a disk of their own, which somebody else has filled."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "full", str(disk)], check=True)
    try:
        with bounded(
            tmp_path / "node", proxy, AERIE_IMAGE_CACHE_DIR=str(disk / "cache"), AERIE_IMAGE_CACHE_MAX="1Gi"
        ) as daemon:
            fill(disk)
            for image in ("a", "b"):
                assert out(daemon, proxy, image) == sums(image)
            assert "is read without being kept" in daemon.log.read_text()
            (disk / "other").unlink()
            unmounted(daemon)
            assert out(daemon, proxy, "a") == sums("a")
            eventually(lambda: there_bytes(disk / "cache") > 0)
            store = daemon.state / "workspaces/w"
            store.mkdir(parents=True)
            for number in range(20):
                (store / str(number)).write_bytes(content("w", number)[: 50 << 10])
                os.chown(store / str(number), 1000, 1000)
            fill(disk)
            result = daemon.run("cat * | wc -c; echo x > new", image=f"{proxy.address}/cap-a:1", workspace="w")
            assert (result.exit_code, result.sync, result.error) == (0, "synced", None)
            assert daemon.logs(result.task)[0].split() == [b"1024000"]
            unmounted(daemon)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
