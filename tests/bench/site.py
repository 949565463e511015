"""Where the bench runs: one disk, one registry with a small and a Debian image, daemons and the floor, each made when it is wanted."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType

from tests.actors.image.images import Repository, RunningRegistry
from tests.bench.floor import Floor
from tests.node.conftest import APPLETS, busybox_layer
from tests.node.daemon import Daemon

DISK = Path("/var/tmp")  # a real one; /tmp may be a tmpfs
CACHE = DISK / "aerie-bench"  # what is the same in every run: `make clean` removes it
FILES = 1000  # in the workspace `bench`
TASK = 1000  # uid and gid


class Site:
    """A context: at its end all is stopped and removed, the cache excepted."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._daemons: list[Daemon] = []

    def __enter__(self) -> Site:
        self.home = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="aerie-bench-", dir=DISK)))
        self.home.chmod(0o755)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for daemon in self._daemons:
            if kind is not None:
                daemon.clear_away()
            elif daemon.stop():
                raise RuntimeError(daemon.log.read_text()[-3000:])
        self._stack.__exit__(kind, error, trace)

    def say(self, text: str) -> None:
        """Progress, for whoever waits."""
        print(f"  {text}", file=sys.stderr, flush=True)

    @cached_property
    def registry(self) -> RunningRegistry:
        (self.home / "registry").mkdir()
        registry = RunningRegistry(self.home / "registry")
        self._stack.callback(registry.stop)
        return registry

    @cached_property
    def busybox(self) -> str:
        """A reference of a small image."""
        repository = self.registry.repository("busybox")
        repository.push(busybox_layer(), tag="1", process={"Env": ["PATH=/bin"]})
        return repository.reference("1")

    @cached_property
    def floor(self) -> Floor:
        """On the same disk as the daemons, on the same root file system as `busybox`."""
        rootfs = self.home / "rootfs"
        for part in ("bin", "proc", "sys", "dev", "tmp", "etc"):
            (rootfs / part).mkdir(parents=True)
        shutil.copy("/bin/busybox", rootfs / "bin/busybox")
        for applet in APPLETS.split():
            (rootfs / "bin" / applet).symlink_to("busybox")
        return Floor(rootfs, self.home / "floor")

    def archived(self, image: str) -> str:
        """A directory of archives, with that of the image, which another daemon has built: none of its content is here."""
        builder = self.new_daemon(image)
        builder.run(["/bin/true"])
        builder.wait_released()
        return str(builder.state / "images/archives")

    def new_daemon(self, image: str, **settings: str) -> Daemon:
        """A daemon of its own, with empty stores."""
        home = self.home / f"d{len(self._daemons)}"
        home.mkdir()
        daemon = Daemon(home, image, **settings)
        daemon.start()
        self._daemons.append(daemon)
        return daemon

    @cached_property
    def daemon(self) -> Daemon:
        """A daemon that has run a task on `busybox` and the workspace `bench` of FILES small files."""
        daemon = self.new_daemon(self.busybox)
        store = daemon.state / "workspaces/bench"
        for number in range(FILES):
            file = store / f"directory-{number // 100}" / f"file-{number}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"file {number}\n" * 20)
        for path in (store, *store.rglob("*")):
            os.chown(path, TASK, TASK)
        daemon.run(["/bin/true"], workspace="bench")
        daemon.wait_released()
        return daemon

    # --- a Debian root file system ---

    @cached_property
    def debian(self) -> Path:
        """Debian bookworm's minbase, from whatever mirror this host installs its own packages from."""
        root = CACHE / "debian"
        if not root.exists():
            self.say("debootstrap (kept for the next run)")
            unfinished = CACHE / "debian.unfinished"
            if unfinished.exists():
                shutil.rmtree(unfinished)
            unfinished.mkdir(parents=True)
            mirror = subprocess.run(
                ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"],
                capture_output=True, text=True, check=True,
            ).stdout.split()[0]  # fmt: skip
            subprocess.run(
                ["debootstrap", "--variant=minbase", "bookworm", unfinished, mirror], check=True, stdout=subprocess.DEVNULL
            )
            unfinished.rename(root)
        return root

    @cached_property
    def debian_repository(self) -> Repository:
        """The same as an image of one gzip layer, tag `1`."""
        packed = CACHE / "debian.tar.gz"
        if not packed.exists():
            self.say("packing it (kept for the next run)")
            tar = subprocess.run(
                ["tar", "--create", "--numeric-owner", "--sort=name", "--directory", self.debian, "."],
                capture_output=True,
                check=True,
            ).stdout
            unfinished = CACHE / "debian.tar.gz.unfinished"
            unfinished.write_bytes(gzip.compress(tar, 6, mtime=0))
            unfinished.rename(packed)
        blob = packed.read_bytes()
        repository = self.registry.repository("debian")
        diff_id = "sha256:" + hashlib.sha256(gzip.decompress(blob)).hexdigest()
        repository.push(blobs=[blob], diff_ids=[diff_id], tag="1", process={"Env": ["PATH=/usr/bin:/bin"]})
        return repository

    @property
    def debian_image(self) -> str:
        return self.debian_repository.reference("1")
