"""The index pass over an image's layers, objects written, against `umoci unpack` of the same layers; each on one core, in turns.

Ours reads the layers from the registry, which runs on another core; umoci reads them from an OCI layout on the same disk.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.bench.site import Site
from tests.bench.table import Row, as_fast, median

ROUNDS = 3
ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import gc, sys
from actors.image.archives.builder import Build
from actors.image.wire import BuildImage
gc.disable()  # as the image builder's process does
Build(BuildImage(*sys.argv[1:4])).run()
"""

RATE = 100
RATE_PROGRAM = """
import gc, resource, sys
from actors.image.archives.builder import Build
from actors.image.wire import BuildImage
from actors.lazytree.objects import Objects
gc.disable()
Objects.create = lambda self, *_: open("/dev/null", "wb")
Objects.publish = lambda self, *_: False
before = resource.getrusage(resource.RUSAGE_SELF)
build = Build(BuildImage(*sys.argv[1:4]))
build.run()
after = resource.getrusage(resource.RUSAGE_SELF)
print(build._budget.unpacked_bytes, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
"""


def rows(site: Site) -> Iterator[Row]:
    image = site.debian_image
    home = site.home / "indexing"
    home.mkdir()
    layout = home / "layout"
    subprocess.run(["skopeo", "copy", "--quiet", "--src-tls-verify=false", f"docker://{image}", f"oci:{layout}:1"], check=True)
    core = str(max(os.sched_getaffinity(0)))
    unpacked, indexed = home / "unpacked", home / "indexed"
    commands = {
        "umoci": ["umoci", "unpack", "--image", f"{layout}:1", str(unpacked)],
        "ours": [sys.executable, "-c", PROGRAM, image, str(indexed / "archives"), str(indexed / "cache")],
    }
    figures: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(ROUNDS):
        for name, command in commands.items():
            site.say(f"index pass, {number + 1} of {ROUNDS}: {name}")
            os.sync()
            began = time.perf_counter()
            subprocess.run(
                ["taskset", "--cpu-list", core, *command],
                cwd=ROOT,
                check=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            figures[name].append((time.perf_counter() - began) * 1e3)
            shutil.rmtree(unpacked, ignore_errors=True)
            shutil.rmtree(indexed, ignore_errors=True)
    yield as_fast("index pass, against umoci unpack", median(figures["ours"]), median(figures["umoci"]), 1.0)
    site.say("index pass without writing objects")
    rates = [rate(image, indexed) for _ in range(ROUNDS)]
    shutil.rmtree(indexed)
    yield Row(
        "index pass without writing objects",
        "",
        f"{median(rates):.0f} MB/CPU s",
        median(rates) / RATE,
        f"{RATE} MB/CPU s",
        median(rates) >= RATE,
    )


def rate(image: str, home: Path) -> float:
    """Megabytes of layers, unpacked, that are indexed in a second of a processor, when no object is written."""
    arguments = [image, str(home / "archives"), str(home / "cache")]
    shutil.rmtree(home, ignore_errors=True)
    ran = subprocess.run([sys.executable, "-c", RATE_PROGRAM, *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    unpacked_bytes, cpu_s = map(float, ran.stdout.split())
    return unpacked_bytes / 1e6 / cpu_s
