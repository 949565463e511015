"""A storm over the FUSE processes alone, one blow to each kind every tenth of a second, under tasks that do real work.

A task executes git, sqlite3, make and a shell from an image of which nothing is on the node, so that what it maps and executes comes
through the image's mount; reads image and workspace block by block against sums that were computed beside; commits, inserts and
builds.  What it leaves in its workspace is checked by the host's own git and sqlite3.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from actors.gateway.messages import Ended, MountImage, UnmountImage, Wait
from supervisor.lockfile import sign_of
from tests.actors.image.images import Repository, RunningRegistry, member, tar
from tests.faults.load import Broken
from tests.node.conftest import busybox_layer
from tests.node.daemon import Daemon, running

EVERY_S = 0.1
KINDS = ("image mount", "workspace mount")
KILLS_MIN = 3  # of each kind, however long that takes
TASK_S = 180.0  # that anything may take in all of it
STOP_SHARE = 0.15
TASKS = 2
BLOCK_BYTES = 64 << 10
IMAGE_BLOCKS, STORE_BLOCKS = 512, 512
EXIT_CODE = 7
PROGRAMS = ("/usr/bin/git", "/usr/bin/sqlite3", "/usr/bin/make")
TARGETS = range(5)
MAKEFILE = """all: {targets}
out/%: src/%
\t@cat $< $< > $@
"""
SCRIPT = """
wrong() {{ echo "WRONG in round $r: $*"; }}
block() {{ dd if=$1 bs={block} skip=$2 count=1 2> /dev/null | md5sum; }}
r=0
git init -q repo 2>&1 || wrong git init
sqlite3 base.db 'CREATE TABLE rounds (number INTEGER)' || wrong sqlite3
while [ $r -eq 0 ] || [ ! -e enough ]; do
  r=$((r+1))
  for n in $r $((r+7)) $((r+99)); do
    [ "$(block /data/large $((n % {image_blocks})))" = "$(sed -n $((n % {image_blocks} + 1))p /data/sums)" ] || wrong image $n
    [ "$(block large $((n % {store_blocks})))" = "$(sed -n $((n % {store_blocks} + 1))p sums)" ] || wrong workspace $n
  done
  echo $r > repo/file && git -C repo add file 2>&1 && git -C repo commit -q -m "round $r" 2>&1 || wrong git
  [ "$(sqlite3 base.db "PRAGMA mmap_size=1048576; INSERT INTO rounds VALUES ($r); SELECT count(*) FROM rounds" | tail -n 1)" = $r ] \\
    || wrong sqlite3
  rm -rf out; mkdir out; make 2>&1 || wrong make
  [ "$(cat out/* | md5sum)" = "{built}  -" ] || wrong what make built
done
echo rounds $r
exit {code}
"""


@dataclass
class Tally:
    """What was struck, and what was done meanwhile."""

    blows: Counter[str] = field(default_factory=Counter)
    rounds: int = 0

    def line(self) -> str:
        blows = ", ".join(f"{kind} {count} times" for kind, count in sorted(self.blows.items()))
        return f"FUSE processes alone: {blows}; {self.rounds} rounds of git, sqlite3 and make, no error"


def push_image(repository: Repository, chance: random.Random) -> str:
    """An image with the host's own programs and all they are linked with → its reference."""
    libraries = {
        word for program in PROGRAMS for word in subprocess.check_output(["ldd", program], text=True).split() if word[0] == "/"
    }
    programs = [member(path[1:], Path(path).read_bytes(), mode=0o755) for path in (*PROGRAMS, *sorted(libraries))]
    large = chance.randbytes(IMAGE_BLOCKS * BLOCK_BYTES)
    data = [member("data/large", large), member("data/sums", sums(large))]
    applets = [member("bin/sed", b'#!/bin/busybox sh\nexec /bin/busybox sed "$@"\n', mode=0o755)]
    repository.push(busybox_layer(), tar(*programs, *applets), tar(*data), tag="tools", process={"Env": ["PATH=/bin:/usr/bin"]})
    return repository.reference("tools")


def sums(content: bytes) -> bytes:
    blocks = (content[place : place + BLOCK_BYTES] for place in range(0, len(content), BLOCK_BYTES))
    return b"".join(hashlib.md5(block).hexdigest().encode() + b"  -\n" for block in blocks)


