"""Supervisors: actors that start other actors, and start them again.

Children are independent of each other (one_for_one).  Static ones are started in their order, each when the one before has begun,
and stopped in the reverse order; others may be added later (`start_child`).  A child that keeps ending is paused for longer and
longer; more ends than the flags allow, and the supervisor ends itself, which is its own supervisor's to mend, and at the top the
keeper's: it starts the process anew.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loguru import logger

from supervisor.actor import Actor, Exited, Stop
from supervisor.restarts import Backoff, Window
from supervisor.spec import ChildSpec, Flags, Restart, check_children
from supervisor.system import System

__all__ = ["StartFailed", "Supervisor", "System"]


class StartFailed(Exception):
    """A child could not be started when its supervisor was."""


class TooManyRestarts(Exception):
    """Children ended more often than the flags allow."""


@dataclass
class Child:
    """A child as its supervisor sees it; `actor` is None while it is to be started again."""

    spec: ChildSpec
    backoff: Backoff
    actor: Actor | None = None
    generation: int = -1

    @property
    def restarts(self) -> int:
        return max(0, self.generation)


@dataclass(frozen=True)
class _StartAgain:
    id: str
    generation: int


class Supervisor(Actor):
    """Subclasses that handle messages of their own hand on the others to `super().on_message`."""

    def __init__(self, system: System, name: str, children: Sequence[ChildSpec] = (), flags: Flags | None = None) -> None:
        super().__init__(system, name)
        check_children(children)
        self.children: dict[str, Child] = {}
        self._flags = flags or Flags()
        self._window = Window(self._flags.intensity or 0, self._flags.period_s)
        self._specs = tuple(children)

    def on_begin(self) -> None:
        for spec in self._specs:
            self.system.expect(spec.id)
        for spec in self._specs:
            actor = self.start_child(spec).actor
            if actor is None:
                reason: str | None = "it could not be made"  # why was logged
            elif actor.begun.wait(self._flags.start_timeout_s):
                reason = actor.failed_to_begin
            else:
                reason = f"not begun after {self._flags.start_timeout_s:g} s"
            if reason is not None:
                raise StartFailed(f"{spec.id}: {reason}")  # `on_end` stops those that were started

    def on_message(self, message: Any) -> Any:
        match message:
            case Exited(name, generation, error):
                child = self.children.get(name)
                if child is not None and child.generation == generation:  # else of an incarnation that was replaced
                    self._exited(child, error)
            case _StartAgain(name, generation):
                child = self.children.get(name)
                if child is not None and child.actor is None and child.generation == generation:
                    self._launch(child)
        return None

    def on_end(self, reason: str | None) -> None:
        self._stop_children()

    def start_child(self, spec: ChildSpec) -> Child:
        """Start a child; one that there is already stays as it is.  It has not begun yet when this returns."""
        child = self.children.get(spec.id)
        if child is None:
            child = self.children[spec.id] = Child(spec, Backoff(self._flags.backoff_s, self._flags.period_s))
            self.system.expect(spec.id)
            self._launch(child)
        return child

    def snapshot(self) -> dict[str, Any]:
        """The tree from here down as data: name, kind, pid (None: this process's), state, restarts, children.  For any thread."""
        return {
            **_row(self.name, "supervisor", "running", 0),
            "children": [_snapshot(child) for child in list(self.children.values())],
        }

    def _launch(self, child: Child) -> None:
        child.generation += 1
        child.backoff = child.backoff.started(time.monotonic())
        try:
            actor = child.spec.start()
            actor.launch(child.generation, self.mailbox)
        except BaseException as error:  # noqa: BLE001 (a child that cannot even be made must not end its siblings)
            logger.opt(exception=error).error("{} could not be made", child.spec.id)
            self.mailbox(Exited(child.spec.id, child.generation, f"{type(error).__name__}: {error}"))
        else:
            child.actor = actor

    def _exited(self, child: Child, error: str | None) -> None:
        name, restart = child.spec.id, child.spec.restart
        child.actor = None
        if restart is Restart.TEMPORARY or (restart is Restart.TRANSIENT and error is None):
            del self.children[name]
            self.system.forget(name)
            return
        now = time.monotonic()
        self._window, too_many = self._window.add(now)
        if too_many and self._flags.intensity is not None:
            raise TooManyRestarts(
                f"more than {self._flags.intensity} in {self._flags.period_s:g} s; the last is {name} ({error})"
            )
        child.backoff, pause_s = child.backoff.ended(now)
        logger.warning("{} has ended ({}); it is started again in {:g} s", name, error or "normally", pause_s)
        self.after(pause_s, _StartAgain(name, child.generation))

    def _stop_children(self) -> None:
        """In the reverse order of their start.  A thread cannot be killed: one that does not end in time is left behind, and said so."""
        for child in reversed(list(self.children.values())):
            actor = child.actor
            if actor is not None:
                actor.mailbox(Stop())
                if not actor.gone.wait(child.spec.shutdown_s):
                    logger.error(
                        "{} has not ended within {} s of being told to; it is left behind", child.spec.id, child.spec.shutdown_s
                    )
            self.system.forget(child.spec.id)
        self.children.clear()
        for spec in self._specs:  # those whose turn never came, since one before them could not start
            self.system.forget(spec.id)


def _snapshot(child: Child) -> dict[str, Any]:
    actor = child.actor  # once: its supervisor may take it away meanwhile
    if isinstance(actor, Supervisor):
        return {**actor.snapshot(), "restarts": child.restarts}
    state = "restarting" if actor is None else "running" if actor.begun.is_set() else "starting"
    return _row(child.spec.id, "actor", state, child.restarts)


def _row(name: str, kind: str, state: str, restarts: int) -> dict[str, Any]:
    return {"name": name, "kind": kind, "pid": None, "state": state, "restarts": restarts, "children": []}
