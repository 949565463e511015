"""The benchmark: one table of work, floor, ours, ratio, goal, met or not.

Floor and ours take turns in one run, so that what else the machine does hits both; each figure is a median of many.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tabulate import tabulate

from actors.gateway.messages import Ended, Submit
from tests.actors.image.images import RunningRegistry
from tests.bench.floor import Floor
from tests.node.conftest import APPLETS, busybox_layer
from tests.node.daemon import PROGRAM, Daemon, running

FILES = 1000
AT_ONCE = 50


@dataclass(frozen=True)
class Row:
    """`better`: "less" or "more" than the goal; `ratio` is ours over the floor's, or over the goal's unit where there is no floor."""

    work: str
    floor: str
    ours: str
    ratio: float
    goal: str
    met: bool


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


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


def warm_task(daemon: Daemon, floor: Floor, rounds: int) -> Iterator[Row]:
    batch = Batch(daemon)
    figures: dict[str, list[float]] = {"floor": [], "with": [], "without": []}
    for number in range(rounds + 3):
        # What the floor's deletion leaves to the kernel must not be ours to wait for, nor the other way round.
        for name, run in (("floor", floor.run), ("with", lambda: batch.run("bench")), ("without", lambda: batch.run(None))):
            took_s = run()
            daemon.wait_released()
            if number >= 3:  # the first ones warm up
                figures[name].append(took_s * 1e3)
    batch.close()
    base = statistics.median(figures["floor"])
    for name, work, goal in (
        ("with", f"warm task, workspace of {FILES} files: median", 2.0),
        ("without", "warm task, no workspace: median", 2.0),
    ):
        ours = statistics.median(figures[name])
        yield Row(work, f"{base:.1f} ms", f"{ours:.1f} ms", ours / base, f"at most {goal} x", ours / base <= goal)
    ours = percentile(figures["with"], 0.95)
    yield Row(
        f"warm task, workspace of {FILES} files: p95",
        f"{base:.1f} ms",
        f"{ours:.1f} ms",
        ours / base,
        "at most 2.5 x",
        ours / base <= 2.5,
    )


def at_once(daemon: Daemon, floor: Floor, workspace: str | None, rounds: int, turn: str) -> Row:
    floors, ours = [], []
    for round_number in range(rounds):
        floors.append(floor.rate(AT_ONCE))
        client = daemon.client
        began = time.perf_counter()
        for number in range(AT_ONCE):
            spec = daemon.spec(["/bin/true"], workspace=workspace)
            client.send(Submit(client.number(), f"bench-{turn}-{round_number}-{number}", spec, wait=True))
        ended = 0
        while ended < AT_ONCE:
            answer = client.receive(60.0)
            if isinstance(answer, Ended):
                ended += 1
        daemon.wait_released()  # the floor's rate has the deletion in it too
        ours.append(AT_ONCE / (time.perf_counter() - began))
    base, rate = statistics.median(floors), statistics.median(ours)
    what = f"workspace of {FILES} files" if workspace else "no workspace"
    return Row(
        f"{AT_ONCE} at once, {what}", f"{base:.1f}/s", f"{rate:.1f}/s", rate / base, "at least 0.5 x", rate / base >= 0.5
    )


def memory(daemon: Daemon) -> Iterator[Row]:
    idle_kib = sum(kib(pid, "Pss:") for pid in daemon.processes())
    before = daemon.processes()
    before_private_kib = sum(private_kib(pid) for pid in before)
    tasks = [daemon.submit(["/bin/sleep", "100"], workspace="bench", task=f"memory-{number}") for number in range(8)]
    for task in tasks:
        while b'"running"' not in daemon.command("result", "--json", task).stdout:
            pass
    more_kib = sum(private_kib(pid) for pid in daemon.processes()) - before_private_kib
    for task in tasks:
        daemon.command("stop", "--force", task)
    daemon.wait_released()
    each_mib = more_kib / len(tasks) / 1024
    yield Row("private memory per running task", "", f"{each_mib:.1f} MiB", each_mib / 8, "at most 8 MiB", each_mib <= 8)
    idle_mib = idle_kib / 1024
    yield Row("idle daemon with its tree (PSS)", "", f"{idle_mib:.0f} MiB", idle_mib / 120, "at most 120 MiB", idle_mib <= 120)


def kib(pid: int, field: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(field))


def private_kib(pid: int) -> int:
    """Of a process of Aerie's or conmon's; a task's own do not count."""
    return kib(pid, "Private_Dirty:") + kib(pid, "Private_Clean:")


@contextmanager
def node() -> Iterator[tuple[Daemon, Floor]]:
    """A daemon, and the floor beside it on the same disk, both on the same root file system."""
    with tempfile.TemporaryDirectory(prefix="aerie-bench-", dir="/var/tmp") as name:
        home = Path(name)
        home.chmod(0o755)
        rootfs = home / "rootfs"
        for part in ("bin", "proc", "sys", "dev", "tmp", "etc"):
            (rootfs / part).mkdir(parents=True)
        (rootfs / "bin/busybox").write_bytes(Path("/bin/busybox").read_bytes())
        (rootfs / "bin/busybox").chmod(0o755)
        for applet in APPLETS.split():
            (rootfs / "bin" / applet).symlink_to("busybox")
        (home / "registry").mkdir()
        registry = RunningRegistry(home / "registry")
        try:
            repository = registry.repository("busybox")
            repository.push(busybox_layer(), tag="1", process={"Env": ["PATH=/bin"]})
            (home / "node").mkdir()
            with running(home / "node", repository.reference("1")) as daemon:
                store = daemon.state / "workspaces/bench"
                for number in range(FILES):
                    file = store / f"directory-{number // 100}" / f"file-{number}"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text(f"file {number}\n" * 20)
                for path in (store, *store.rglob("*")):
                    os.chown(path, 1000, 1000)
                yield daemon, Floor(rootfs, home / "floor")
        finally:
            registry.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure Aerie against the floor.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=40, help="of the warm task; the default is 40")
    arguments = parser.parse_args()
    with node() as (daemon, floor):
        daemon.run(["/bin/true"], workspace="bench")
        rows = [*warm_task(daemon, floor, arguments.rounds)]
        rows += [at_once(daemon, floor, None, 5, "plain"), at_once(daemon, floor, "bench", 5, "workspace")]
        rows += [*memory(daemon)]
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print(tabulate([(r.work, r.floor, r.ours, f"{r.ratio:.2f}", r.goal, "yes" if r.met else "NO") for r in rows],
                       headers=["work", "floor", "ours", "ratio", "goal", "met"]))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
