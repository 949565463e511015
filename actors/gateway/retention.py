"""How long results and logs are kept: a time, a number of results, and bytes of logs, whichever is reached first."""

from __future__ import annotations

import os
import time

from loguru import logger

from actors.gateway.ledger import Ledger
from actors.services import Services


class Retention:
    def __init__(self, services: Services) -> None:
        self._services = services
        self._log_bytes: dict[str, int] = {}  # of ended tasks, which do not grow any more

    def expired(self, ledger: Ledger) -> list[str]:
        """The tasks to forget now, oldest first."""
        settings = self._services.settings.gateway
        expired = ledger.expired(time.time(), settings.results_keep_s, settings.results_max)
        ended = [task.task for task in ledger.tasks.values() if task.result.ended and not task.running]
        for task in ended:
            if task not in self._log_bytes:
                self._log_bytes[task] = self._size(task)
        total = sum(self._log_bytes[task] for task in ended)
        for task in ended:
            if total <= settings.logs_bytes_max:
                break
            total -= self._log_bytes[task]
            if task not in expired:
                expired.append(task)
        for task in expired:
            self._log_bytes.pop(task, None)
        return expired

    def remove(self, tasks: list[str]) -> None:
        """Remove the tasks' rows, then their directories; one that is left by a kill in between is cleared at the next start."""
        store = self._services.store
        store.write(
            *[("DELETE FROM tasks WHERE task = ?", (task,)) for task in tasks],
            *[("DELETE FROM positions WHERE task = ?", (task,)) for task in tasks],
        ).result()
        for task in tasks:
            self._services.removal.remove(self._services.layout.task(task).durable)
        logger.info("{} tasks have reached their retention and are forgotten", len(tasks))

    def _size(self, task: str) -> int:
        directory = self._services.layout.task(task).output
        try:
            return sum(entry.stat().st_size for entry in os.scandir(directory))
        except OSError:
            return 0
