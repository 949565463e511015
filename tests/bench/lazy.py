"""Bytes that a node fetches which has an image's archive and none of its content; by a counting proxy before the registry."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from isal import igzip

from actors.image.archives.archive import Archive
from actors.lazytree.objects import Objects
from tests.actors.image.images import directory, member, tar
from tests.actors.image.proxy import Proxy
from tests.actors.lazytree.harness import private_bytes
from tests.bench.site import Site
from tests.bench.table import Row, within
from tests.node.conftest import busybox_layer
from tests.node.daemon import Daemon
from tests.node.test_lazy_images import BLOBS, FILES, LARGE_MIB, content

MB = 1e6
MIB = 1 << 20
PATIENCE_S = 120.0


def rows(site: Site) -> Iterator[Row]:
    site.say("an image of 200 MB")
    small = tar(directory("data"), *(member(f"data/{number}", content(number), mode=0o755) for number in range(FILES)))
    large = tar(member("large", b"".join(content(1000 + number) for number in range(LARGE_MIB))))
    layers = [busybox_layer(), small, large]
    blobs = [igzip.compress(layer, 1, mtime=0) for layer in layers]
    with Proxy(site.registry.address) as proxy:
        site.registry.repository("big").push(*layers, tag="1", blobs=blobs, process={"Env": ["PATH=/bin"]})
        image = f"{proxy.address}/big:1"
        archives = site.archived(image)
        for work, script, bound_mb in (
            ("lazy image of 200 MB: moved for 1 % of it", "cat /data/7 /data/42", sum(map(len, blobs)) / 10 / MB),
            ("lazy image: moved for 64 KiB in the middle of 100 MB", "dd if=/large bs=64k skip=800 count=1", 6),
        ):
            daemon = site.new_daemon(image, AERIE_IMAGE_ARCHIVE_DIR=archives)
            proxy.forget()
            result = daemon.run(script)
            if result.exit_code != 0:
                raise RuntimeError(result)
            yield within(work, proxy.body_bytes(BLOBS) / MB, round(bound_mb, 1), "MB")
        site.say("all of it, behind a task")
        daemon = site.new_daemon(image, AERIE_IMAGE_ARCHIVE_DIR=archives, AERIE_IMAGE_PREFETCH="full")
        daemon.run("true")
        until_all_is_here(daemon)
        server = daemon.pid_of(f"image mount {image}")
        yield within("server of a lazy image that is all here: private memory", private_bytes(server) / MIB, 12, "MiB")
        everything = "cat /data/* /large > /dev/null"
        daemon.run(everything)  # which is recorded, and so reads through the server
        daemon.wait_released()
        before_ns = cpu_ns(server)
        daemon.run(everything)
        yield within("its processor time while a task reads all of the image", (cpu_ns(server) - before_ns) / 1e6, 1, "ms")


def until_all_is_here(daemon: Daemon) -> None:
    [archive] = Path(daemon.environment["AERIE_IMAGE_ARCHIVE_DIR"]).glob("*.aerie")
    table = Archive.open(str(archive)).objects()
    paths = [daemon.state / "images/cache" / Objects.path(table.row(index).key) for index in range(len(table))]
    deadline = time.monotonic() + PATIENCE_S
    while not all(path.exists() for path in paths):
        if time.monotonic() > deadline:
            raise TimeoutError(daemon.log.read_text()[-3000:])
        time.sleep(0.2)
    time.sleep(12.0)  # the last is taken out of the spool, and threads that have nothing to do have ended


def cpu_ns(pid: int) -> int:
    """What a process has used of processors, by the scheduler's own count."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir())
