"""The rule book with children made of data, under a clock that moves when it is told to."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from supervisor.exits import NORMAL, STOPPED, Begun, Cause, Exit, Exited
from supervisor.rules import (
    Begin,
    Call,
    Down,
    End,
    Event,
    Expect,
    Forget,
    Hung,
    Kill,
    Launch,
    Refuse,
    Reply,
    Report,
    Row,
    State,
    Tell,
    Tick,
    Up,
    Wake,
    What,
    WhichChildren,
)
from supervisor.spec import ChildSpec, Flags, Restart, Type
from supervisor.strategy import Strategy
from supervisor.supervision import Supervision

CRASH = Exit(Cause.CRASH, "ValueError: no")
KILLED = Exit(Cause.KILLED, "killed by signal 9")
SHUTDOWN = Exit(Cause.SHUTDOWN, "in order")
LATER = None  # an outcome that does not come by itself

AT_ONCE = Flags(backoff_s=(0.0,), jitter=0.0)


def never_called() -> Any:
    raise AssertionError("the rule book starts nothing itself")


def child(id: str, restart: Restart = Restart.PERMANENT, **fields: Any) -> ChildSpec:
    return ChildSpec(id, never_called, restart, **fields)


def supervisor(id: str, restart: Restart = Restart.PERMANENT, **fields: Any) -> ChildSpec:
    return ChildSpec(id, never_called, restart, type=Type.SUPERVISOR, **fields)


def flags(strategy: Strategy = Strategy.ONE_FOR_ONE, **fields: Any) -> Flags:
    return Flags(**{"strategy": strategy, "backoff_s": (0.0,), "jitter": 0.0, **fields})


class World:
    """Does what the rule book says, and checks that it may say it: never two incarnations of a child, no word to a dead one.

    `begins[id]`: what comes of the next starts of a child: True, an Exit, or LATER; True when there is nothing left.
    `ends[id]`: how a child ends when it is told to, or LATER.
    `log`: "start a", "tell a", "kill a" and "down a", in the order in which it happened.
    """

    def __init__(self, *specs: ChildSpec, flags: Flags = AT_ONCE, begin: bool = True) -> None:
        self.rules = Supervision(specs, flags, chance=lambda: 1.0)
        self.now_s = 100.0
        self.log: list[str] = []
        self.begins: dict[str, list[bool | Exit | None]] = defaultdict(list)
        self.ends: dict[str, Exit | None] = defaultdict(lambda: STOPPED)
        self.alive: dict[str, int] = {}
        self.answers: dict[Any, Any] = {}
        self.reports: list[Report] = []
        self.forgotten: set[str] = set()
        self.up = False
        self.down: Exit | None = None
        self._wakes: list[float] = []
        self._asked = 0
        self._queue: list[Event] = []
        self._busy = False
        if begin:
            self.begin()

    # --- what happens ---

    def begin(self) -> None:
        self.happens(Begin())

    def end(self, exit: Exit = STOPPED) -> None:
        self.happens(End(exit))

    def exits(self, id: str, exit: Exit = CRASH) -> None:
        """The child ends by itself."""
        self._exited(id, exit)

    def begun(self, id: str) -> None:
        """The child, of which LATER was said, has begun."""
        self.happens(Begun(id, self.alive[id]))

    def hangs(self, id: str) -> None:
        self.happens(Hung(id, self.alive[id], "makes no progress"))

    def passes(self, time_s: float) -> None:
        until_s = self.now_s + time_s
        while self._wakes and self._wakes[0] <= until_s:
            self.now_s = max(self.now_s, heapq.heappop(self._wakes))
            self.happens(Tick(self.now_s))
        self.now_s = until_s

    def ask(self, request: Any) -> int:
        self._asked += 1
        self.happens(Call(request, self._asked))
        return self._asked

    def call(self, request: Any) -> Any:
        """→ the answer; a refusal is an Exit's text in a ValueError, returned and not raised."""
        return self.answers[self.ask(request)]

    def refusal(self, request: Any) -> str:
        answer = self.call(request)
        assert isinstance(answer, ValueError), answer
        return str(answer)

    # --- what is seen ---

    def take(self) -> list[str]:
        taken, self.log = self.log, []
        return taken

    def rows(self) -> dict[str, Row]:
        return {row.id: row for row in self.call(WhichChildren())}

    def states(self) -> dict[str, State]:
        return {id: row.state for id, row in self.rows().items()}

    def whats(self, id: str | None = None) -> list[What]:
        return [report.what for report in self.reports if id in (None, report.id)]

    # --- doing ---

    def happens(self, event: Event) -> None:
        self._queue.append(event)
        if self._busy:
            return
        self._busy = True
        while self._queue:
            for effect in self.rules.handle(self._queue.pop(0), self.now_s):
                DOES[type(effect)](self, effect)
        self._busy = False

    def _launch(self, effect: Launch) -> None:
        id = effect.spec.id
        assert id not in self.alive, f"{id} is started twice"
        assert self.down is None
        self.alive[id] = effect.generation
        assert id not in self.forgotten
        self.log.append(f"start {id}")
        outcome = self.begins[id].pop(0) if self.begins[id] else True
        if outcome is True:
            self.happens(Begun(id, effect.generation))
        elif isinstance(outcome, Exit):
            self._exited(id, outcome)

    def _tell(self, effect: Tell) -> None:
        assert self.alive[effect.id] == effect.generation
        self.log.append(f"tell {effect.id}")
        if (end := self.ends[effect.id]) is not None:
            self._exited(effect.id, end)

    def _kill(self, effect: Kill) -> None:
        assert self.alive[effect.id] == effect.generation
        self.log.append(f"kill {effect.id}")
        self._exited(effect.id, KILLED)

    def _exited(self, id: str, exit: Exit) -> None:
        self.log.append(f"down {id}")
        self.happens(Exited(id, self.alive.pop(id), exit))

    def _answer(self, asker: int, value: Any) -> None:
        assert asker not in self.answers, "somebody is answered twice"
        self.answers[asker] = value

    def _goes_up(self) -> None:
        assert not self.up
        self.up = True

    def _goes_down(self, effect: Down) -> None:
        assert self.down is None
        assert not self.alive
        self.down = effect.exit


DOES: dict[type[Any], Callable[[World, Any], None]] = {
    Launch: World._launch,
    Tell: World._tell,
    Kill: World._kill,
    Wake: lambda world, effect: heapq.heappush(world._wakes, effect.due_s),
    Expect: lambda world, effect: world.forgotten.discard(effect.id),
    Forget: lambda world, effect: world.forgotten.add(effect.id),
    Reply: lambda world, effect: world._answer(effect.asker, effect.value),
    Refuse: lambda world, effect: world._answer(effect.asker, ValueError(effect.text)),
    Up: lambda world, effect: world._goes_up(),
    Down: World._goes_down,
    Report: lambda world, effect: world.reports.append(effect),
}

__all__ = ["CRASH", "KILLED", "LATER", "NORMAL", "SHUTDOWN", "STOPPED", "World", "child", "flags", "supervisor"]
