"""The floor of a warm task: what overlayfs, conmon, an OCI runtime and two durable writes cost without us.

The least that runs a container with what a task is promised: its record durable before it starts, a root of its own, its
output in a file, its result durable.  Nothing of Aerie is used.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)


def durable(path: Path) -> None:
    with open(path, "w") as file:
        file.write("state")
        file.flush()
        os.fdatasync(file.fileno())


class Floor:
    """Runs `/bin/true` on the root file system `rootfs`, with its directories below `home`, which is on the state disk."""

    def __init__(self, rootfs: Path, home: Path) -> None:
        self._rootfs, self._home = rootfs, home
        for part in ("exits", "sockets", "spec"):
            (home / part).mkdir(parents=True)
        subprocess.run(["crun", "spec"], cwd=home / "spec", check=True)
        spec: dict[str, Any] = json.loads((home / "spec/config.json").read_text())
        spec["process"].update(terminal=False, args=["/bin/true"])
        spec["process"].pop("rlimits", None)
        spec["root"] = {"path": "rootfs", "readonly": False}
        self._spec = json.dumps(spec)
        self._runtime = shutil.which("crun") or "crun"
        self._count = 0

    def run(self, name: str = "") -> float:
        """Run one → seconds from the request to the durable result.  What follows (deletion) is not in it."""
        if not name:
            self._count += 1
            name = f"floor-{os.getpid()}-{self._count}"
        home = self._home / name
        began = time.perf_counter()
        for part in ("upper", "scratch", "bundle/rootfs"):
            (home / part).mkdir(parents=True)
        durable(home / "accepted")
        options = f"lowerdir={self._rootfs},upperdir={home}/upper,workdir={home}/scratch,volatile"
        if _libc.mount(b"overlay", os.fsencode(home / "bundle/rootfs"), b"overlay", 0, options.encode()):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        (home / "bundle/config.json").write_text(self._spec)
        reader, writer = os.pipe()
        monitor = subprocess.Popen(
            ["conmon", "--api-version", "1", "-c", name, "-u", name, "-n", name, "-r", self._runtime, "-b", f"{home}/bundle",
             "-p", f"{home}/pid", "--exit-dir", f"{self._home}/exits", "--persist-dir", home, "-l", f"k8s-file:{home}/log",
             "--socket-dir-path", f"{self._home}/sockets", "--sync"],
            pass_fds=[writer], env={**os.environ, "_OCI_SYNCPIPE": str(writer)},
        )  # fmt: skip
        os.close(writer)
        created = json.loads(os.read(reader, 65536))
        os.close(reader)
        if created["data"] <= 0:
            raise RuntimeError(created)
        subprocess.run([self._runtime, "start", name], check=True)
        exited = self._home / "exits" / name
        while not exited.exists():
            time.sleep(0.0002)
        durable(home / "result")
        took_s = time.perf_counter() - began
        subprocess.run([self._runtime, "delete", name], check=True)
        _libc.umount2(os.fsencode(home / "bundle/rootfs"), 2)
        shutil.rmtree(home)
        exited.unlink()
        monitor.wait()
        return took_s

    def rate(self, count: int) -> float:
        """Tasks per second, deletion included, of `count` started at once on eight threads."""
        began = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(self.run, [f"floor-{os.getpid()}-at-once-{number}" for number in range(count)]))
        return count / (time.perf_counter() - began)
