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
from actors.image.builder import Build
from actors.image.wire import BuildImage
gc.disable()  # as the image builder's process does
Build(BuildImage(*sys.argv[1:4])).run()
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
