"""What is fetched ahead: traces of what tasks read, and packs made of them; by a counting proxy in front of a real registry."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import pytest

from actors.image.archives.archive import Archive
from actors.image.archives.trace import load, workload_of, workloads
from tests.actors.image.images import RunningRegistry, directory, member, tar
from tests.actors.image.proxy import Proxy, throttle
from tests.actors.image.s3 import CREDENTIALS, RunningS3
from tests.node.conftest import busybox_layer, own_disk
from tests.node.daemon import PATIENCE_S, Daemon, running

MIB = 1 << 20
FILES = {f"data/{number}": random.Random(number).randbytes(20_000 + 1000 * number) for number in range(40)}
LARGE = random.Random(77).randbytes(12 * MIB)
PASSWD = b"root:x:0:0::/:/bin/sh\n"  # of busybox_layer
READS = "cat /data/3 /data/5 >/dev/null; dd if=/data/large bs=64k skip=80 count=1 2>/dev/null | md5sum"


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def proxy(registry: RunningRegistry) -> Iterator[Proxy]:
    with Proxy(registry.address) as started:
        yield started


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, registry: RunningRegistry, proxy: Proxy) -> tuple[str, Path]:
    """The image's reference through the proxy, and its archive."""
    files = tar(directory("data"), *(member(name, content) for name, content in FILES.items()), member("data/large", LARGE))
    registry.repository("prefetch").push(busybox_layer(), files, tag="1", process={"Env": ["PATH=/bin"]})
    reference = f"{proxy.address}/prefetch:1"
    home = tmp_path_factory.mktemp("builder")
    with running(home, reference, AERIE_IMAGE_ARCHIVE_DIR=str(home / "archives")) as builder:
        assert builder.run("true").exit_code == 0
    [archive] = (home / "archives").iterdir()
    return reference, archive


@contextmanager
def cold(tmp_path: Path, built: tuple[str, Path], proxy: Proxy, name: str = "node", **settings: str) -> Iterator[Daemon]:
    """A daemon that has the archive, which others may share, and no content."""
    archives = tmp_path / "archives"
    if not archives.exists():
        archives.mkdir()
        (archives / built[1].name).write_bytes(built[1].read_bytes())
    (tmp_path / name).mkdir()
    places = {"AERIE_IMAGE_ARCHIVE_DIR": str(archives), "AERIE_IMAGE_PREFETCH": "trace", "AERIE_IMAGE_FREE_MIN": "0"} | settings
    with running(tmp_path / name, built[0], **places) as daemon:
        proxy.forget()
        yield daemon


def digest_of(archives: Path) -> str:
    [archive] = archives.glob("*.aerie")
    return archive.stem.replace("-", ":")


def traced(archives: Path) -> dict[int, list[int]]:
    """Of the only trace: size of each object → its blocks, in the order in which they were wanted."""
    digest = digest_of(archives)
    [workload] = workloads(str(archives), digest)
    assert workload == workload_of(["/bin/sh", "-c", READS])
    trace = load(str(archives), digest, workload)
    assert trace is not None
    table = Archive.open(str(next(archives.glob("*.aerie")))).objects()
    found: dict[int, list[int]] = {}
    for block in trace.blocks:
        found.setdefault(table.row(block.row).size_bytes, []).append(block.block)
    return found


def check_trace(found: dict[int, list[int]]) -> None:
    sizes = [size for size in found if size in (len(LARGE), len(FILES["data/3"]), len(FILES["data/5"]))]
    assert sizes == [len(FILES["data/3"]), len(FILES["data/5"]), len(LARGE)]  # in this order
    assert not any(size in found for name in FILES if name not in ("data/3", "data/5") for size in [len(FILES[name])])
    assert 80 in found[len(LARGE)] and len(found[len(LARGE)]) < 10
    assert found[Path("/bin/busybox").stat().st_size][0] == 0


