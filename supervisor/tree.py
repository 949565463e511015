"""Supervisors: actors that start other actors, and start them again.

Here nothing is decided: `supervision` is the rule book.  What happens to the children goes in, what is to be done comes out and is
done.  A supervisor is started when all its children have begun, and has ended when all of them have; however it ends, they are
stopped in the reverse of their order.  One that gives up is its own supervisor's to mend, and at the top the keeper's: it starts the
process anew.

A child that hangs cannot be killed, for it is a thread.  It is left behind (`Actor.leave_behind`), and whoever made the System is told.
"""

from __future__ import annotations

import faulthandler
import queue
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from loguru import logger

from supervisor.actor import Actor, Stop
from supervisor.answers import Deferred, Vital
from supervisor.children import Child
from supervisor.events import Event, shortened
from supervisor.exits import Begun, Cause, Exit, Exited
from supervisor.rules import (
    Begin,
    Call,
    Down,
    Effect,
    End,
    EnsureChild,
    Expect,
    Forget,
    Hung,
    Kill,
    Launch,
    Phase,
    Refuse,
    Reply,
    Report,
    Request,
    State,
    Tell,
    Tick,
    Up,
    Wake,
    What,
)
from supervisor.rules import Event as Happening
from supervisor.spec import ChildSpec, Flags, SpecError, Type, check_children
from supervisor.supervision import Supervision
from supervisor.system import System

__all__ = ["StartFailed", "Supervisor", "System"]

STDERR: Final = 2
LOOKS: Final = 2  # at a child in the time that a message may take; one more with the same message before it, and it hangs


class StartFailed(Exception):
    """A child could not be started when its supervisor was."""


class _Heard(Vital):
    """There is something of a child's, or of its own timers', to be handled."""


@dataclass(frozen=True)
class _Look(Vital):
    """Look whether a child still has the same message before it; so it had `times` times."""

    id: str
    generation: int
    due: int
    times: int


