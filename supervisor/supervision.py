"""The rule book: which child is started, stopped, killed, started again, given up, and when the supervisor itself has to end.

Rule 1: every decision of a supervisor is made here, and nothing else is: no thread, no clock, no chance, no I/O.  `Supervision` is
told what has happened and when (`rules`: the events), and says what is to be done (the effects).  `tree` does it with actors.  What the
calls of an administrator are answered is in `administration`.

The rules are Erlang/OTP's (stdlib, supervisor), to the letter where it has one.  What differs, and why:

- Nothing waits.  A start, a stop, a pause are states of a child, so that a supervisor answers and can be stopped meanwhile, and a
  start may have a time-out.
- Restarts pause (`restarts.Backoff`), and a child may have budgets for each cause beside the intensity for all.
- `EnsureChild`, for children that must be: OTP gives up a child that cannot be started the first time.

How a child changes its state is TABLE, and only TABLE: what it does not list happens too late, and means nothing.  An event of an
earlier generation of a child, or of a child that is not known, means nothing either.

What concerns several children goes through the *lane*: first those to stop, one by one, the last first; then, when the pause is
over, those to start, each when the one before has begun.  The first start, restarts of a group, and the end are lanes; a restart
of one_for_one and dynamic is not, since nobody waits for it.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from supervisor.administration import CALLS, LATER, Refusal
from supervisor.children import ALIVE, AT_REST, BUSY, Child, Unbegun, acceptable
from supervisor.deadlines import Deadlines
from supervisor.exits import Begun, Cause, Exit, Exited
from supervisor.restarts import Backoff, Window
from supervisor.rules import (
    Begin,
    Call,
    Down,
    Effect,
    End,
    Event,
    Expect,
    Forget,
    Hung,
    Kill,
    Launch,
    Phase,
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
)
from supervisor.spec import AutoShutdown, ChildSpec, Flags, Restart, SpecError, Type, check_children
from supervisor.strategy import Strategy, affected

LANE: Final = ""  # no child has this id; its deadline is when the lane's pause is over


class Supervision:
    """One supervisor's children.  Raises SpecError when specs or flags are wrong: then nothing has been started.

    `generations`: where each start gets its number from; share one, and no two incarnations of a whole system have the same.
    """

    def __init__(
        self,
        specs: Sequence[ChildSpec] = (),
        flags: Flags | None = None,
        generations: Iterator[int] | None = None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.flags = flags or Flags()
        check_children(specs, self.flags)
        self.phase = Phase.NEW
        self.children: dict[str, Child] = {}
        self._generations = itertools.count() if generations is None else generations
        self._chance = chance
        self._window = Window(self.flags.intensity or 0, self.flags.period_s)
        self._deadlines = Deadlines()
        self._to_stop: list[str] = []
        self._to_start: deque[str] = deque()
        self._turn: str | None = None  # whom the lane waits for
        self._alive = 0
        self._exit = Exit(Cause.SHUTDOWN)
        self._now_s = 0.0
        self._effects: list[Effect] = []
        for spec in specs:
            self.add(spec, Unbegun.ABORT)

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """What has happened at `now_s` (any clock that never goes back) → what is to be done, in this order."""
        self._now_s, self._effects = now_s, []  # a new list: the last one is its receiver's
        match event:
            case Begin() if self.phase is Phase.NEW:
                self.phase = Phase.STARTING
                for known in self.children.values():
                    self._enter(known, State.RESTARTING)
                self._to_start.extend(self.children)
            case End(exit):
                self._end(exit)
            case Tick(due_s):
                self._tick(due_s)
            case Call(request, asker) if self.phase is not Phase.ENDED:
                self._call(request, asker)
            case Call(_, asker):
                self._effects.append(Refuse(asker, "the supervisor has ended"))
            case Begun(id, generation) | Exited(id, generation) | Hung(id, generation):
                child = self.children.get(id)
                if child is not None and child.generation == generation:
                    self._apply(child, event)
        self._advance()
        return self._effects

    # --- one child: the handlers of TABLE ---

    def _apply(self, child: Child, event: Begun | Exited | Hung | Tick) -> None:
        handler = TABLE.get((child.state, type(event)))
        if handler is not None:
            handler(self, child, event)

    def _has_begun(self, child: Child, event: Begun) -> None:
        self._enter(child, State.RUNNING)
        child.unbegun = Unbegun.RETRY
        self._report(What.STARTED, child, Exit(Cause.NORMAL))
        self._reply(child, child.row())

    def _could_not_begin(self, child: Child, event: Exited) -> None:
        if self._is_to_end(child):
            self._is_down(child, event)
        elif event.exit.cause is Cause.NORMAL:  # OTP's ignore: it has nothing to do
            child.unbegun = Unbegun.RETRY
            self._reply(child, self._rest(child))
        else:
            self._is_unbegun(child, Exit(Cause.START, str(event.exit)))

    def _begins_too_slowly(self, child: Child, event: Tick) -> None:
        child.verdict = Exit(Cause.START_TIMEOUT, f"not begun after {self._start_timeout_s(child):g} s")
        self._stop(child)

    def _has_ended(self, child: Child, event: Exited) -> None:
        if self._is_to_end(child):  # as it does, before it was told
            self._is_down(child, event)
        else:
            self._is_over(child, event.exit)

    def _hangs(self, child: Child, event: Hung) -> None:
        child.verdict = Exit(Cause.HUNG, event.text)
        self._report(What.HUNG, child, child.verdict)
        self._kill(child, event.text)

    def _takes_too_long_to_end(self, child: Child, event: Tick) -> None:
        self._kill(child, f"has not ended within {child.spec.patience_s:g} s of being told to")

    def _is_down(self, child: Child, event: Exited) -> None:
        """A child that was to end has ended."""
        verdict, child.verdict = child.verdict, None
        if verdict is None and not acceptable(child, event.exit):
            self._report(What.SHUTDOWN_ERROR, child, event.exit)
        if child.terminating:
            child.terminating = False
            self._rest(child)
            self._reply(child, None)
        elif self.phase is Phase.ENDING:
            self._enter(child, State.DOWN)
        elif verdict is None:  # for the lane, in which it starts again
            if child.spec.restart is Restart.TEMPORARY:
                self._rest(child)
                self._refuse(child, f"{child.spec.id} ended with its siblings")
            else:
                self._enter(child, State.RESTARTING)
        elif verdict.cause is Cause.START_TIMEOUT:
            self._is_unbegun(child, verdict)
        else:
            self._is_over(child, verdict)

    def _pause_is_over(self, child: Child, event: Tick) -> None:
        self._launch(child)

    def _is_to_end(self, child: Child) -> bool:
        return self.phase is Phase.ENDING or child.spec.id in self._to_stop

    # --- what an end means ---

    def _is_unbegun(self, child: Child, exit: Exit) -> None:
        if child.unbegun is Unbegun.RETRY:
            self._is_over(child, exit, What.START_FAILED)
            return
        self._report(What.START_FAILED, child, exit)
        if child.unbegun is Unbegun.ABORT:
            self._enter(child, State.DOWN)
            self._end(Exit(Cause.START, f"{child.spec.id}: {exit}"))
            return
        self._rest(child, forget=child.unbegun is Unbegun.DISCARD)
        child.unbegun = Unbegun.RETRY  # should its siblings bring it back
        self._refuse(child, str(exit))

    def _is_over(self, child: Child, exit: Exit, what: What = What.ENDED) -> None:
        """It has ended by itself, or was ended for it: start it again, or not."""
        restart = child.spec.restart
        if restart is Restart.TEMPORARY or (restart is Restart.TRANSIENT and exit.good):
            self._report(what, child, exit)
            self._rest(child)
            self._refuse(child, str(exit))
            self._shut_down_after(child)
            return
        if self._spent(child, exit.cause):
            self._report(What.GIVEN_UP, child, exit)
            self._enter(child, State.FAILED)
            self._shut_down_after(child)
            return
        if self._too_many():
            self._report(What.TOO_MANY_RESTARTS, child, exit)
            self._enter(child, State.DOWN)
            most = f"more than {self.flags.intensity} in {self.flags.period_s:g} s"
            self._end(Exit(Cause.SHUTDOWN, f"TooManyRestarts: {most}; the last is {child.spec.id} ({exit})"))
            return
        child.backoff, pause_s = child.backoff.ended(self._now_s, self._chance())
        self._report(what, child, exit, pause_s)
        self._enter(child, State.RESTARTING)
        if self.flags.strategy.grouped:
            self._regroup(child, pause_s)
        elif pause_s > 0:
            self._set_deadline(child.spec.id, pause_s)
        else:
            self._launch(child)

    def _too_many(self) -> bool:
        """Count a restart → whether it is more than the intensity allows."""
        if self.flags.intensity is None:
            return False
        self._window, too_many = self._window.add(self._now_s)
        return too_many

    def _spent(self, child: Child, cause: Cause) -> bool:
        """Count a restart for this cause → whether it is more than the child's budget has."""
        budget = child.spec.budgets.get(cause)
        if budget is None:
            return False
        window = child.windows.get(cause, Window(budget.restarts, budget.period_s))
        child.windows[cause], spent = window.add(self._now_s)
        return spent

    def _shut_down_after(self, child: Child) -> None:
        """Auto-shutdown: `child` has ended by itself and for good."""
        if not child.spec.significant:
            return
        left = any(other.spec.significant and other.state not in AT_REST for other in self.children.values())
        if left and self.flags.auto_shutdown is AutoShutdown.ALL_SIGNIFICANT:
            return
        self._report(What.AUTO_SHUTDOWN, child, Exit(Cause.SHUTDOWN))
        self._end(Exit(Cause.SHUTDOWN, f"{child.spec.id}, which is significant, has ended"))

    def _rest(self, child: Child, forget: bool = False) -> Row:
        """It is down, and not to be started again; it stays known, unless nobody will ask for it again."""
        self._enter(child, State.DOWN)
        if forget or child.spec.restart is Restart.TEMPORARY or self.flags.strategy is Strategy.DYNAMIC:
            self.children.pop(child.spec.id, None)
        return child.row()

    # --- doing ---

    def _launch(self, child: Child) -> None:
        self._enter(child, State.STARTING)
        child.generation = next(self._generations)
        child.launches += 1
        child.backoff = child.backoff.started(self._now_s)
        self._set_deadline(child.spec.id, self._start_timeout_s(child))
        self._effects.append(Launch(child.spec, child.generation))

    def _stop(self, child: Child) -> None:
        if child.spec.patience_s == 0:
            self._kill(child, None)
            return
        self._enter(child, State.STOPPING)
        self._set_deadline(child.spec.id, child.spec.patience_s)
        self._effects.append(Tell(child.spec.id, child.generation))

    def _kill(self, child: Child, why: str | None) -> None:
        self._enter(child, State.KILLING)
        self._effects.append(Kill(child.spec.id, child.generation, why))

    def _enter(self, child: Child, state: State) -> None:
        self._alive += (state in ALIVE) - (child.state in ALIVE)
        if (child.state in AT_REST) != (state in AT_REST):
            self._effects.append(Forget(child.spec.id) if state in AT_REST else Expect(child.spec.id))
        child.state = state
        self._deadlines.drop(child.spec.id)

    def _start_timeout_s(self, child: Child) -> float:
        if child.spec.start_timeout_s is not None:
            return child.spec.start_timeout_s
        return math.inf if child.spec.type is Type.SUPERVISOR else self.flags.start_timeout_s

    def _reply(self, child: Child, value: Any) -> None:
        self._effects += [Reply(asker, value) for asker in child.askers]
        child.askers.clear()

    def _refuse(self, child: Child, text: str) -> None:
        self._effects += [Refuse(asker, text) for asker in child.askers]
        child.askers.clear()

    def _report(self, what: What, child: Child, exit: Exit, pause_s: float | None = None) -> None:
        self._effects.append(Report(what, child.spec.id, child.generation, exit, pause_s))

    # --- time ---

    def _set_deadline(self, id: str, delay_s: float) -> None:
        self._deadlines.set(id, self._now_s + delay_s)
        self._wake(id)

    def _wake(self, id: str | None) -> None:
        due_s = self._deadlines.wake(id)
        if due_s is not None:
            self._effects.append(Wake(due_s))

    def _tick(self, due_s: float) -> None:
        for id in self._deadlines.pop_due(max(due_s, self._now_s)):
            if id in self.children:
                self._apply(self.children[id], Tick(due_s))
        self._wake(None)

    # --- several children ---

    def _regroup(self, ended: Child, pause_s: float) -> None:
        """Put a group into the lane, beside those that wait in it for their turn to start."""
        group = affected(self.flags.strategy, list(self.children), ended.spec.id)
        self._to_stop = list(group)  # what was still to stop is among them: only what starts first is left running
        waiting = {*self._to_start, *group}
        self._to_start = deque(id for id in self.children if id in waiting)
        for id in group:
            self.children[id].verdict = None  # that it ended for something of its own is of no interest any more
            if self.children[id].state is State.DOWN:
                self._enter(self.children[id], State.RESTARTING)
        if pause_s > 0:
            self._deadlines.extend(LANE, self._now_s + pause_s)
            self._wake(LANE)

    def _end(self, exit: Exit) -> None:
        if self.phase in (Phase.ENDING, Phase.ENDED):
            return
        self.phase, self._exit = Phase.ENDING, exit
        self._deadlines.drop(LANE)
        self._to_stop = list(self.children)
        for child in self.children.values():
            if child.state is State.RESTARTING:
                self._enter(child, State.DOWN)
            if not child.terminating:
                self._refuse(child, "the supervisor ends")

    def _advance(self) -> None:
        """Go on with the lane as far as nothing has to be waited for."""
        if self.phase is Phase.ENDING and self.flags.strategy is Strategy.DYNAMIC:
            for id in reversed(self._to_stop):
                self._stop_in_lane(self.children[id])
            self._to_stop.clear()
        while not self._is_waiting():
            if self._to_stop:
                self._turn = self._to_stop.pop()
                if self._turn in self.children:
                    self._stop_in_lane(self.children[self._turn])
            elif self.phase is Phase.ENDING:
                self.phase = Phase.ENDED
                self._effects.append(Down(self._exit))
            elif self._to_start:
                self._turn = self._to_start.popleft()
                child = self.children.get(self._turn)
                if child is not None and child.state is State.RESTARTING:
                    self._launch(child)
            elif self.phase is Phase.STARTING:
                self.phase = Phase.RUNNING
                self._effects.append(Up())
            else:
                return

    def _is_waiting(self) -> bool:
        """Whether the lane waits for the child whose turn it is, or for time."""
        if self.phase in (Phase.NEW, Phase.ENDED):
            return True
        turn = self.children.get(self._turn or LANE)
        if turn is not None and turn.state in BUSY and not (turn.state is State.STARTING and turn.spec.id in self._to_stop):
            return True
        if self._to_stop:
            return False
        return self._alive > 0 if self.phase is Phase.ENDING else LANE in self._deadlines

    def _stop_in_lane(self, child: Child) -> None:
        if child.state in (State.STARTING, State.RUNNING):
            self._stop(child)

    # --- what is asked for by hand, for `administration` ---

    def _call(self, request: Any, asker: Any) -> None:
        try:
            answer = CALLS[type(request)](self, request, asker)
        except (Refusal, SpecError) as refused:
            self._effects.append(Refuse(asker, str(refused)))
        else:
            if answer is not LATER:
                self._effects.append(Reply(asker, answer))

    @property
    def alive(self) -> int:
        """How many children are started and have not ended."""
        return self._alive

    def add(self, spec: ChildSpec, unbegun: Unbegun) -> Child:
        """Know a child, which is down."""
        flags = self.flags
        reset_s = flags.period_s if flags.reset_s is None else flags.reset_s
        child = Child(spec, Backoff(flags.backoff_s, reset_s, jitter=flags.jitter), unbegun)
        self.children[spec.id] = child
        return child

    def start_by_hand(self, child: Child, *askers: Any) -> None:
        """Start a child that is at rest; `askers` have an answer when it has begun, or could not."""
        child.askers += askers
        child.windows.clear()  # who starts it by hand has mended what there was
        if self.flags.strategy.grouped or self.phase in (Phase.NEW, Phase.STARTING):
            self._enter(child, State.RESTARTING)  # in its turn, which may be now
            waiting = {*self._to_start, child.spec.id}
            self._to_start = deque(id for id in self.children if id in waiting)
        else:
            self._launch(child)

    def terminate(self, child: Child, asker: Any) -> bool:
        """Have a child end, and stay so → whether it has already; else `asker` has an answer when it has."""
        self._to_start = deque(id for id in self._to_start if id != child.spec.id)
        self._refuse(child, f"{child.spec.id} is terminated")
        if child.state in ALIVE:
            child.terminating, child.verdict = True, None
            child.askers.append(asker)
            self._stop_in_lane(child)
            return False
        self._rest(child)
        return True


Handler = Callable[[Supervision, Child, Any], None]

TABLE: Final[dict[tuple[State, type[Any]], Handler]] = {
    (State.RESTARTING, Tick): Supervision._pause_is_over,
    (State.STARTING, Begun): Supervision._has_begun,
    (State.STARTING, Exited): Supervision._could_not_begin,
    (State.STARTING, Tick): Supervision._begins_too_slowly,
    (State.RUNNING, Exited): Supervision._has_ended,
    (State.RUNNING, Hung): Supervision._hangs,
    (State.STOPPING, Exited): Supervision._is_down,
    (State.STOPPING, Tick): Supervision._takes_too_long_to_end,
    (State.KILLING, Exited): Supervision._is_down,
}
