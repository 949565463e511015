"""The index pass over an image's layers, objects written, against `umoci unpack` of the same layers; each on one core, in turns.

And META of a large image, on the clock.

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
from tests.bench.table import Row, as_fast, median, within

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


META_ENTRIES, META_S = 128_000, 2.0
# Two layers, overlaid: files of all sizes and some times, in directories of a hundred; every tenth entry a link of one or the other
# sort, every twentieth file with attributes.  What is timed is what comes between the overlaid tree and the bytes in the file.
META_PROGRAM = """
import gc, stat, sys, time
from actors.image.layers.overlaying import LayeredTree
from actors.image.layers.stream import Budget
from actors.image.layers.tar import Entry
from actors.lazytree import erofs

def entry(name, mode, number=0, target=b"", xattrs={}):
    size = number * 37 if stat.S_ISREG(mode) else 0
    return Entry(name, mode, 0, number % 3, number % 50 * 10**9, size, target, 0, dict(xattrs), 0, size, None)

gc.disable()  # as the image builder's process does
tree = LayeredTree(Budget(1 << 60, 1 << 30))
made = 1
for layer in range(2):
    tree.begin_layer()
    number = 0
    while made < int(sys.argv[1]) * (layer + 1) // 2:
        place, number = b"usr/lib/l%d-%d/" % (layer, number // 100), number + 1
        if number % 100 == 1:
            tree.add(entry(place, stat.S_IFDIR | 0o755), None)
        elif number % 10 == 2:
            tree.add(entry(place + b"link-%d" % number, stat.S_IFLNK | 0o777, target=b"file-%d.so" % number), None)
        elif number % 10 == 3 and number % 100 > 10:
            tree.add(entry(place + b"other-%d" % number, 0, target=place + b"file-%d.so" % (number - 3)), None)
            number += 1
            continue
        else:
            xattrs = {b"security.capability": bytes(20)} if number % 20 == 0 else {}
            file = entry(place + b"file-%d.so" % number, stat.S_IFREG | 0o644, number, xattrs=xattrs)
            tree.add(file, f"{layer:032x}{number:032x}")
        made += 1
    tree.end_layer()
with open(sys.argv[2], "w+b") as file:
    began = time.perf_counter()
    erofs.write(tree.root, file)
    file.flush()
    print(made, time.perf_counter() - began)
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
    site.say(f"META of {META_ENTRIES} entries")
    yield within(
        f"META of {META_ENTRIES:,} entries, from tree to file", median([meta_s(home) for _ in range(ROUNDS)]), META_S, "s"
    )


def meta_s(home: Path) -> float:
    """Seconds from an overlaid tree of META_ENTRIES to META in a file."""
    arguments = [str(META_ENTRIES), str(home / "meta")]
    ran = subprocess.run([sys.executable, "-c", META_PROGRAM, *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    entries, took_s = ran.stdout.split()
    assert int(entries) >= META_ENTRIES
    return float(took_s)


def rate(image: str, home: Path) -> float:
    """Megabytes of layers, unpacked, that are indexed in a second of a processor, when no object is written."""
    arguments = [image, str(home / "archives"), str(home / "cache")]
    shutil.rmtree(home, ignore_errors=True)
    ran = subprocess.run([sys.executable, "-c", RATE_PROGRAM, *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    unpacked_bytes, cpu_s = map(float, ran.stdout.split())
    return unpacked_bytes / 1e6 / cpu_s
