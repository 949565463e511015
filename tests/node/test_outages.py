"""Registry and bucket away, refusing or black-holed: what is here works, and starts without them; the rest says why, in time."""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.image.wire import Bucket
from tests.actors.image.images import RunningRegistry, member, tar
from tests.actors.image.proxy import Proxy, silent
from tests.actors.image.s3 import CREDENTIALS, RunningS3
from tests.node.conftest import busybox_layer
from tests.node.daemon import PATIENCE_S, Daemon, running, state_of

NOISE = random.Random(7).randbytes(4 << 20)
SUM = hashlib.md5(NOISE).hexdigest()
LATE_S = 25.0  # to start a task whose registry does not answer: 3 s, on a machine with too much to do; its patience would be 65


class Away:
    """A registry and an S3 server of its own, with an image, each behind a proxy; both can be stopped."""

    def __init__(self, home: Path) -> None:
        for name in ("registry", "s3"):
            (home / name).mkdir()
        self.registry = RunningRegistry(home / "registry")
        self.s3 = RunningS3(home / "s3")
        repository = self.registry.repository("outage")
        repository.push(busybox_layer(), tar(member("noise", NOISE)), tag="1", process={"Env": ["PATH=/bin"]})
        self.proxies = (Proxy(self.registry.address), Proxy(self.s3.address))
        for proxy in self.proxies:
            proxy.__enter__()
        self.image = f"{self.proxies[0].address}/outage:1"
        bucket: Bucket = self.s3.bucket("outage", through=self.proxies[1].address)
        places = {"AERIE_S3_BUCKET": bucket.name, "AERIE_S3_PREFIX": bucket.prefix, "AERIE_S3_ENDPOINT": bucket.endpoint}
        self.settings = places | {"AERIE_S3_REGION": bucket.region} | CREDENTIALS
        self.settings |= {"AERIE_IMAGE_RESOLVE_INTERVAL": "0s", "AERIE_MOUNT_READ_TIMEOUT": "2s"}
        self._stopped = False

    def black_hole(self) -> None:
        for proxy in self.proxies:
            proxy.on("", silent(600))

    def behave(self) -> None:
        for proxy in self.proxies:
            proxy.behave()

    def stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            for proxy in self.proxies:
                proxy.__exit__(None, None, None)
            self.s3.stop()
            self.registry.stop()


@pytest.fixture(scope="module")
def away(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Away]:
    made = Away(tmp_path_factory.mktemp("away"))
    yield made
    made.stop()


def out(daemon: Daemon, script: str) -> str:
    result = daemon.run(script)
    stdout, stderr = daemon.logs(result.task)
    assert (result.exit_code, result.error) == (0, None), (result, stderr, daemon.log.read_text()[-3000:])
    return stdout.decode().split()[0]


def test_with_both_black_holed_what_is_here_starts_in_time(tmp_path: Path, away: Away) -> None:
    away.behave()
    settings = away.settings | {"AERIE_IMAGE_PREFETCH": "full", "AERIE_IMAGE_IDLE_UNMOUNT": "0s"}
    with running(tmp_path, away.image, **settings) as daemon:
        assert out(daemon, "md5sum /noise") == SUM
        daemon.wait_released()
        away.black_hole()
        begun = time.monotonic()
        assert out(daemon, "md5sum /noise") == SUM
        assert time.monotonic() - begun < LATE_S
        assert "its registry has not said within 3 s what it names" in daemon.log.read_text()
        tasks = [daemon.submit("md5sum /noise") for _ in range(3)]
        assert all(daemon.result(task).exit_code == 0 for task in tasks)
        assert daemon.log.read_text().count("its registry has not said within") == 1  # and they do not wait again
        begun = time.monotonic()
    assert time.monotonic() - begun < 40  # nor does a daemon that stops


def test_a_new_daemon_with_archive_and_content_needs_neither(tmp_path: Path, away: Away) -> None:
    """Both are stopped for good: the last test but one that wants them."""
    away.behave()
    shared = {"AERIE_IMAGE_ARCHIVE_DIR": str(tmp_path / "archives"), "AERIE_IMAGE_CACHE_DIR": str(tmp_path / "cache")}
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    with running(tmp_path / "1", away.image, **away.settings, **shared) as daemon:
        assert out(daemon, "md5sum /noise") == SUM
        [row] = json.loads(daemon.command("image", "ls", "--json").stdout)
    pinned = away.image.rpartition(":")[0] + "@" + row["digest"]
    away.stop()
    with running(tmp_path / "1", away.image, **away.settings, **shared) as daemon:
        assert out(daemon, "md5sum /noise") == SUM  # what the tag named is remembered
    with running(tmp_path / "2", pinned, **away.settings, **shared) as daemon:
        assert out(daemon, "md5sum /noise") == SUM
        # What is not here cannot be had, and that is said at once, and so is who cannot be asked.
        begun = time.monotonic()
        result = daemon.run("true", image=away.image.replace(":1", ":2"))
        assert (result.state, time.monotonic() - begun < 40) == ("failed", True)
        assert result.error and "cannot be reached" in result.error


def test_a_read_that_cannot_be_answered_ends_in_time_and_says_why(tmp_path: Path, away: Away) -> None:
    """Archive, no content, and by now no registry."""
    archives = tmp_path / "archives"
    registry = RunningRegistry(_made(tmp_path / "registry"))
    try:
        repository = registry.repository("outage")
        repository.push(busybox_layer(), tar(member("noise", NOISE)), tag="1", process={"Env": ["PATH=/bin"]})
        image = repository.reference("1")
        settings = {"AERIE_IMAGE_ARCHIVE_DIR": str(archives), "AERIE_MOUNT_READ_TIMEOUT": "4s"}
        with running(_made(tmp_path / "1"), image, **settings) as daemon:
            assert out(daemon, "md5sum /noise") == SUM
        with running(_made(tmp_path / "2"), image, **settings) as daemon:
            task = daemon.submit("cat /bin/busybox | wc -c; until [ -e /go ]; do sleep 0.05; done; md5sum /noise")
            daemon.wait_printed(task, b"%d\n" % Path("/bin/busybox").stat().st_size)
            registry.stop()
            begun = time.monotonic()
            (daemon.run_dir / "tasks" / task / "root/go").touch()
            result = daemon.result(task)
            assert time.monotonic() - begun < 40, (result, daemon.logs(task), daemon.log.read_text()[-2000:])
            assert result.exit_code == 1 and b"Input/output error" in daemon.logs(task)[1]
            assert result.error and "a read failed" in result.error and registry.address in result.error
            # Nobody waits in the kernel for it; whoever waits for a disk does so for a moment.
            deadline = time.monotonic() + PATIENCE_S
            while stuck := [pid for pid in daemon.processes() if state_of(pid) == "D"]:
                assert time.monotonic() < deadline, stuck
    finally:
        registry.stop()


def _made(path: Path) -> Path:
    os.makedirs(path, exist_ok=True)
    return path
