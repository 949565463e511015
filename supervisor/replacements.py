"""What a keeper has replaced, until the root supervisor has written it down: the keeper itself writes to no disk but its log."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from supervisor.keeping import Replaced

WAITING_MAX = 1000  # of those that nobody has noted; then the oldest are lost


@dataclass(frozen=True, slots=True)
class Gone:
    """A process that has ended.  `code`: its exit code, negative after a signal; None when nobody can know it."""

    pid: int
    code: int | None
    hung: bool


class Replacements:
    """`tell`: tells the root supervisor, if there is one that wants to know."""

    def __init__(self, tell: Callable[[Replaced], None]) -> None:
        self._tell = tell
        self._count = 0
        self._waiting: deque[Replaced] = deque(maxlen=WAITING_MAX)

    def add(self, process: str, pid: int, gone: Gone) -> None:
        """`pid` is the process of that name now, in place of the one that is gone."""
        self._count += 1
        replaced = Replaced(self._count, process, pid, gone.pid, gone.code, gone.hung, time.time())
        self._waiting.append(replaced)
        self._tell(replaced)

    def tell_again(self) -> None:
        """There is another root supervisor."""
        for replaced in self._waiting:
            self._tell(replaced)

    def noted(self, number: int) -> None:
        """It is written down.  One before it may not be: a root supervisor that did not listen just then is told of it after `Hello`."""
        self._waiting = deque((replaced for replaced in self._waiting if replaced.number != number), WAITING_MAX)
