"""A cold start over a slow link: nothing of the image is here, registry and S3 share 100 Mbit/s and are 20 ms away (`link`).

The floor is what nobody can do without: the compressed bytes of the 64 KiB blocks that the task reads, as a trace shows, at the link's
bandwidth, five round trips, and a warm task.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from actors.image.archives import trace
from actors.image.archives.archive import Archive
from actors.lazytree.objects import Objects
from tests.actors.image.s3 import CREDENTIALS, RunningS3
from tests.bench import science
from tests.bench.link import BYTES_PER_S, ROUND_TRIP_S, RunningLink
from tests.bench.site import Site
from tests.bench.table import Row, at_most, median
from tests.node.daemon import Daemon

COMMAND = ["python3", "-c", "import json, ssl, http.client; print(1)"]
ROUNDS, ROUNDS_WITHOUT, WARM = 5, 2, 5
PATIENCE_S = 120.0
MB = 1e6


def rows(site: Site) -> Iterator[Row]:
    repository = science.push(site)
    home = site.home / "cold"
    home.mkdir()
    s3 = RunningS3(home)
    with ExitStack() as stack:
        stack.callback(s3.stop)
        registry_port, s3_port = free_ports(2)
        link = stack.enter_context(RunningLink({registry_port: repository.registry.address, s3_port: s3.address}))
        image = f"127.0.0.1:{registry_port}/{repository.name}:1"
        bucket = s3.bucket("cold", through=f"127.0.0.1:{s3_port}")
        fleet = {"AERIE_S3_BUCKET": bucket.name, "AERIE_S3_PREFIX": bucket.prefix, "AERIE_S3_ENDPOINT": bucket.endpoint}
        fleet |= {"AERIE_S3_REGION": bucket.region} | CREDENTIALS

        def cold(**settings: str) -> tuple[Daemon, float]:
            daemon = site.new_daemon(image, **settings)
            return daemon, start(site, daemon, link, {registry_port: "registry", s3_port: "S3"})

        def shared(kind: str) -> None:
            deadline = time.monotonic() + PATIENCE_S
            while not any(f"/{kind}/" in key for key in s3.keys(bucket)):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"nothing in {kind}/ of the bucket")
                time.sleep(0.05)

        theirs, alone = [], []
        for _ in range(ROUNDS_WITHOUT):
            theirs.append(pulled(site, image, home))
            alone.append(cold()[1])
        yield at_most("cold start without archive; floor: skopeo, umoci, crun", median(alone), median(theirs), 0.95, "s")
        cold(**fleet)
        shared("archives")
        # The one that is traced, and makes the pack, is the floor's, too.
        traced, _ = cold(AERIE_IMAGE_PREFETCH="trace", **fleet)
        shared("packs")
        floor = floor_s(site, traced, image)
        untraced = [cold(**fleet)[1] for _ in range(ROUNDS)]
        yield within_both("cold start, archive in S3, no trace", median(untraced), floor, 3.0, 2.5)
        packed = [cold(AERIE_IMAGE_PREFETCH="trace", **fleet)[1] for _ in range(ROUNDS)]
        yield within_both("cold start, archive and pack in S3", median(packed), floor, 1.5, 1.1)


def within_both(work: str, ours_s: float, floor: float, ratio: float, bound_s: float) -> Row:
    row = at_most(work, ours_s, floor, ratio, "s")
    return replace(row, goal=f"{row.goal}, {bound_s:g} s", met=ours_s / floor <= ratio and ours_s < bound_s)


def floor_s(site: Site, traced: Daemon, image: str) -> float:
    """The least that the task of this daemon's only trace takes: what it reads, five round trips, and a warm task."""
    archives = traced.state / "images/archives"
    [path] = archives.glob("*.trace")
    found = trace.decode(path.read_bytes())
    [archive] = archives.glob("*.aerie")
    table = Archive.open(str(archive)).objects()
    warm = site.new_daemon(image)  # all of its content is here
    times = []
    for _ in range(1 + WARM):
        began = time.perf_counter()
        warm.run(COMMAND)
        times.append(time.perf_counter() - began)
    cache = warm.state / "images/cache"
    size = 0
    for block in found.blocks:
        key = table.row(block.row).key
        with open(cache / Objects.path(key), "rb") as file:
            file.seek(block.block * trace.BLOCK_BYTES)
            size += len(zlib.compress(file.read(trace.BLOCK_BYTES), 6))
    warm_s = median(times[1:])
    site.say(f"floor: {len(found.blocks)} blocks, {size / MB:.1f} MB compressed; a warm task {warm_s:.3f} s")
    return size / BYTES_PER_S + 5 * ROUND_TRIP_S + warm_s


def start(site: Site, daemon: Daemon, link: RunningLink, names: dict[int, str]) -> float:
    """Run the task on a node that has nothing → seconds until its result is there."""
    drop_caches()
    time.sleep(0.5)
    link.counted()
    began = time.perf_counter()
    result = daemon.run(COMMAND)
    took_s = time.perf_counter() - began
    if result.exit_code != 0 or daemon.logs(result.task)[0] != b"1\n":
        raise RuntimeError((result, daemon.log.read_text()[-3000:]))
    moved = {names[port]: f"{moved / MB:.1f} MB, {count} connections" for port, (moved, count) in link.counted().items()}
    site.say(f"cold start: {took_s:.2f} s, {moved}")
    return took_s


def pulled(site: Site, image: str, home: Path) -> float:
    """The same by skopeo, umoci and crun → seconds."""
    bundle = home / "bundle"
    site.say("skopeo, umoci, crun")
    drop_caches()
    began = time.perf_counter()
    subprocess.run(
        ["skopeo", "copy", "--quiet", "--src-tls-verify=false", f"docker://{image}", f"oci:{home}/layout:1"], check=True
    )
    subprocess.run(
        ["umoci", "unpack", "--image", f"{home}/layout:1", str(bundle)],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    spec = json.loads((bundle / "config.json").read_text())
    spec["process"] |= {"args": COMMAND, "terminal": False}
    spec["process"].pop("rlimits", None)
    spec["linux"].pop("resources", None)
    (bundle / "config.json").write_text(json.dumps(spec))
    ran = subprocess.run(["crun", "run", "--bundle", str(bundle), "aerie-bench-cold"], capture_output=True, check=False)
    took_s = time.perf_counter() - began
    if ran.stdout != b"1\n":
        raise RuntimeError(ran)
    shutil.rmtree(bundle)
    shutil.rmtree(home / "layout")
    return took_s


def drop_caches() -> None:
    subprocess.run(["sync"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("3")


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]
