"""What all actors of a process share: their names, requests between them, timers, and a pool for what blocks."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from supervisor.answers import Answer, Refused
from supervisor.events import Event
from supervisor.pool import Pool
from supervisor.timers import Timers

WORKERS_MAX = 48

Mailbox = Callable[[Any], None]


@dataclass(frozen=True)
class Reference:
    """One incarnation of an actor: what is sent to it reaches no other.  A name alone is whoever has it."""

    name: str
    generation: int


@dataclass(frozen=True)
class Request:
    """A message that wants an answer.  It waits here until it has one, and is delivered again to a new incarnation of its target.

    `generation`: that of the only one to whom it may go.
    """

    number: int
    target: str
    message: Any
    asker: Mailbox
    generation: int | None = None


class Root(Protocol):
    """The supervisor at the top."""

    def snapshot(self) -> dict[str, Any]: ...


class System:
    """A name is *expected* from the moment its supervisor knows the child until the child has ended for good; between two incarnations
    requests wait.  Nobody else has a name, and is refused.

    `events`: is told what happens to the children of every supervisor (`events.EventLog.append`, for instance).
    `left_behind`: is told of an actor that hangs when another one is to take its place.  Its thread may go on one day; a program that
    must not have two at once ends its process here, and is started again by who watches over that.
    """

    def __init__(
        self,
        events: Callable[[Event], None] = lambda event: None,
        left_behind: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._lock = threading.RLock()  # what is put into a mailbox under it may be refused there, which takes it again
        self._expected: set[str] = set()
        self._mailboxes: dict[str, tuple[Mailbox, int]] = {}
        self._requests: dict[int, Request] = {}
        self._numbers = itertools.count(1)
        self.generations = itertools.count(1)  # no two starts of anything have the same number
        self.events = events
        self.left_behind = left_behind
        self.timers = Timers()
        self.root: Root | None = None  # for whoever draws the tree
        self.pool = Pool(WORKERS_MAX)

    def close(self) -> None:
        """Give the threads back, when the tree has ended."""
        self.timers.close()
        self.pool.close()

    # --- names ---

    def expect(self, name: str) -> None:
        with self._lock:
            self._expected.add(name)

    def register(self, name: str, mailbox: Mailbox, generation: int = 0) -> None:
        """An incarnation has begun: it gets what its predecessor has not answered, and what waited meanwhile."""
        with self._lock:
            self._expected.add(name)
            self._mailboxes[name] = mailbox, generation
            # With the lock held: what the same asker asks from now on must not overtake it.
            for request in self._waiting_for(name):
                if request.generation in (None, generation):
                    mailbox(request)

    def unregister(self, name: str, mailbox: Mailbox) -> None:
        """An incarnation has ended.  A successor that has begun meanwhile keeps the name."""
        with self._lock:
            found, generation = self._mailboxes.get(name, (None, 0))
            if found != mailbox:
                return
            del self._mailboxes[name]
            refused = [request for request in self._waiting_for(name) if request.generation == generation]
        for request in refused:
            self.answer(request, False, _has_ended(name, generation))

    def reference(self, name: str) -> Reference | None:
        """The incarnation that has the name now; None when there is nobody just now."""
        found = self._mailboxes.get(name)
        return None if found is None else Reference(name, found[1])

    def _waiting_for(self, name: str) -> list[Request]:
        return [request for request in self._requests.values() if request.target == name]

    def forget(self, name: str) -> None:
        """There will be nobody of that name any more: who waits for an answer is refused."""
        with self._lock:
            self._expected.discard(name)
            self._mailboxes.pop(name, None)
            refused = self._waiting_for(name)
        for request in refused:
            self.answer(request, False, f"{name} has ended")

    # --- messages ---

    def tell(self, target: str | Reference, message: Any) -> bool:
        """Put a message into a mailbox.  False when there is nobody just now, or no more; then it is lost."""
        name, generation = _target(target)
        found = self._mailboxes.get(name)
        if found is None or generation not in (None, found[1]):
            return False
        found[0](message)
        return True

    def request(self, target: str | Reference, message: Any, asker: Mailbox) -> int:
        """Ask; `asker` is called with an Answer or Refused that has the number returned.

        Who has the name may be started again and get the message a second time: asking twice must be harmless.  A Reference's
        incarnation gets it once, or nobody does.
        """
        name, generation = _target(target)
        request = Request(next(self._numbers), name, message, asker, generation)
        with self._lock:
            expected = name in self._expected
            self._requests[request.number] = request
            found = self._mailboxes.get(name)
        if not expected:
            self.answer(request, False, f"there is no {name}")
        elif generation is not None and (found is None or found[1] != generation):
            self.answer(request, False, _has_ended(name, generation))
        elif found is not None:
            found[0](request)
        return request.number

    def answer(self, request: Request, good: bool, value: Any) -> None:
        """Answer a request, or refuse it with a text or exception; one that has been answered already is left alone."""
        with self._lock:
            if self._requests.pop(request.number, None) is None:
                return
        request.asker(Answer(request.number, value) if good else Refused(request.number, str(value) or type(value).__name__))

    def ask(self, name: str, message: Any, timeout_s: float) -> Any:
        """Ask and wait; not for an actor's thread.  Raises TimeoutError; RuntimeError when it is refused."""
        answers: queue.SimpleQueue[Answer | Refused] = queue.SimpleQueue()
        number = self.request(name, message, answers.put)
        try:
            answer = answers.get(timeout=timeout_s)
        except queue.Empty:
            with self._lock:
                self._requests.pop(number, None)
            raise TimeoutError(f"{name} has not answered {type(message).__name__} within {timeout_s:g} s") from None
        if isinstance(answer, Refused):
            raise RuntimeError(answer.error)
        return answer.value


def _target(target: str | Reference) -> tuple[str, int | None]:
    return (target, None) if isinstance(target, str) else (target.name, target.generation)


def _has_ended(name: str, generation: int) -> str:
    return f"{name} of generation {generation} has ended"
