"""What is fetched ahead: traces of what tasks read, and packs made of them; by a counting proxy in front of a real registry."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from actors.image.archive import Archive
from actors.image.trace import load, workload_of, workloads
from tests.actors.image.images import RunningRegistry, directory, member, tar
from tests.actors.image.proxy import Proxy
from tests.node.conftest import busybox_layer
from tests.node.daemon import PATIENCE_S, Daemon, running

MIB = 1 << 20
FILES = {f"data/{number}": random.Random(number).randbytes(20_000 + 1000 * number) for number in range(40)}
LARGE = random.Random(77).randbytes(12 * MIB)
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
    places = {"AERIE_IMAGE_ARCHIVE_DIR": str(archives), "AERIE_IMAGE_PREFETCH": "trace"} | settings
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


def test_nothing_is_traced_when_prefetch_is_off(tmp_path: Path, built: tuple[str, Path], proxy: Proxy) -> None:
    with cold(tmp_path, built, proxy, AERIE_IMAGE_PREFETCH="off") as daemon:
        assert daemon.run(READS).exit_code == 0
    assert [path.suffix for path in (tmp_path / "archives").iterdir()] == [".aerie"]
