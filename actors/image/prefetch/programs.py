"""The programs with which the tasks of one mounted image begin: what each reads at its start is read ahead of it, once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from actors.image import wire
from actors.image.prefetch.line import PREFETCHER, Line
from actors.image.prefetch.program import DEFAULT_PATH
from actors.services import Services
from supervisor.actor import Actor
from supervisor.frames import Codec
from supervisor.isolation import Process
from supervisor.worker import Ended

SAYS = Codec(wire.ReadProgram)  # nothing
PROGRAMS_MAX = 64  # of one mount: an image has a few, and some send tasks that have a name each


class Programs:
    """Of the image whose layers are `lower` and `data`, and whose environment is `env`.

    For the actor's own thread; when it is over, somebody must `let_go`.
    """

    def __init__(
        self, actor: Actor, services: Services, name: str, lower: str, data: Sequence[str], env: Sequence[str]
    ) -> None:
        self._services = services
        self._lower, self._data = lower, list(data)
        paths = [entry.removeprefix("PATH=") for entry in env if entry.startswith("PATH=")]
        self._path = paths[-1] if paths else DEFAULT_PATH
        self._line = Line(actor, services, f"programs of {name}", self._start)
        self._read: set[str] = set()

    def read(self, program: str) -> None:
        """A task is about to begin with it."""
        if program not in self._read and len(self._read) < PROGRAMS_MAX:
            self._read.add(program)
            self._line.add(program)

    def take(self, message: Any) -> None:
        """A message has arrived at the actor."""
        if isinstance(self._line.take(message), Ended):
            self._line.ended()

    def let_go(self) -> None:
        self._line.let_go()

    def _start(self, program: str) -> Process:
        sandbox = self._services.settings.sandbox
        order = wire.ReadProgram(self._lower, self._data, program, self._path, sandbox.uid, sandbox.gid)
        return self._services.isolation.start(PREFETCHER, "actors.image.prefetch.starting:read_program", order, SAYS)
