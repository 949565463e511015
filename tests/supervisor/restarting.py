"""What a thousand restarts leave behind, in a process of their own: `measure`, for a test and for `make bench`.

python -m tests.supervisor.restarting COUNT DIRECTORY      prints one JSON object
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from loguru import logger

from supervisor.actor import Actor, Stop
from supervisor.events import EventLog
from supervisor.spec import ChildSpec, Flags
from supervisor.strategy import Strategy
from supervisor.system import System
from supervisor.tree import Supervisor

ROOT = Path(__file__).resolve().parents[2]
WARM_UP = 200  # what is made once is made, and the allocator has what it needs
TIMEOUT_S = 60.0


def measure(count: int, directory: Path) -> dict[str, float]:
    """Restart an actor, and then a group of three, `count` times each → memory_mib, descriptors, threads: how many there are more."""
    argv = [sys.executable, "-m", "tests.supervisor.restarting", str(count), str(directory)]
    done = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, check=True, timeout=300)
    found: dict[str, float] = json.loads(done.stdout)
    return found


class Fragile(Actor):
    """Crashes at every message but a question, which it answers with itself."""

    def on_message(self, message: Any) -> Any:
        if message == "who are you?":
            return self.generation, threading.current_thread()
        raise ValueError(message)


class Restarts:
    def __init__(self, directory: Path) -> None:
        self._log = EventLog(directory / "events", size_bytes_max=64 << 10)
        self._system = System(self._log.append)
        flags = Flags(intensity=None, backoff_s=(0.0,))
        group = Flags(intensity=None, backoff_s=(0.0,), strategy=Strategy.ONE_FOR_ALL)
        self._tops = [
            Supervisor(self._system, "alone", [self._spec("a")], flags),
            Supervisor(self._system, "together", [self._spec(name) for name in "bcd"], group),
        ]
        for top in self._tops:
            top.launch(next(self._system.generations), None)
            assert top.begun.wait(TIMEOUT_S)

    def _spec(self, name: str) -> ChildSpec:
        return ChildSpec(name, lambda: Fragile(self._system, name))

    def restart(self, count: int) -> None:
        for name in ("a", "d"):  # the last of its group to start: when it is there again, all are
            for number in range(count):
                before, _ = self._system.ask(name, "who are you?", TIMEOUT_S)
                self._system.tell(name, f"crash {number}")
                while self._system.ask(name, "who are you?", TIMEOUT_S)[0] == before:
                    pass  # it was asked before it had crashed

    def look(self) -> tuple[int, int, int]:
        """Private memory in KiB, descriptors, threads, when those that have ended are gone."""
        alive = {self._system.ask(name, "who are you?", TIMEOUT_S)[1] for name in "abcd"}
        for thread in threading.enumerate():
            if thread.name.startswith("Fragile") and thread not in alive:
                thread.join(TIMEOUT_S)
        gc.collect()
        rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()
        private_kib = sum(int(line.split()[1]) for line in rollup if line.startswith("Private_"))
        return private_kib, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    def end(self) -> None:
        for top in self._tops:
            top.mailbox(Stop())
            assert top.gone.wait(TIMEOUT_S)
        self._system.close()
        self._log.close()


def main(count: int, directory: Path) -> None:
    logger.remove()  # thousands of tracebacks
    restarts = Restarts(directory)
    restarts.restart(WARM_UP)
    before = restarts.look()
    restarts.restart(count)
    memory_kib, descriptors, threads = (late - early for late, early in zip(restarts.look(), before, strict=True))
    restarts.end()
    print(json.dumps({"memory_mib": memory_kib / 1024, "descriptors": descriptors, "threads": threads}))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