def test_what_the_first_task_of_a_workload_reads_is_its_trace(tmp_path: Path, built: tuple[str, Path], proxy: Proxy) -> None:
    with cold(tmp_path, built, proxy) as daemon:
        assert daemon.run(READS).exit_code == 0
        until(lambda: list((tmp_path / "archives").glob("*.trace")))
        check_trace(traced(tmp_path / "archives"))


def test_what_is_on_the_node_already_is_traced_too(tmp_path: Path, built: tuple[str, Path], proxy: Proxy) -> None:
    with running(tmp_path, built[0], AERIE_IMAGE_PREFETCH="trace") as daemon:  # it builds the archive, so all is there
        assert daemon.run(READS).exit_code == 0
        archives = tmp_path / "state/images/archives"
        until(lambda: list(archives.glob("*.trace")))
        check_trace(traced(archives))
        # Small files are inside the archive, which they never are while nothing is fetched ahead.
        assert PASSWD in next(archives.glob("*.aerie")).read_bytes()
        assert PASSWD not in built[1].read_bytes()
        task = daemon.run("cat /etc/passwd").task
        assert daemon.logs(task)[0] == PASSWD


def test_nothing_is_traced_when_prefetch_is_off(tmp_path: Path, built: tuple[str, Path], proxy: Proxy) -> None:
    with cold(tmp_path, built, proxy, AERIE_IMAGE_PREFETCH="off") as daemon:
        assert daemon.run(READS).exit_code == 0
    assert [path.suffix for path in (tmp_path / "archives").iterdir()] == [".aerie"]


# --- packs


def packs(archives: Path) -> list[Path]:
    return list(archives.glob("*.pack"))


def processes_of(daemon: Daemon, name: str) -> list[int]:
    found, todo = [], [daemon.tree()]
    while todo:
        node = todo.pop()
        if node["kind"] == "process" and node["name"].startswith(name) and node["pid"]:
            found.append(node["pid"])
        todo += node["children"]
    return found


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, built: tuple[str, Path], proxy: Proxy) -> Path:
    """A directory with the archive, and the trace and pack of READS."""
    home = tmp_path_factory.mktemp("packed")
    with cold(home, built, proxy) as daemon:
        assert daemon.run(READS).exit_code == 0
        until(lambda: packs(home / "archives"))
    return home / "archives"


def output(daemon: Daemon, task: str = "") -> bytes:
    result = daemon.result(task or daemon.submit(READS))
    assert result.exit_code == 0, (result, daemon.log.read_text()[-3000:])
    return daemon.logs(result.task)[0].split()[0]


EXPECTED = hashlib.md5(LARGE[80 << 16 : 81 << 16]).hexdigest().encode()


LATE_MAX = 12  # daemons in a row on a machine that lets a pack wait for too long


def spared(tmp_path: Path, built: tuple[str, Path], proxy: Proxy, name: str) -> None:
    """A task on a new daemon gets all from its pack; but where the machine lets that wait for half a second, it is fetched."""
    moved: list[int] = []
    while not moved or moved[-1]:
        assert len(moved) < LATE_MAX, moved
        with cold(tmp_path, built, proxy, f"{name}{len(moved)}") as daemon:
            assert output(daemon) == EXPECTED
            moved.append(proxy.body_bytes("/blobs/"))


def test_a_pack_spares_the_registry(tmp_path: Path, built: tuple[str, Path], packed: Path, proxy: Proxy) -> None:
    shutil.copytree(packed, tmp_path / "archives")
    spared(tmp_path, built, proxy, "spared")
    with cold(tmp_path, built, proxy) as daemon:
        assert output(daemon) == EXPECTED
        # What is not in it is fetched, and the workload is not recorded again.
        assert daemon.run("cat /data/9 >/dev/null").exit_code == 0
        assert proxy.body_bytes("/blobs/") > 0
        until(lambda: len(packs(tmp_path / "archives")) == 2)
    assert len(list((tmp_path / "archives").glob("*.trace"))) == 2


