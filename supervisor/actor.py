"""The one actor class: Pykka's, without its traps.

- Whatever a handler raises, BaseException included, ends this actor and no other (Pykka would stop all of them), and its
  supervisor is told; also when it is `on_begin` that raises (of which Pykka tells nobody).
- A request is always answered: by the handler, by a `Deferred` later, by its exception, by the next incarnation, or by a
  refusal when there is none.
- An actor that is told to stop does so after the message in hand, and not after all that waits.
- An actor that hangs is left behind: nobody can end a thread, but what it says from then on is nobody's word.
- The inbox is bounded: a message too many is refused and logged, and memory stays.
- An incarnation that has ended hears nothing: late timers, results and answers vanish.

An actor decides; it never blocks.  What blocks goes to the worker pool (`work`), what may crash or hang into an isolated process
(`worker`).
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pykka
from loguru import logger

from supervisor.answers import Deferred, Vital, Worked, WorkFailed
from supervisor.exits import NORMAL, STOPPED, Begun, Cause, Exit, Exited
from supervisor.system import Mailbox, Request, System
from supervisor.timers import Timer

INBOX_MAX = 100_000


class Stop(Vital):
    """To an actor, from its supervisor: end, in order."""


@dataclass(frozen=True)
class _Ready(Vital):
    """To the actor itself: what it was not ready without is there, or is known not to come."""

    good: bool
    error: Any


class LeftBehind(Exception):
    """In an actor that was left behind, when it goes on all the same: its successor has its place."""


class Actor(pykka.ThreadingActor):
    """Subclasses have `on_message`, and may have `on_begin` and `on_end`.  All three run in the actor's own thread."""

    use_daemon_thread = True  # a hung one must not keep the process from ending

    @staticmethod
    def _create_actor_inbox() -> Any:
        """Not Pykka's `Queue`, which is Python and three locks to a message: a tenth of a tree's time was spent in it."""
        return queue.SimpleQueue()

    def __init__(self, system: System, name: str) -> None:
        super().__init__()
        self.system = system
        self.name = name
        self.generation = 0
        self.begun = threading.Event()  # it is ready, or has ended before it was
        self.gone = threading.Event()  # it has ended
        self.failed_to_begin: str | None = None
        # With two underscores: no subclass can have the same name by accident.
        self.__supervisor: Mailbox | None = None
        self.__handled = 0  # messages
        self.__busy = False
        self.__full = False
        self.__told_to_stop = False
        self.__left_behind = False
        self.__ending = False

    # --- for subclasses to have ---

    def on_begin(self) -> Deferred | None:
        """Find what is there and go on with it.  What is raised here is a failed start.

        It is ready when this returns; or, with a Deferred, when that is set, and messages of its own come meanwhile.
        """
        return None

    def on_message(self, message: Any) -> Any:
        """Handle a message; what is returned (a Deferred: what it is set to) answers a request."""

    def on_end(self, reason: str | None) -> None:
        """Let go of what only this incarnation has; also after an `on_begin` that failed half way.

        Nothing durable is given back here: a successor adopts it.
        """

    # --- for subclasses to use ---

    def mailbox(self, message: Any) -> None:
        """Put a message into the own inbox; from any thread.  Nothing happens once this incarnation has ended."""
        if self.gone.is_set():
            return
        if isinstance(message, Stop):
            self.__told_to_stop = True
        if self.actor_inbox.qsize() >= INBOX_MAX and not isinstance(message, Vital):  # type: ignore[attr-defined]  # a queue.SimpleQueue
            if not self.__full:
                self.__full = True
                logger.error("{} has {} messages waiting; what comes now is lost", self.name, INBOX_MAX)
            if isinstance(message, Request):
                self.system.answer(message, False, f"{self.name} is overloaded")
            return
        self.__full = False
        try:
            self.actor_ref.tell(message)
        except pykka.ActorDeadError:
            pass

    def deferred(self) -> Deferred:
        return Deferred()

    def request(self, name: str, message: Any) -> int:
        """Ask another actor; the Answer or Refused with this number arrives as a message."""
        self.__speak()
        return self.system.request(name, message, self.mailbox)

    def after(self, delay_s: float, message: Any) -> Timer:
        """Get `message` after a while."""
        # A weak one, for a timer may be due in an hour, and an actor that has ended until then must not stay for it.
        mailbox = weakref.WeakMethod(self.mailbox)

        def tell() -> None:
            if (alive := mailbox()) is not None:
                alive(message)

        return self.system.timers.after(delay_s, tell)

    def work(self, key: Any, function: Callable[..., Any], *arguments: Any) -> None:
        """Run a blocking function in the pool; Worked or WorkFailed with `key` arrives as a message."""
        self.__speak()

        def run() -> None:
            try:
                value = function(*arguments)
            except Exception as error:  # noqa: BLE001 (it is handed on whole)
                self.mailbox(WorkFailed(key, error))
            except BaseException as error:  # noqa: BLE001 (nobody else would tell the actor, which waits)
                self.mailbox(WorkFailed(key, RuntimeError(f"{type(error).__name__}: {error}")))
            else:
                self.mailbox(Worked(key, value))

        self.system.pool.run(run)

    def finish(self, exit: Exit = NORMAL) -> None:
        """End by itself, after this message."""
        self.__end(exit)

    # --- for supervisors ---

    def launch(self, generation: int, supervisor: Mailbox | None) -> None:
        """Start the actor's thread.  `supervisor` gets Begun when it is ready, and Exited when it has ended."""
        self.generation = generation
        self.__supervisor = supervisor
        # Not through Pykka's registry: one list for the process, whose one use is to stop all actors at once.
        self._start_actor_loop()

    @property
    def due(self) -> int:
        """The number of the message that it handles, or has to handle next; 0 when there is none.  For any thread."""
        return self.__handled + 1 if self.__busy or not self.actor_inbox.empty() else 0

    def leave_behind(self) -> None:
        """Have done with an actor that does not end.  It has its name no more, answers and asks nobody, and ends as soon as it can."""
        self.__left_behind = True
        self.__supervisor = None
        self.system.unregister(self.name, self.mailbox)
        self.mailbox(Stop())

    # --- life ---

    def on_start(self) -> None:
        try:
            ready = self.on_begin()
        except BaseException as error:  # noqa: BLE001 (see the module's docstring)
            self.__crash(error)
            return
        if isinstance(ready, Deferred):
            ready.then(lambda good, value: self.mailbox(_Ready(good, None if good else value)))
        else:
            self.__begin(_Ready(True, None))

    def __begin(self, ready: _Ready) -> None:
        if self.__ending:
            return
        if self.__told_to_stop:  # it took too long, and its supervisor has left it behind
            self.__end(STOPPED)
        elif not ready.good:
            self.__crash(ready.error)
        else:
            self.system.register(self.name, self.mailbox, self.generation)
            self.begun.set()
            if self.__supervisor is not None:
                self.__supervisor(Begun(self.name, self.generation))

    def on_receive(self, message: Any) -> None:
        if self.gone.is_set():
            return  # what was in the inbox; a request waits for the next incarnation
        self.__busy = True
        try:
            if self.__told_to_stop:
                self.__end(STOPPED)
            elif isinstance(message, Request):
                self.__serve(message)
            elif isinstance(message, _Ready):
                self.__begin(message)
            else:
                self.on_message(message)
        except BaseException as error:  # noqa: BLE001 (see the module's docstring)
            if isinstance(message, Request):
                self.__answer(message, False, error)
            self.__crash(error)
        finally:
            self.__handled += 1
            self.__busy = False

    def __speak(self) -> None:
        if self.__left_behind:
            raise LeftBehind(f"{self.name} of generation {self.generation} was left behind")

    def __serve(self, request: Request) -> None:
        answer = self.on_message(request.message)
        if not isinstance(answer, Deferred):
            self.__answer(request, True, answer)
            return

        def settled(good: bool, value: Any) -> None:
            # A refusal of an actor that is ending is not its word: the next incarnation gets the request.
            if good or not self.__ending:
                self.__answer(request, good, value)

        answer.then(settled)

    def __answer(self, request: Request, good: bool, value: Any) -> None:
        if not self.__left_behind:  # else its successor has the request
            self.system.answer(request, good, value)

    def __crash(self, error: BaseException) -> None:
        text = f"{type(error).__name__}: {error}"
        logger.opt(exception=error).error("{} has crashed", self.name)
        self.__end(Exit(Cause.CRASH, text))

    def __end(self, exit: Exit) -> None:
        if self.__ending:
            return
        self.__ending = True
        try:
            self.on_end(exit.text or None)
        except BaseException as error:  # noqa: BLE001 (it ends all the same)
            logger.opt(exception=error).error("{} could not end in order", self.name)
        self.system.unregister(self.name, self.mailbox)
        self.gone.set()
        if not self.begun.is_set() and not exit.good:
            self.failed_to_begin = exit.text
        self.begun.set()
        supervisor = self.__supervisor  # once: who leaves it behind takes it away
        if supervisor is not None:
            supervisor(Exited(self.name, self.generation, exit))
        self.stop()
