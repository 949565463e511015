"""A warm task against the kernel's own floor: alone, fifty at once, and what it and the daemon take of memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from actors.gateway.messages import Ended, Submit
from tests.bench.floor import Floor
from tests.bench.site import FILES, Site
from tests.bench.table import Row, at_least, at_most, median, percentile, within
from tests.node.daemon import PROGRAM, Daemon

ROUNDS, WARM_UP = 40, 3
AT_ONCE, AT_ONCE_ROUNDS = 50, 5
HELD = 8  # tasks that run while memory is looked at
WITH = f"workspace of {FILES} files"


class Batch:
    """`run.py batch --parallel 1`, fed a line at a time."""

    def __init__(self, daemon: Daemon) -> None:
        self._image = daemon.image
        self._process = subprocess.Popen(
            [sys.executable, PROGRAM, "batch", "--parallel", "1", "-"],
            env=daemon.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def run(self, workspace: str | None) -> float:
        """Run /bin/true → seconds from the line in to the result out."""
        line: dict[str, object] = {"image": self._image, "command": ["/bin/true"]}
        if workspace:
            line["workspace"] = workspace
        assert self._process.stdin and self._process.stdout
        began = time.perf_counter()
        self._process.stdin.write(json.dumps(line).encode() + b"\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        took_s = time.perf_counter() - began
        if answer["exit_code"] != 0:
            raise RuntimeError(answer)
        return took_s

    def close(self) -> None:
        self._process.communicate()


def rows(site: Site) -> Iterator[Row]:
    yield from warm_task(site)
    for workspace in (None, "bench"):
        site.say(f"{AT_ONCE} at once, {WITH if workspace else 'no workspace'}")
        yield at_once(site.daemon, site.floor, workspace)
    site.say("memory")
    yield from memory(site.daemon)


def warm_task(site: Site) -> Iterator[Row]:
    daemon, floor = site.daemon, site.floor
    site.say("warm task")
    batch = Batch(daemon)
    figures: dict[str, list[float]] = {"floor": [], "with": [], "without": []}
    for number in range(ROUNDS + WARM_UP):
        # What the floor's deletion leaves to the kernel must not be ours to wait for, nor the other way round.
        for name, run in (("floor", floor.run), ("with", lambda: batch.run("bench")), ("without", lambda: batch.run(None))):
            took_s = run()
            daemon.wait_released()
            if number >= WARM_UP:
                figures[name].append(took_s * 1e3)
    batch.close()
    base = median(figures["floor"])
    yield at_most(f"warm task, {WITH}: median", median(figures["with"]), base, 1.6)
    yield at_most(f"warm task, {WITH}: p95", percentile(figures["with"], 0.95), base, 2.5)
    yield at_most("warm task, no workspace: median", median(figures["without"]), base, 1.6)
    yield at_most("warm task, no workspace: p95", percentile(figures["without"], 0.95), base, 2.5)
    yield within("warm task, no workspace: all that is added to the floor", median(figures["without"]) - base, 3.0, "ms")


def at_once(daemon: Daemon, floor: Floor, workspace: str | None) -> Row:
    floors, ours = [], []
    client = daemon.client
    for round_number in range(AT_ONCE_ROUNDS):
        floors.append(floor.rate(AT_ONCE))
        began = time.perf_counter()
        for number in range(AT_ONCE):
            spec = daemon.spec(["/bin/true"], workspace=workspace)
            client.send(Submit(client.number(), f"at-once-{workspace}-{round_number}-{number}", spec, wait=True))
        ended = 0
        while ended < AT_ONCE:
            if isinstance(client.receive(60.0), Ended):
                ended += 1
        daemon.wait_released()  # the floor's rate has the deletion in it too
        ours.append(AT_ONCE / (time.perf_counter() - began))
    what = WITH if workspace else "no workspace"
    return at_least(f"{AT_ONCE} at once, {what}", median(ours), median(floors), 0.6, "/s")


def memory(daemon: Daemon) -> Iterator[Row]:
    time.sleep(1.0)  # what the last tasks had is given back
    before = daemon.processes()
    idle_kib = sum(kib(pid, "Pss:") for pid in before)
    before_private_kib = sum(private_kib(pid) for pid in before)
    tasks = [daemon.submit(["/bin/sleep", "100"], workspace="bench", task=f"memory-{number}") for number in range(HELD)]
    for task in tasks:
        daemon.wait_pid(f"workspace mount {task}")  # it comes last
    time.sleep(1.0)
    more_kib = sum(private_kib(pid) for pid in daemon.processes()) - before_private_kib
    for task in tasks:
        daemon.command("stop", "--force", task)
    daemon.wait_released()
    yield within("private memory per running task", more_kib / HELD / 1024, 8, "MiB")
    yield within("idle daemon with its tree (PSS)", idle_kib / 1024, 120, "MiB")


def kib(pid: int, field: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(field))


def private_kib(pid: int) -> int:
    """Of a process of Aerie's or conmon's; a task's own do not count."""
    return kib(pid, "Private_Dirty:") + kib(pid, "Private_Clean:")