def test_a_pack_is_left_alone_when_prefetch_is_off(tmp_path: Path, built: tuple[str, Path], packed: Path, proxy: Proxy) -> None:
    shutil.copytree(packed, tmp_path / "archives")
    with cold(tmp_path, built, proxy, AERIE_IMAGE_PREFETCH="off") as daemon:
        assert output(daemon) == EXPECTED
        assert proxy.body_bytes("/blobs/") > 0


def test_a_bad_pack_costs_a_warning_and_no_task(tmp_path: Path, built: tuple[str, Path], packed: Path, proxy: Proxy) -> None:
    shutil.copytree(packed, tmp_path / "archives")
    [pack] = packs(tmp_path / "archives")
    pack.write_bytes(pack.read_bytes()[: pack.stat().st_size // 2])
    with cold(tmp_path, built, proxy) as daemon:
        assert output(daemon) == EXPECTED
        until(lambda: "a pack is of no use" in daemon.log.read_text())


def opened(pack: Path) -> BinaryIO:
    """The writing end of a FIFO, as soon as somebody reads there."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            descriptor = os.open(pack, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            break
        except OSError as error:
            assert error.errno == errno.ENXIO and time.monotonic() < deadline
            time.sleep(0.005)
    os.set_blocking(descriptor, True)
    return open(descriptor, "wb", buffering=0)


def test_a_pack_that_stands_still_is_not_waited_for(
    tmp_path: Path, built: tuple[str, Path], packed: Path, proxy: Proxy
) -> None:
    shutil.copytree(packed, tmp_path / "archives")
    [pack] = packs(tmp_path / "archives")
    whole = pack.read_bytes()
    pack.unlink()
    os.mkfifo(pack)
    with cold(tmp_path, built, proxy) as daemon:
        task = daemon.submit(READS)
        with opened(pack) as pipe:
            pipe.write(whole[:5000])  # the head, and little more
            assert output(daemon, task) == EXPECTED
            [prefetcher] = processes_of(daemon, "image prefetcher")  # it waits for the rest
            os.kill(prefetcher, signal.SIGSTOP)  # which is found by its silence
            until(lambda: not processes_of(daemon, "image prefetcher"))
        pack.unlink()
        assert output(daemon) == EXPECTED


def test_a_server_that_is_killed_in_mid_stream_costs_nothing(
    tmp_path: Path, built: tuple[str, Path], packed: Path, proxy: Proxy
) -> None:
    shutil.copytree(packed, tmp_path / "archives")
    [pack] = packs(tmp_path / "archives")
    whole = pack.read_bytes()
    pack.unlink()
    os.mkfifo(pack)
    with cold(tmp_path, built, proxy) as daemon:
        task = daemon.submit(READS)
        with opened(pack) as pipe:
            for at in range(0, len(whole), 1 + len(whole) // 12):
                pipe.write(whole[at : at + 1 + len(whole) // 12])
                for server in processes_of(daemon, "image mount"):
                    with suppress(ProcessLookupError):  # it was replaced meanwhile
                        os.kill(server, signal.SIGKILL)
                time.sleep(0.05)
        assert output(daemon, task) == EXPECTED
        pack.unlink()


def test_a_maker_that_is_killed_is_followed_by_another_while_the_image_stays_mounted(
    tmp_path: Path, built: tuple[str, Path], proxy: Proxy
) -> None:
    with cold(tmp_path, built, proxy, "one") as daemon:
        assert daemon.run(READS).exit_code == 0
        until(lambda: processes_of(daemon, "image prefetcher") or packs(tmp_path / "archives"))
        for maker in processes_of(daemon, "image prefetcher"):
            with suppress(ProcessLookupError):  # it has made it
                os.kill(maker, signal.SIGKILL)
        until(lambda: packs(tmp_path / "archives"))
    spared(tmp_path, built, proxy, "two")
    assert not list((tmp_path / "archives").glob(".*"))


def test_packs_travel_through_the_bucket(
    tmp_path: Path, registry: RunningRegistry, proxy: Proxy, built: tuple[str, Path]
) -> None:
    (tmp_path / "s3").mkdir()
    s3 = RunningS3(tmp_path / "s3")
    try:
        bucket = s3.bucket("packs")
        places = {"AERIE_S3_BUCKET": bucket.name, "AERIE_S3_PREFIX": bucket.prefix, "AERIE_S3_ENDPOINT": bucket.endpoint}
        places |= {"AERIE_S3_REGION": bucket.region, "AERIE_IMAGE_PREFETCH": "trace"} | CREDENTIALS
        for name in ("one", "three"):
            (tmp_path / name).mkdir()
        with running(tmp_path / "one", built[0], **places) as daemon:  # builds, and has all that it traces
            assert output(daemon) == EXPECTED
            until(lambda: sorted(key.split("/")[1] for key in s3.keys(bucket)) == ["archives", "packs"])
        late: list[tuple[int, int, bool]] = []
        while not late or any(late[-1]):
            assert len(late) < LATE_MAX, late  # see `spared`; nor is the bucket waited for longer than a second
            home = tmp_path / f"two{len(late)}"
            home.mkdir()
            with running(home, built[0], **places) as daemon:
                proxy.forget()
                assert output(daemon) == EXPECTED
                moved = proxy.body_bytes("/blobs/")
                traces = list((home / "state/images/archives").glob("*.trace"))
            # Nor is the program read ahead of its task, of which the pack has all that is wanted.
            read_ahead = "programs of" in daemon.command("events", "--json", "-n", "10000").stdout.decode()
            late.append((moved, len(traces), read_ahead))
        [key] = [key for key in s3.keys(bucket) if "/packs/" in key]
        good = s3.read(bucket, key)
        bad = good[: len(good) // 2]
        s3.write(bucket, key, bad)
        with running(tmp_path / "three", built[0], **places) as daemon:
            assert output(daemon) == EXPECTED
            until(lambda: "it is removed" in daemon.log.read_text())
            assert key not in s3.keys(bucket) or s3.read(bucket, key) != bad  # there may be another one already
    finally:
        s3.stop()


# --- everything


def content_is_here(daemon: Daemon, archives: Path) -> bool:
    objects = Path(daemon.state / "images/cache")
    table = Archive.open(str(next(archives.glob("*.aerie")))).objects()
    keys = [table.row(index).key for index in range(len(table))]
    return all((objects / key[:2] / key[2:]).exists() for key in keys)


@pytest.fixture
def roomy(tmp_path: Path) -> Iterator[Path]:
    """On a disk of its own: of one that is nearly full nothing is taken for what nobody has asked for."""
    with own_disk(tmp_path, 1 << 30) as disk:
        yield disk


def test_with_full_all_of_the_image_comes_in_the_end(roomy: Path, built: tuple[str, Path], proxy: Proxy) -> None:
    with cold(roomy, built, proxy, AERIE_IMAGE_PREFETCH="full") as daemon:
        proxy.on("/blobs/", throttle(2 * MIB))  # or all of it could be here before we have looked
        assert output(daemon) == EXPECTED
        assert proxy.body_bytes("/blobs/") < len(LARGE)
        proxy.behave()
        until(lambda: content_is_here(daemon, roomy / "archives"))


def test_a_workload_that_reads_nearly_all_has_all_of_it_pulled(roomy: Path, built: tuple[str, Path], proxy: Proxy) -> None:
    script = "cat /data/* | md5sum"
    with cold(roomy, built, proxy, "one") as daemon:
        assert daemon.run(script).exit_code == 0
        until(lambda: list((roomy / "archives").glob("*.trace")))
    with cold(roomy, built, proxy, "two") as daemon:
        daemon.submit(script)
        until(lambda: content_is_here(daemon, roomy / "archives"))  # what it does not read, too
        assert daemon.result("task-1").exit_code == 0
        expected = hashlib.md5(b"".join(content for _, content in sorted([*FILES.items(), ("data/large", LARGE)])))
        assert daemon.logs("task-1")[0].split()[0].decode() == expected.hexdigest()
