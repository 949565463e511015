"""What a death costs: how soon tasks can be asked about again, and what a thousand of them leave behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from actors.gateway.client import Client
from actors.gateway.messages import Wait
from actors.layout import Layout
from supervisor.lockfile import holder_of
from supervisor.parts import RESET_S
from tests.bench.site import Site
from tests.bench.table import Row, median, within
from tests.bench.tasks import private_kib
from tests.node.daemon import Daemon
from tests.supervisor.restarting import measure

RUNNING = 50  # tasks
DEATHS = 5
RESTARTS, WARM_UP = 1000, 50


def rows(site: Site) -> Iterator[Row]:
    yield from deaths(site, site.daemon)
    yield from restarts(site, site.daemon)
    yield from actors(site)


def deaths(site: Site, daemon: Daemon) -> Iterator[Row]:
    """SIGKILL, until every running task has been asked about and answered for."""
    tasks = [daemon.submit(["/bin/sleep", "1000"], task=f"running-{number}") for number in range(RUNNING)]
    for task in tasks:
        while b'"running"' not in daemon.command("result", "--json", task).stdout:
            time.sleep(0.05)
    for name, bound_s in (("root supervisor", 1.0), ("keeper", 0.5)):
        took = []
        for number in range(DEATHS):
            site.say(f"{name} killed, {number + 1} of {DEATHS}")
            # One death, and not one of a row, between which the keeper makes pauses.
            time.sleep(RESET_S + 0.5 if name == "root supervisor" else 1.0)
            pid = daemon.wait_pid(name)
            daemon.close_client()
            began = time.perf_counter()
            os.kill(pid, signal.SIGKILL)
            ask(daemon, tasks)
            while name == "keeper" and daemon.tree()["pid"] in (None, pid):
                time.sleep(0.001)
            took.append(time.perf_counter() - began)
        yield within(f"{name} killed, until {RUNNING} running tasks are answered for", median(took), bound_s, "s")
    daemon.start()  # the keeper again, in the stand-in's place
    for task in tasks:
        daemon.command("stop", "--force", task)
    daemon.wait_released()


def ask(daemon: Daemon, tasks: list[str]) -> None:
    client = Client(daemon.run_dir)
    for task in tasks:
        client.ask(Wait(client.number(), task, 0.0), timeout_s=30)
    client.close()


def restarts(site: Site, daemon: Daemon) -> Iterator[Row]:
    """The server of one workspace killed again and again: what is left of it in the two that hold and restart it."""
    task = daemon.submit(["/bin/sleep", "1000"], workspace="bench")
    first = daemon.wait_pid(f"workspace mount {task}")
    lock = Layout(daemon.state, daemon.run_dir).served / f"{task}.lock"  # its holder serves
    lazy = daemon.run_dir / "tasks" / task / "lazy/00"
    holders = {name: daemon.pid_of(name) for name in ("root supervisor", "keeper")}
    before: dict[str, tuple[float, int, int]] = {}
    pid = first
    for number in range(WARM_UP + RESTARTS):
        if number % 200 == 0:
            site.say(f"{number} of {WARM_UP + RESTARTS} restarts")
        if number == WARM_UP:
            before = {holder: look(holders[holder]) for holder in holders}
        os.kill(pid, signal.SIGKILL)
        answered(lazy / f"{number:062x}")
        while (successor := holder_of(lock)) in (None, 0, pid):
            time.sleep(0.001)
        pid = successor
    time.sleep(2.0)
    after = {holder: look(holders[holder]) for holder in holders}
    daemon.command("stop", "--force", task)
    daemon.wait_released()
    for holder in holders:
        memory, descriptors, threads = (late - early for late, early in zip(after[holder], before[holder], strict=True))
        yield within(f"{RESTARTS} restarts: memory more in the {holder}", memory, 1, "MiB")
        work = f"{RESTARTS} restarts: descriptors and threads more in the {holder}"
        yield Row(work, "", f"{descriptors}, {threads}", 0.0, "0, 0", (descriptors, threads) == (0, 0))


def actors(site: Site) -> Iterator[Row]:
    """An actor, and a group of three, restarted by supervisors in a process of their own."""
    left = measure(RESTARTS, site.home)
    yield within(f"{RESTARTS} restarts of actors: memory more", left["memory_mib"], 1, "MiB")
    more = (left["descriptors"], left["threads"])
    work = f"{RESTARTS} restarts of actors: descriptors and threads more"
    yield Row(work, "", f"{more[0]}, {more[1]}", 0.0, "0, 0", more == (0, 0))


def answered(path: Path) -> None:
    """Wait for a server: of a name that the kernel has not heard of yet, nobody else knows that there is no such object."""
    signal.alarm(30)  # whose default is the end of this process
    try:
        path.stat()
    except FileNotFoundError:
        pass
    finally:
        signal.alarm(0)


def look(pid: int) -> tuple[float, int, int]:
    """Private memory in MiB, open descriptors, threads."""
    threads = len(os.listdir(f"/proc/{pid}/task"))
    return private_kib(pid) / 1024, len(list(Path(f"/proc/{pid}/fd").iterdir())), threads
