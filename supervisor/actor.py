"""The one actor class: Pykka's, without its traps.

- Whatever a handler raises, BaseException included, ends this actor and no other (Pykka would stop all of them), and its
  supervisor is told; also when it is `on_begin` that raises (of which Pykka tells nobody).
- A request is always answered: by the handler, by a `Deferred` later, by its exception, by the next incarnation, or by a
  refusal when there is none.
- An actor that is told to stop does so after the message in hand, and not after all that waits.
- The inbox is bounded: a message too many is refused and logged, and memory stays.
- An incarnation that has ended hears nothing: late timers, results and answers vanish.

An actor decides; it never blocks.  What blocks goes to the worker pool (`work`), what may crash or hang into an isolated process
(`worker`).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pykka
from loguru import logger

from supervisor.answers import Deferred, Vital, Worked, WorkFailed
from supervisor.system import Mailbox, Request, System
from supervisor.timers import Timer

INBOX_MAX = 100_000


@dataclass(frozen=True)
class Exited(Vital):
    """To a supervisor: an incarnation of its child has ended; `error` is None when it did so normally."""

    id: str
    generation: int
    error: str | None


class Stop(Vital):
    """To an actor, from its supervisor: end, in order."""


class Actor(pykka.ThreadingActor):
    """Subclasses have `on_message`, and may have `on_begin` and `on_end`.  All three run in the actor's own thread."""

    use_daemon_thread = True  # a hung one must not keep the process from ending

    def __init__(self, system: System, name: str) -> None:
        super().__init__()
        self.system = system
        self.name = name
        self.generation = 0
        self.begun = threading.Event()  # on_begin is over, well or badly
        self.gone = threading.Event()  # it has ended
        self.failed_to_begin: str | None = None
        # With two underscores: no subclass can have the same name by accident.
        self.__supervisor: Mailbox | None = None
        self.__full = False
        self.__told_to_stop = False
        self.__ending = False

    # --- for subclasses to have ---

    def on_begin(self) -> None:
        """Find what is there and go on with it.  What is raised here is a failed start."""

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
        if self.actor_inbox.qsize() >= INBOX_MAX and not isinstance(message, Vital):  # type: ignore[attr-defined]  # a queue.Queue
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

    def finish(self) -> None:
        """End normally, after this message."""
        self.__end(None)

    # --- life ---

    def launch(self, generation: int, supervisor: Mailbox | None) -> None:
        """Start the actor's thread; for supervisors.  `begun` is set when `on_begin` is over."""
        self.generation = generation
        self.__supervisor = supervisor
        # Not through Pykka's registry: one list for the process, whose one use is to stop all actors at once.
        self._start_actor_loop()

    def on_start(self) -> None:
        try:
            self.on_begin()
        except BaseException as error:  # noqa: BLE001 (see the module's docstring)
            self.failed_to_begin = self.__crash(error)
        else:
            if self.__told_to_stop:  # it took too long, and its supervisor has left it behind
                self.__end("stopped")
            if not self.gone.is_set():
                self.system.register(self.name, self.mailbox)
        finally:
            self.begun.set()

    def on_receive(self, message: Any) -> None:
        if self.gone.is_set():
            return  # what was in the inbox; a request waits for the next incarnation
        try:
            if self.__told_to_stop:
                self.__end("stopped")
            elif isinstance(message, Request):
                self.__serve(message)
            else:
                self.on_message(message)
        except BaseException as error:  # noqa: BLE001 (see the module's docstring)
            if isinstance(message, Request):
                self.system.answer(message, False, error)
            self.__crash(error)

    def __serve(self, request: Request) -> None:
        answer = self.on_message(request.message)
        if not isinstance(answer, Deferred):
            self.system.answer(request, True, answer)
            return

        def settled(good: bool, value: Any) -> None:
            # A refusal of an actor that is ending is not its word: the next incarnation gets the request.
            if good or not self.__ending:
                self.system.answer(request, good, value)

        answer.then(settled)

    def __crash(self, error: BaseException) -> str:
        text = f"{type(error).__name__}: {error}"
        logger.opt(exception=error).error("{} has crashed", self.name)
        self.__end(text)
        return text

    def __end(self, reason: str | None) -> None:
        if self.__ending:
            return
        self.__ending = True
        try:
            self.on_end(reason)
        except BaseException as error:  # noqa: BLE001 (it ends all the same)
            logger.opt(exception=error).error("{} could not end in order", self.name)
        self.system.unregister(self.name, self.mailbox)
        self.gone.set()
        if self.__supervisor is not None:
            self.__supervisor(Exited(self.name, self.generation, reason))
        self.stop()