class FuseStorm:
    """`daemon` has the image's archive from another one, and nothing of its content."""

    def __init__(self, daemon: Daemon, seed: int) -> None:
        self._daemon = daemon
        self._chance = random.Random(seed)
        self.tally = Tally()

    def run(self, seconds: float) -> None:
        """Raises Broken."""
        tasks = [self._submit(f"fuse-{number}") for number in range(TASKS)]
        deadline = time.monotonic() + TASK_S
        for task in tasks:
            while not (self._daemon.state / "tasks" / task / "output").exists():
                if time.monotonic() > deadline:
                    raise Broken(f"{task} does not begin")
                self._daemon.tree()  # made with the container; every look takes a moment
        self._strike_for(seconds)
        for task in tasks:
            (self._daemon.run_dir / "tasks" / task / "workspace/enough").touch()
        for task in tasks:
            self._check(task)

    def _submit(self, name: str) -> str:
        store = self._daemon.state / "workspaces" / name
        (store / "src").mkdir(mode=0o755, parents=True)
        large = self._chance.randbytes(STORE_BLOCKS * BLOCK_BYTES)
        sources = [self._chance.randbytes(BLOCK_BYTES) for _ in TARGETS]
        (store / "large").write_bytes(large)
        (store / "sums").write_bytes(sums(large))
        (store / "Makefile").write_text(MAKEFILE.format(targets=" ".join(f"out/{number}" for number in TARGETS)))
        for number in TARGETS:
            (store / f"src/{number}").write_bytes(sources[number])
        for path in (store, *store.rglob("*")):
            os.chown(path, 1000, 1000)
        script = SCRIPT.format(
            block=BLOCK_BYTES,
            image_blocks=IMAGE_BLOCKS,
            store_blocks=STORE_BLOCKS,
            built=hashlib.md5(b"".join(source * 2 for source in sources)).hexdigest(),
            code=EXIT_CODE,
        )
        who = {f"GIT_{role}_{what}": "storm" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        quiet = {"GIT_CONFIG_COUNT": "2", "GIT_CONFIG_KEY_0": "gc.auto", "GIT_CONFIG_VALUE_0": "0"}
        quiet |= {"GIT_CONFIG_KEY_1": "maintenance.auto", "GIT_CONFIG_VALUE_1": "false"}
        return self._daemon.submit(script, name, workspace=name, env={**who, **quiet})

    def _strike_for(self, seconds: float) -> None:
        began = time.monotonic()
        while time.monotonic() < began + seconds or any(self.tally.blows[f"{kind} killed"] < KILLS_MIN for kind in KINDS):
            if time.monotonic() > began + seconds + TASK_S:
                raise Broken("its processes are not met")
            time.sleep(self._chance.uniform(0.5, 1.5) * EVERY_S)  # the storm's own rhythm, not a wait
            for lock in sorted((self._daemon.run_dir / "served").glob("*.lock")):
                self._strike(sign_of(lock).pid)

    def _strike(self, pid: int) -> None:
        try:
            comm = Path(f"/proc/{pid}/comm").read_text()
            kind = next(kind for kind in KINDS if comm.startswith(kind[:15]))
            stop = self._chance.random() < STOP_SHARE
            os.kill(pid, signal.SIGSTOP if stop else signal.SIGKILL)
        except (OSError, StopIteration):
            return  # it is being replaced
        self.tally.blows[f"{kind} {'stopped' if stop else 'killed'}"] += 1

    def _check(self, task: str) -> None:
        client = self._daemon.client
        answer = client.ask(Wait(client.number(), task, None), timeout_s=TASK_S)
        assert isinstance(answer, Ended)
        result = answer.result
        stdout, stderr = self._daemon.logs(task)
        text = stdout.decode(errors="replace")
        if "WRONG" in text or stderr or (result.exit_code, result.sync, result.error) != (EXIT_CODE, "synced", None):
            raise Broken(f"{task}: {text[-2000:]} {stderr.decode(errors='replace')[-2000:]} {result}")
        rounds = int(text.split()[-1])
        self.tally.rounds += rounds
        store = self._daemon.state / "workspaces" / task
        git = ["git", "-c", "safe.directory=*", "-C", str(store / "repo")]
        subprocess.run([*git, "fsck", "--strict"], check=True, capture_output=True)
        commits = subprocess.run([*git, "log", "--format=%s"], check=True, capture_output=True, text=True).stdout.split("\n")
        if commits != [*(f"round {number}" for number in range(rounds, 0, -1)), ""]:
            raise Broken(f"{task}: {rounds} rounds, and {commits[:3]} … of {len(commits)} commits")
        base = sqlite3.connect(store / "base.db")
        found = base.execute("PRAGMA integrity_check").fetchall(), base.execute("SELECT number FROM rounds").fetchall()
        base.close()
        if found != ([("ok",)], [(number,) for number in range(1, rounds + 1)]):
            raise Broken(f"{task}: {found}")
        shutil.rmtree(store)


def fuse_storm(home: Path, registry: RunningRegistry, seconds: float, seed: int) -> Tally:
    """Run one in the directory `home`, which is made.  Raises Broken, or AssertionError for what is left behind."""
    for directory in (home, home / "node", home / "archivist"):
        directory.mkdir()
    image = push_image(registry.repository("fuse-storm"), random.Random(seed))
    shared = {"AERIE_IMAGE_ARCHIVE_DIR": str(home / "archives")}
    with running(home / "archivist", image, **shared) as archivist:
        client = archivist.client
        client.ask(
            UnmountImage(client.number(), client.ask(MountImage(client.number(), image), timeout_s=TASK_S).lease),
            timeout_s=TASK_S,
        )
    with running(home / "node", image, **shared) as daemon:
        current = FuseStorm(daemon, seed)
        try:
            current.run(seconds)
            if faults := daemon.own_faults():
                raise Broken(f"the daemon says {faults}")
        except BaseException:
            print(f"seed {seed}: {current.tally}\n{daemon.log.read_text()[-20000:]}")
            daemon.clear_away()
            raise
    return current.tally
