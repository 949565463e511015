"""Container and conmon of one task, watched by the pidfds that are held, for the actor that owns the task.

Both belong to the keeper: an actor that is started again watches the same two.
"""

from __future__ import annotations

import os
import select
import signal
from enum import Enum, auto
from functools import partial
from typing import Any, Final

from loguru import logger

from actors.sandbox.attempt import STREAMS, held
from actors.services import Services
from supervisor.actor import Actor
from supervisor.pidfd import has_ended, is_stopped, pid_of, signal_process, wait_status
from supervisor.processes import ProcessRow

STOPPED_S = 2.0  # between two looks whether somebody has stopped a conmon
CONMON_ENDED: Final = ("ended", "conmon")


class Seen(Enum):
    CONTAINER_ENDED = auto()
    OUTPUT_WHOLE = auto()  # conmon has ended, and all that the task printed is in the journal
    PIPES_LEFT = auto()  # conmon was killed or gave up, and the pipes may hold something


class Watching:
    """The actor hands every message to `take`, calls the rest from its own thread, and `end`s this when it ends."""

    def __init__(self, actor: Actor, services: Services, task: str) -> None:
        self._actor = actor
        self._services = services
        self._task = task

    # --- what is held ---

    @property
    def container(self) -> int | None:
        """The container's pidfd, which is not the caller's."""
        return self._held("container")

    def copy(self) -> int:
        """A copy of the container's pidfd, for another thread to use and close: this one may be given up, and its number used again,
        before that thread comes to it.
        """
        assert self.container is not None
        return os.dup(self.container)

    @property
    def pid(self) -> int | None:
        """The container's, as long as it lives."""
        return None if self.container is None else pid_of(self.container)

    def status(self, known: int | None) -> int | None:
        """The container's wait status, None when nobody knows it; `known`: from elsewhere, for one that is not held."""
        return known if self.container is None else wait_status(self.container)

    def _held(self, kind: str) -> int | None:
        return self._services.descriptors.get(held(kind, self._task))

    # --- watching ---

    def begin(self) -> None:
        """Watch what there is."""
        mailbox = self._actor.mailbox
        for kind in ("container", "conmon"):
            if (pidfd := self._held(kind)) is not None:
                self._services.watcher.process(pidfd, partial(mailbox, ("ended", kind)))
                if kind == "conmon" and (pid := pid_of(pidfd)):
                    self._services.processes.put(self._actor.name, ProcessRow(f"conmon {self._task}", pid, 0))
                    self._actor.after(STOPPED_S, ("is conmon stopped",))

    def end(self) -> None:
        """The actor ends; the next one begins again."""
        for kind in ("container", "conmon"):
            if (pidfd := self._held(kind)) is not None:
                self._services.watcher.forget(pidfd)

    def forget(self) -> None:
        """They are to be removed."""
        self.end()
        self._hide_conmon()

    def take(self, message: Any) -> Seen | None:
        """What a message that arrived at the actor means for the two."""
        match message:
            case ("ended", "container"):
                return Seen.CONTAINER_ENDED
            case ("ended", "conmon"):
                return self._conmon_ended()
            case ("is conmon stopped",):
                self._check_conmon()
        return None

    # --- conmon ---

    def end_conmon(self, late_s: float) -> None:
        """It has not ended for so long after its container."""
        pidfd = self._held("conmon")
        if pidfd is not None and signal_process(pidfd, signal.SIGKILL):
            logger.warning("conmon of task {} did not end within {} s of its container", self._task, late_s)

    def _conmon_ended(self) -> Seen:
        """Its last output is in the journal, unless it was killed or gave up."""
        self._hide_conmon()
        pidfd = self._held("conmon")
        status = None if pidfd is None else wait_status(pidfd)
        if status is not None and os.WIFEXITED(status) and not self._pipes_hold_something():
            return Seen.OUTPUT_WHOLE
        logger.warning("conmon of task {} was killed; its pipes are taken over", self._task)
        return Seen.PIPES_LEFT

    def _pipes_hold_something(self) -> bool:
        waiting = select.poll()
        for stream in STREAMS:
            if (end := self._held(stream)) is not None:
                waiting.register(end, select.POLLIN)
        return any(event & select.POLLIN for _, event in waiting.poll(0))

    def _check_conmon(self) -> None:
        """A monitor that somebody has stopped goes on: it cannot be replaced without a loss, and soon its task waits in write(2)."""
        pidfd = self._held("conmon")
        if pidfd is None or has_ended(pidfd):
            return
        if is_stopped(pidfd) and signal_process(pidfd, signal.SIGCONT):
            logger.warning("conmon of task {} had been stopped; it is told to go on", self._task)
        self._actor.after(STOPPED_S, ("is conmon stopped",))

    def _hide_conmon(self) -> None:
        self._services.processes.remove(self._actor.name, f"conmon {self._task}")
