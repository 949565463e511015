"""Daemons that share archives through a bucket of a real S3 server."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from actors.image.wire import Bucket
from tests.actors.image.images import RunningRegistry, member, tar
from tests.actors.image.proxy import Proxy, silent
from tests.actors.image.s3 import CREDENTIALS, RunningS3
from tests.node.conftest import busybox_layer
from tests.node.daemon import PATIENCE_S, Daemon, running


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningS3]:
    started = RunningS3(tmp_path_factory.mktemp("s3"))
    yield started
    started.stop()


@pytest.fixture
def proxy(s3: RunningS3) -> Iterator[Proxy]:
    with Proxy(s3.address) as started:
        yield started


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def settings(bucket: Bucket) -> dict[str, str]:
    places = {"AERIE_S3_BUCKET": bucket.name, "AERIE_S3_PREFIX": bucket.prefix, "AERIE_S3_ENDPOINT": bucket.endpoint}
    return places | {"AERIE_S3_REGION": bucket.region} | CREDENTIALS


def kinds(s3: RunningS3, bucket: Bucket) -> list[str]:
    return sorted(key.split("/")[1] for key in s3.keys(bucket))


def builder_of(daemon: Daemon) -> int | None:
    try:
        return daemon.pid_of("image builder")
    except LookupError:
        return None


def test_what_a_daemon_builds_is_shared_behind_its_tasks_and_also_when_the_builder_is_killed(
    tmp_path: Path, s3: RunningS3, proxy: Proxy, image: str
) -> None:
    bucket = s3.bucket("killed", through=proxy.address)
    proxy.on("archives/.*", lambda exchange: silent(600)(exchange) if exchange.method == "PUT" else exchange.forward())
    with running(tmp_path, image, **settings(bucket)) as daemon:
        assert daemon.run("true").exit_code == 0  # nobody waits for the bucket
        assert "archives" not in kinds(s3, bucket)
        until(lambda: any(exchange.method == "PUT" for exchange in proxy.seen("archives/")))
        os.kill(daemon.wait_pid("image builder"), signal.SIGKILL)
        proxy.behave()
        until(lambda: kinds(s3, bucket) == ["archives"])
        until(lambda: builder_of(daemon) is None)
        assert daemon.run("true").exit_code == 0


def test_a_daemon_that_stops_finishes_what_it_shares_but_waits_for_no_bucket_that_hangs(
    tmp_path: Path, s3: RunningS3, proxy: Proxy, image: str
) -> None:
    for home in ("1", "2"):
        (tmp_path / home).mkdir()
    bucket = s3.bucket("stopped", through=proxy.address)
    proxy.on("archives/", lambda exchange: (time.sleep(1) if exchange.method == "PUT" else None, exchange.forward())[1])
    with running(tmp_path / "1", image, **settings(bucket)) as daemon:
        assert daemon.run("true").exit_code == 0
        until(lambda: any(exchange.method == "PUT" for exchange in proxy.seen("archives/")))
    assert kinds(s3, bucket) == ["archives"]

    proxy.behave()
    bucket = s3.bucket("hanging", through=proxy.address)
    proxy.on("archives/", lambda exchange: silent(600)(exchange) if exchange.method == "PUT" else exchange.forward())
    with running(tmp_path / "2", image, **settings(bucket), AERIE_DAEMON_DRAIN_TIMEOUT="1s") as daemon:
        assert daemon.run("true").exit_code == 0
        until(lambda: any(exchange.method == "PUT" for exchange in proxy.seen("/hanging/.*archives/")))
        stopping = time.monotonic()
    assert time.monotonic() - stopping < 60  # and not ten minutes
    assert "archives" not in kinds(s3, bucket)


def test_a_bucket_that_is_away_is_told_in_the_log_and_stops_no_task(tmp_path: Path, image: str) -> None:
    bucket = Bucket("nowhere", "fleet", "http://127.0.0.1:1", "us-east-1")
    with running(tmp_path, image, **settings(bucket)) as daemon:
        assert daemon.run("true").exit_code == 0
        until(lambda: "its archive is not shared: bucket nowhere" in daemon.log.read_text())
        until(lambda: builder_of(daemon) is None)


def test_what_one_node_has_built_the_next_one_mounts_at_once_and_fetches_as_it_reads(
    tmp_path: Path, s3: RunningS3, registry: RunningRegistry
) -> None:
    bucket = s3.bucket("pulled")
    repository = registry.repository("fleet")
    noise = random.Random(5).randbytes(20 << 20)
    repository.push(busybox_layer(), tar(member("noise", noise)), tag="1", process={"Env": ["PATH=/bin"]})
    homes = [tmp_path / "1", tmp_path / "2"]
    for home in homes:
        home.mkdir()
    with running(homes[0], repository.reference("1"), **settings(bucket)) as daemon:
        assert daemon.run("true").exit_code == 0
    assert kinds(s3, bucket) == ["archives"]
    with Proxy(registry.address) as proxy, running(homes[1], f"{proxy.address}/fleet:1", **settings(bucket)) as daemon:
        assert daemon.run("true").exit_code == 0
        assert proxy.body_bytes("/blobs/") < 5 << 20
        task = daemon.submit("md5sum /noise")
        assert daemon.result(task).exit_code == 0
        assert daemon.logs(task)[0].split()[0].decode() == hashlib.md5(noise).hexdigest()
        assert 20 << 20 <= proxy.body_bytes("/blobs/") < 30 << 20
    assert kinds(s3, bucket) == ["archives"]
