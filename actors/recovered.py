"""What a daemon that starts found and did: one line in its log, when all of it is known."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable
from typing import Literal

from loguru import logger

How = Literal["adopted", "finished", "begun anew", "lost"]


class Recovered:
    """The account of a start.  Thread-safe.

    A task is *adopted* when it is alive, *finished* when it had ended and only its result or what it had was to be seen to, *begun
    anew* when nothing of its own can have run, *lost* when nobody can know; *queued* tasks wait as before.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._began_s = time.monotonic()
        self._awaited: set[str] = set()
        self._queued = 0
        self._begun = False
        self._tasks: Counter[str] = Counter()
        self._cleaned: Counter[str] = Counter()

    def cleaned(self, kind: str, count: int = 1) -> None:
        """`count` orphans of a kind ("mount", "process", "control group", "directory" …) are removed."""
        with self._lock:
            self._cleaned[kind] += count

    def await_tasks(self, tasks: Iterable[str], queued: int) -> None:
        """These tasks are to be looked at."""
        with self._lock:
            self._awaited, self._queued = set(tasks), queued

    def found(self, task: str, how: How) -> None:
        """A task was looked at; one that nobody awaits is a new one, or was looked at already."""
        with self._lock:
            if task in self._awaited:
                self._awaited.discard(task)
                self._tasks[how] += 1
                self._say_when_known()

    def begun(self) -> None:
        """All of the tree has begun."""
        with self._lock:
            self._begun = True
            self._say_when_known()

    def _say_when_known(self) -> None:
        if self._begun and not self._awaited:
            logger.info("recovered in {:.2f} s: {}", time.monotonic() - self._began_s, self.line())

    def line(self) -> str:
        tasks = {how: self._tasks[how] for how in ("adopted", "finished", "begun anew", "lost")} | {"queued": self._queued}
        shown = ", ".join(f"{count} {how}" for how, count in tasks.items())
        away = ", ".join(f"{count} {plural(kind, count)}" for kind, count in sorted(self._cleaned.items()) if count)
        return f"tasks: {shown}; cleaned away: {away or 'nothing'}"


def plural(noun: str, count: int) -> str:
    return (
        noun if count == 1 else f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}es" if noun.endswith("s") else f"{noun}s"
    )
