"""The tasks that the node knows, and the rules of the queue: pure, no I/O.

A task is *queued* until one of `parallel` places is free, *running* until its result is recorded and everything it had is given
back, and *kept* afterwards for as long as the retention allows.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from actors.gateway.messages import TaskResult, TaskSpec


@dataclass
class Task:
    """One task as the gateway sees it.  `spec` is forgotten when it has ended (the store has it)."""

    task: str
    spec: TaskSpec
    result: TaskResult
    number: int
    running: bool = False
    waiting: list[tuple[int, int]] = field(default_factory=list)  # (client, request) to be told of the end
    watching: list[tuple[int, int]] = field(default_factory=list)  # to be shown progress


class QueueFull(Exception):
    """As many tasks wait as may; the text says how many."""


class Ledger:
    """Every task known, in the order of acceptance."""

    def __init__(self, parallel: int, queue_max: int) -> None:
        self.tasks: OrderedDict[str, Task] = OrderedDict()
        self._parallel = parallel
        self._queue_max = queue_max
        self._queue: deque[str] = deque()
        self._running: set[str] = set()
        self._next_number = 1

    def next_number(self) -> int:
        self._next_number += 1
        return self._next_number - 1

    def check_room(self) -> None:
        """Raises QueueFull."""
        if len(self._queue) >= self._queue_max and len(self._running) >= self._parallel:
            raise QueueFull(f"{len(self._queue)} tasks wait already, which is the bound (gateway.queue); try again later")

    def add(self, task: Task) -> None:
        """Know a task: a new one, or one found in the store."""
        self.tasks[task.task] = task
        self._next_number = max(self._next_number, task.number + 1)
        if task.running:
            self._running.add(task.task)
        elif not task.result.ended:
            self._queue.append(task.task)

    def admit(self) -> list[Task]:
        """Take from the queue what there is room for."""
        admitted = []
        while self._queue and len(self._running) < self._parallel:
            task = self.tasks[self._queue.popleft()]
            task.running = True
            self._running.add(task.task)
            admitted.append(task)
        return admitted

    def withdraw(self, task: str) -> bool:
        """Take a task out of the queue; False when it is not in it (any more)."""
        if task not in self._queue:
            return False
        self._queue.remove(task)
        return True

    def released(self, task: str) -> None:
        """All that a task had is given back: its place is free."""
        self._running.discard(task)
        if task in self.tasks:
            self.tasks[task].running = False

    @property
    def running(self) -> frozenset[str]:
        return frozenset(self._running)

    @property
    def queued(self) -> int:
        return len(self._queue)

    def expired(self, now_s: float, keep_s: float, results_max: int) -> list[str]:
        """Ended tasks that are older than `keep_s`, or too many; oldest first."""
        ended = [task for task in self.tasks.values() if task.result.ended and not task.running]
        surplus = len(ended) - results_max
        return [
            task.task
            for order, task in enumerate(ended)
            if order < surplus or now_s - timestamp(task.result.finished_at or task.result.created_at) > keep_s
        ]

    def forget(self, tasks: Iterable[str]) -> None:
        for task in tasks:
            self.tasks.pop(task, None)


def rfc3339(moment_s: float) -> str:
    """Seconds since 1970 as INTERFACE shows times: UTC, to the microsecond."""
    return datetime.fromtimestamp(moment_s, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def timestamp(text: str) -> float:
    """`rfc3339`, back."""
    return datetime.fromisoformat(text).timestamp()
