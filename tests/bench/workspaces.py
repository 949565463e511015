"""A store of 100,000 entries: how long its task waits for it, the first time and the second."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from actors.gateway.messages import Ended, Submit
from tests.bench.site import Site
from tests.bench.table import Row, within
from tests.node.daemon import Daemon

ENTRIES = 100_000
FILES_IN_DIRECTORY = 99
FIRST_GOAL_S, SECOND_GOAL_S = 4.0, 1.5


@dataclass
class LargeStore:
    """Seconds that a task takes more with it than with an empty workspace: listed, built and mounted; one figure a round.

    `first_s`: never seen before, its names and inodes in the kernel's caches.  `second_s`: not changed since.
    """

    first_s: list[float] = field(default_factory=list)
    second_s: list[float] = field(default_factory=list)


def large_store(daemon: Daemon, rounds: int = 3, entries: int = ENTRIES) -> LargeStore:
    """Measure with a daemon that is idle."""
    found = LargeStore()
    stores = daemon.state / "workspaces"
    store = _make(stores / "large", entries)
    empty_s = statistics.median(_task_s(daemon, "bench-empty") for _ in range(5))
    for number in range(rounds):
        # Under another name it is another store: objects, META and table are made anew.
        store = store.rename(stores / f"large-{number}")
        found.first_s.append(_task_s(daemon, store.name) - empty_s)
        found.second_s.append(_task_s(daemon, store.name) - empty_s)
    return found


def _make(store: Path, entries: int) -> Path:
    """Directories of about a hundred small files, some of them deeper than others."""
    made = 0
    while made < entries:
        directory = store / f"{made // 10_000:02}" / f"{made // 100:04}"
        directory.mkdir(parents=True)
        for number in range(min(FILES_IN_DIRECTORY, entries - made)):
            (directory / f"file-{number}.txt").write_bytes(b"x" * (number * 20))
        made += FILES_IN_DIRECTORY + 1
    for path in (store, *store.rglob("*")):
        os.chown(path, 1000, 1000)
    return store


def _task_s(daemon: Daemon, workspace: str) -> float:
    """A task that does nothing, from its submission to its result."""
    client = daemon.client
    began = time.perf_counter()
    task = f"{workspace}-{time.monotonic_ns()}"
    client.send(Submit(client.number(), task, daemon.spec(["/bin/true"], workspace=workspace), wait=True))
    while not isinstance(answer := client.receive(120.0), Ended):
        pass
    took_s = time.perf_counter() - began
    if answer.result.exit_code != 0:
        raise RuntimeError(answer.result)
    daemon.wait_released()
    return took_s


def rows(site: Site) -> Iterator[Row]:
    site.say(f"a workspace of {ENTRIES} entries")
    found = large_store(site.daemon)
    what = f"workspace of {ENTRIES} entries listed, built and mounted"
    yield within(f"{what}: first", statistics.median(found.first_s), FIRST_GOAL_S, "s")
    yield within(f"{what}: again", statistics.median(found.second_s), SECOND_GOAL_S, "s")
