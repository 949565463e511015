"""What every test of the supervision gets: a system of actors that ends with it, and a look at what it has left behind."""

from __future__ import annotations

import gc
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loguru import logger

from supervisor.actor import Stop
from supervisor.isolation import Isolation, Process
from supervisor.system import System
from supervisor.watch import Watcher
from tests.supervisor.actors_under_test import TIMEOUT_S
from tests.supervisor.bosses import Boss, Bosses
from tests.supervisor.daemons_under_test import Daemon
from tests.supervisor.descendants import become_subreaper, descendants, ends, kill, reap
from tests.supervisor.processes_under_test import FROM_CHILD, Say
from tests.supervisor.programs_under_test import ENTRIES, argv

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails a test that leaves a process, a thread or a descriptor."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    threads, descriptors = set(threading.enumerate()), opened()
    before = set(descendants())  # a registry that other tests share, for instance
    become_subreaper(True)  # so that orphans below are seen, and reaped, here
    yield
    left = [pid for pid in descendants() if pid not in before and not ends(pid, 60)]
    for pid in left:
        kill(pid)
    become_subreaper(False)
    reap()
    assert not left
    for thread in set(threading.enumerate()) - threads:
        thread.join(60)
        assert not thread.is_alive(), thread
    if opened() - descriptors:
        gc.collect()  # what a failed assertion, for instance, still refers to
    assert opened() <= descriptors


@pytest.fixture
def system() -> Iterator[System]:
    system = System()
    yield system
    system.close()


@pytest.fixture
def watcher() -> Iterator[Watcher]:
    watcher = Watcher()
    watcher.start()
    yield watcher
    watcher.stop()


@pytest.fixture
def fork_server(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A fork server in the test's directory, which listens; what it and its children print is in `log`."""
    with open(tmp_path / "log", "ab") as log:
        server = subprocess.Popen(argv("fork-server", tmp_path), stdin=subprocess.DEVNULL, stderr=log)
    try:
        # However long that takes on this machine: who asks it has a time-out of the product's.
        deadline = time.monotonic() + TIMEOUT_S
        while not (tmp_path / "forkserver.sock").exists():
            assert time.monotonic() < deadline and server.poll() is None
            time.sleep(0.002)
        yield server
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def bosses(system: System, watcher: Watcher, tmp_path: Path, fork_server: object, logged: list[str]) -> Iterator[Bosses]:
    isolation, started = Isolation(str(tmp_path / "forkserver.sock")), []

    def start(entry: str, text: str = "hello", *, make: Any = None, **options: Any) -> Boss:
        def fork() -> Process:
            return isolation.start("worker", f"{ENTRIES}:{entry}", Say(text), FROM_CHILD)

        boss = Boss(system, watcher, (lambda: make(fork)) if make else fork, **options)
        started.append(boss)
        boss.launch(0, None)
        return boss

    yield start
    for boss in started:
        boss.mailbox(Stop())
        assert boss.gone.wait(TIMEOUT_S)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path)
    yield daemon
    daemon.end()


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """The text of what is logged, instead of on stderr."""
    texts: list[str] = []
    logger.remove()
    number = logger.add(lambda message: texts.append(message.record["message"]))
    yield texts
    logger.remove(number)


def opened() -> set[str]:
    descriptors = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            descriptors[name] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            pass  # the one that listed them
    return {f"{name} {target}" for name, target in descriptors.items()}
