"""The stall of a reader: from SIGKILL of its FUSE process to the first answer of a request that was outstanding at the kill."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.bench.site import Site
from tests.bench.table import Row, within
from tests.node.daemon import Daemon

FILE_BYTES = 10 << 30  # sparse: each read is of a page that no earlier one has brought into the page cache
PAGE_BYTES = 4096
KILLS = 100
ANSWER_S = 30.0


@dataclass(frozen=True)
class Stalls:
    """Milliseconds, in order of size; a kill that met no outstanding request is not counted."""

    milliseconds: list[float]

    def percentile(self, part: float) -> float:
        return self.milliseconds[min(len(self.milliseconds) - 1, int(len(self.milliseconds) * part))]


class Reader:
    """Reads one page after the other, each from the FUSE process; `waiting_since` is when the read under way began."""

    def __init__(self, path: Path, seed: int = 1) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # no readahead
        self._pages = random.Random(seed).sample(range(FILE_BYTES // PAGE_BYTES), 500_000)
        self._answered = threading.Condition()
        self._stopping = False
        self.last: tuple[float, float] = (0.0, 0.0)  # when the last answered read began and ended
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for page in self._pages:
                began = time.perf_counter()
                data = os.pread(self._descriptor, PAGE_BYTES, page * PAGE_BYTES)
                ended = time.perf_counter()
                if data != bytes(PAGE_BYTES):
                    raise RuntimeError(f"wrong bytes at page {page}")
                with self._answered:
                    self.last = began, ended
                    self._answered.notify_all()
                    if self._stopping:
                        return
            raise RuntimeError("every page was read")
        except BaseException as error:  # noqa: BLE001 (it is the caller's, who waits)
            with self._answered:
                self.error = error
                self._answered.notify_all()

    def ended_after(self, moment: float) -> tuple[float, float]:
        """Wait for the first read that ends after `moment` → when it began and ended."""
        with self._answered:
            if not self._answered.wait_for(lambda: self.error or self.last[1] > moment, ANSWER_S):
                raise TimeoutError(f"a read has had no answer for {ANSWER_S:g} s")
            if self.error:
                raise self.error
            return self.last

    def close(self) -> None:
        self._stopping = True
        self._thread.join(ANSWER_S)
        os.close(self._descriptor)


def workspace_stalls(daemon: Daemon, kills: int = 100, seed: int = 1) -> Stalls:
    """Kill the server of a workspace `kills` times under a reader of it → how long the reader waited each time."""
    store = daemon.state / "workspaces/stall"
    store.mkdir(mode=0o755, exist_ok=True)
    with open(store / "large", "wb") as file:
        file.truncate(FILE_BYTES)
    for path in (store, store / "large"):
        os.chown(path, 1000, 1000)
    task = daemon.submit(["/bin/sleep", "1000"], workspace="stall", task=f"stall-{seed}")
    while b'"running"' not in (shown := daemon.command("result", "--json", task).stdout):
        if b'"pending"' not in shown and b'"creating"' not in shown:
            raise RuntimeError(shown)
    reader = Reader(daemon.run_dir / "tasks" / task / "workspace/large", seed)
    try:
        stalls = sorted(stall(daemon, f"workspace mount {task}", reader, kills, random.Random(seed)))
    finally:
        reader.close()
        stopped = daemon.command("stop", "--force", task)
        assert stopped.returncode == 0, stopped
        daemon.wait_released()
    return Stalls(stalls)


def stall(daemon: Daemon, name: str, reader: Reader, kills: int, chance: random.Random) -> list[float]:
    stalls, pid = [], 0
    while len(stalls) < kills:
        pid = daemon.wait_pid(name, other_than=pid)
        reader.ended_after(time.perf_counter())
        time.sleep(chance.uniform(0.02, 0.1))  # at no particular moment of the server's life
        killed = time.perf_counter()
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it was replaced, and the tree did not show it yet
        began, ended = reader.ended_after(killed)
        # An answer that was on its way already is not what was waited for: the next read then had the whole stall.
        if ended - killed < 0.001:
            began, ended = reader.ended_after(ended)
        if began < killed + 0.001:
            stalls.append((ended - killed) * 1e3)
    return stalls


def rows(site: Site) -> Iterator[Row]:
    site.say(f"{KILLS} kills of a workspace's server under a reader")
    stalls = workspace_stalls(site.daemon, KILLS)
    yield within("reader's stall when its FUSE process is killed: median", stalls.percentile(0.5), 15, "ms")
    yield within("reader's stall when its FUSE process is killed: p99", stalls.percentile(0.99), 50, "ms")