class Supervisor(Actor):
    """Subclasses that handle messages of their own hand on the others to `super().on_message`, and return what it returns.

    Every request of `rules` (StartChild, WhichChildren…) is a message that anybody may ask a supervisor.
    """

    def __init__(self, system: System, name: str, children: Sequence[ChildSpec] = (), flags: Flags | None = None) -> None:
        super().__init__(system, name)
        self.__rules = Supervision(children, flags, system.generations)
        self.__actors: dict[str, Actor] = {}
        self.__heard: queue.SimpleQueue[Begun | Exited | Tick | _Look] = queue.SimpleQueue()
        self.__up = Deferred()

    @property
    def children(self) -> Mapping[str, Child]:
        """What is known of each child, in the order of their start."""
        return self.__rules.children

    def on_begin(self) -> Deferred:
        self.__happens(Begin())
        return self.__up

    def on_message(self, message: Any) -> Any:
        match message:
            case _Heard():
                self.__hear()
            case _ if isinstance(message, Request):
                return self.call(message)
        return None

    def on_end(self, reason: str | None) -> None:
        self.__happens(End(Exit(Cause.SHUTDOWN, reason or "")))
        while self.__rules.phase is not Phase.ENDED:
            self.__hear()

    def mailbox(self, message: Any) -> None:
        # Kept apart: an actor that ends reads its inbox no more, and its children still have to be heard.
        if isinstance(message, Begun | Exited | Tick | _Look):
            self.__heard.put(message)
            message = _Heard()
        super().mailbox(message)

    def call(self, request: Request) -> Deferred:
        """Make an administrative request of this supervisor; for subclasses."""
        answer = self.deferred()
        self.__happens(Call(request, answer))
        return answer

    def ensure_child(self, spec: ChildSpec) -> None:
        """See to it that there is such a child (`rules.EnsureChild`).  It has not begun yet when this returns.  Raises SpecError."""
        check_children([spec], self.__rules.flags)
        self.call(EnsureChild(spec))

    def snapshot(self) -> dict[str, Any]:
        """The tree from here down as data: name, kind, pid (None: this process's), state, restarts, children.  For any thread."""
        rows = []
        for child in list(self.children.values()):
            actor = self.__actors.get(child.spec.id)  # its supervisor may take it away meanwhile
            kind = "supervisor" if child.spec.type is Type.SUPERVISOR else "actor"
            row = actor.snapshot() if isinstance(actor, Supervisor) else _row(child.spec.id, kind)
            rows.append({**row, "state": _shown(child, actor), "restarts": child.restarts})
        return {**_row(self.name, "supervisor"), "children": rows}

    # --- doing what the rule book says ---

    def __hear(self) -> None:
        event = self.__heard.get()
        if isinstance(event, _Look):
            self.__look(event)
        else:
            self.__happens(event)

    def __happens(self, event: Happening) -> None:
        if isinstance(event, Exited) and (actor := self.__actors.get(event.id)) and actor.generation == event.generation:
            del self.__actors[event.id]
        for effect in self.__rules.handle(event, time.monotonic()):
            self.__do(effect)

    def __do(self, effect: Effect) -> None:
        match effect:
            case Launch(spec, generation):
                self.__launch(spec, generation)
            case Tell(id):
                self.__actors[id].mailbox(Stop())
            case Kill():
                self.__kill(effect)
            case Wake(due_s):
                self.after(max(0.0, due_s - time.monotonic()), Tick(due_s))
            case Expect(id):
                self.system.expect(id)
            case Forget(id):
                self.system.forget(id)
            case Reply(asker, value):
                asker.set(value)
            case Refuse(asker, text):
                asker.set_exception(ValueError(text))
            case Up():
                self.__up.set(None)
            case Down(exit):
                if self.begun.is_set():
                    self.finish(exit)
                else:
                    self.__up.set_exception(StartFailed(exit.text))
            case Report():
                self.__report(effect)

    def __launch(self, spec: ChildSpec, generation: int) -> None:
        try:
            actor = spec.start()
            if actor.name != spec.id:
                raise SpecError(f"child {spec.id}: start made {actor.name}")
            self.__actors[spec.id] = actor
            actor.launch(generation, self.mailbox)
        except BaseException as error:  # noqa: BLE001 (a child that cannot even be made must not end its siblings)
            logger.opt(exception=error).error("{} could not be made", spec.id)
            self.mailbox(Exited(spec.id, generation, Exit(Cause.START, f"{type(error).__name__}: {error}")))
        else:
            if spec.progress_s is not None:
                self.after(spec.progress_s / LOOKS, _Look(spec.id, generation, 0, 0))

    def __kill(self, kill: Kill) -> None:
        self.__actors[kill.id].leave_behind()
        self.mailbox(Exited(kill.id, kill.generation, Exit(Cause.KILLED, kill.why or "killed")))
        if kill.why is None:
            return  # as its spec wants it: it ends with the message in hand
        logger.error("{} {}; it is left behind", kill.id, kill.why)
        if self.__rules.phase is not Phase.ENDING:
            self.system.left_behind(kill.id)

    def __look(self, look: _Look) -> None:
        """Looked at again and again: after this whole process was stopped for a while, a single look would find all of them hung."""
        child, actor = self.children.get(look.id), self.__actors.get(look.id)
        if child is None or actor is None or child.generation != look.generation or child.spec.progress_s is None:
            return
        if child.state not in (State.STARTING, State.RUNNING):
            return  # it has a time to end in
        due = actor.due
        times = look.times + 1 if due and due == look.due else 0
        if times < LOOKS:
            self.after(child.spec.progress_s / LOOKS, _Look(look.id, look.generation, due, times))
            return
        faulthandler.dump_traceback(STDERR)  # of all threads: who holds what it waits for is there too
        self.__happens(Hung(look.id, look.generation, f"makes no progress for {child.spec.progress_s:g} s"))

    def __report(self, report: Report) -> None:
        exit = Exit(report.exit.cause, shortened(str(report.exit)))
        _log(Report(report.what, report.id, report.generation, exit, report.pause_s))
        self.system.events(
            Event(
                time.time(),
                self.name,
                report.id,
                report.generation,
                report.what.value,
                exit.cause.value,
                exit.text,
                report.pause_s,
            )
        )


def _log(report: Report) -> None:
    match report:
        case Report(What.STARTED) | Report(What.HUNG) | Report(What.SHUTDOWN_ERROR, exit=Exit(Cause.KILLED)):
            pass  # nothing to mend; the others are said when it is left behind
        case Report(What.ENDED | What.START_FAILED, pause_s=float()):
            logger.warning("{} has ended ({}); it is started again in {:.3g} s", report.id, report.exit, report.pause_s)
        case Report(What.ENDED, exit=exit) if exit.good:
            pass
        case Report(What.AUTO_SHUTDOWN):
            logger.info("{} has ended, and is significant: its supervisor ends", report.id)
        case _:
            logger.error("{}: {} ({})", report.id, report.what.value, report.exit)


def _shown(child: Child, actor: Actor | None) -> str:
    if child.state is State.RESTARTING and not child.launches:
        return State.STARTING.value
    if child.state is State.STARTING and actor is not None and actor.begun.is_set():
        return State.RUNNING.value  # which its supervisor has not heard yet
    return State.STOPPING.value if child.state is State.KILLING else child.state.value


def _row(name: str, kind: str) -> dict[str, Any]:
    return {"name": name, "kind": kind, "pid": None, "state": "running", "restarts": 0, "children": []}
