"""A cold start over a slow link: nothing of the image is here, registry and S3 share 100 Mbit/s and are 20 ms away (`link`).

The floor is what nobody can do without: the compressed bytes of the 64 KiB blocks that the task reads, as a trace shows, at the link's
bandwidth, five round trips, and a warm task.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from tests.actors.image.s3 import CREDENTIALS, RunningS3
from tests.bench import science
from tests.bench.link import RunningLink
from tests.bench.site import Site
from tests.bench.table import Row, at_most, median, within
from tests.node.daemon import Daemon

COMMAND = ["python3", "-c", "import json, ssl, http.client; print(1)"]
ROUNDS = 3
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

        def cold(**settings: str) -> float:
            return start(site, site.new_daemon(image, **settings), link, {registry_port: "registry", s3_port: "S3"})

        theirs = pulled(site, f"127.0.0.1:{registry_port}/{repository.name}:1", home)
        site.say(f"skopeo, umoci, crun: {theirs:.2f} s, {link.counted()}")
        alone = cold()
        yield at_most("cold start without archive, against skopeo + umoci + crun", alone, theirs, 0.95, "s")
        builder = site.new_daemon(image, **fleet)
        start(site, builder, link, {registry_port: "registry", s3_port: "S3"})
        deadline = time.monotonic() + 60
        while not any("archives/" in key for key in s3.keys(bucket)):
            assert time.monotonic() < deadline, builder.log.read_text()[-2000:]
            time.sleep(0.05)
        untraced = [cold(**fleet) for _ in range(ROUNDS)]
        yield within("cold start with the archive in S3, no trace", median(untraced), 2.5, "s")
        maker = site.new_daemon(image, AERIE_IMAGE_PREFETCH="trace", **fleet)
        start(site, maker, link, {registry_port: "registry", s3_port: "S3"})
        deadline = time.monotonic() + 120
        while not any("packs/" in key for key in s3.keys(bucket)):
            assert time.monotonic() < deadline, maker.log.read_text()[-2000:]
            time.sleep(0.05)
        site.say("the pack is there")
        packed = [cold(AERIE_IMAGE_PREFETCH="trace", **fleet) for _ in range(ROUNDS)]
        yield within("cold start with archive and pack in S3", median(packed), 1.1, "s")


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
    config = (bundle / "config.json").read_text()
    import json

    spec = json.loads(config)
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


def compressed_bytes(blocks: Iterator[bytes]) -> int:
    return sum(len(zlib.compress(block, 6)) for block in blocks)


def drop_caches() -> None:
    subprocess.run(["sync"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("3")


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]
