"""The one actor class: a Pykka actor whose death its supervisor always learns of, and whose every question is answered."""

from __future__ import annotations

import heapq
import itertools
import queue
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pykka
from loguru import logger

INBOX_MAX = 100_000
WORKERS_MAX = 48


@dataclass(frozen=True)
class Answer:
    request: int
    value: Any


@dataclass(frozen=True)
class Refused:
    request: int
    error: str


@dataclass(frozen=True)
class Worked:
    key: Any
    value: Any


@dataclass(frozen=True)
class WorkFailed:
    key: Any
    error: Exception


@dataclass(frozen=True)
class Exited:
    name: str
    generation: int
    error: str | None


@dataclass(frozen=True)
class _Asked:
    number: int
    asker: Callable[[Any], None]
    message: Any


class Deferred:
    """An answer that comes later."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done: tuple[bool, Any] | None = None
        self._listener: Callable[[bool, Any], None] | None = None

    def set(self, value: Any) -> None:
        self._settle((True, value))

    def set_exception(self, error: Exception) -> None:
        self._settle((False, error))

    def then(self, listener: Callable[[bool, Any], None]) -> None:
        with self._lock:
            self._listener = listener
            done = self._done
        if done:
            listener(*done)

    def _settle(self, done: tuple[bool, Any]) -> None:
        with self._lock:
            if self._done is not None:
                return
            self._done = done
            listener = self._listener
        if listener:
            listener(*done)


def refusal(text: str) -> Deferred:
    """An answer that refuses a request, with a text for who asked; the actor goes on."""
    refused = Deferred()
    refused.set_exception(ValueError(text))
    return refused


class Timer:
    def __init__(self, call: Callable[[], None]) -> None:
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self.call = None


class Timers:
    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timer]] = []
        self._count = itertools.count()
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="timers", daemon=True).start()

    def after(self, delay_s: float, call: Callable[[], None]) -> Timer:
        timer = Timer(call)
        with self._changed:
            heapq.heappush(self._heap, (time.monotonic() + delay_s, next(self._count), timer))
            self._changed.notify()
        return timer

    def _run(self) -> None:
        with self._changed:
            while True:
                now = time.monotonic()
                while self._heap and self._heap[0][0] <= now:
                    call = heapq.heappop(self._heap)[2].call
                    if call:
                        call()
                self._changed.wait(self._heap[0][0] - now if self._heap else None)


class System:
    def __init__(self) -> None:
        self._refs: dict[str, tuple[Callable[[Any], None], int]] = {}
        self._pending: dict[int, tuple[str, _Asked]] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self.timers = Timers()
        self.pool = ThreadPoolExecutor(WORKERS_MAX, thread_name_prefix="worker")
        self.root: Any = None

    def register(self, name: str, mailbox: Callable[[Any], None], generation: int) -> None:
        with self._lock:
            self._refs[name] = (mailbox, generation)
            again = [asked for target, asked in self._pending.values() if target == name]
        for asked in again:
            mailbox(asked)

    def unregister(self, name: str, generation: int, for_good: bool) -> None:
        with self._lock:
            if self._refs.get(name, (None, -1))[1] == generation:
                del self._refs[name]
            gone = [asked for target, asked in self._pending.values() if target == name] if for_good else []
        for asked in gone:
            self.answer(asked, False, RuntimeError(f"{name} has ended"))

    def tell(self, name: str, message: Any) -> bool:
        found = self._refs.get(name)
        if found is None:
            return False
        found[0](message)
        return True

    def ask(self, name: str, message: Any, timeout_s: float) -> Any:
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.request(name, message, answers.put)
        try:
            answer = answers.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError(f"{name} did not answer within {timeout_s} s") from None
        if isinstance(answer, Refused):
            raise RuntimeError(answer.error)
        return answer.value

    def request(self, name: str, message: Any, asker: Callable[[Any], None]) -> int:
        asked = _Asked(next(self._numbers), asker, message)
        with self._lock:
            self._pending[asked.number] = (name, asked)
            found = self._refs.get(name)
        if found:
            found[0](asked)
        return asked.number

    def answer(self, asked: _Asked, good: bool, value: Any) -> None:
        with self._lock:
            if self._pending.pop(asked.number, None) is None:
                return
        asked.asker(Answer(asked.number, value) if good else Refused(asked.number, str(value)))

    def snapshot(self) -> dict[str, Any]:
        return self.root.snapshot()

    def start(self, root: Any) -> None:
        self.root = root
        pykka.ActorRegistry.register(root.actor_ref)
        root._start_actor_loop()

    def stop(self, timeout_s: float) -> None:
        for name in list(reversed(list(self._refs))):
            pass
        for ref in pykka.ActorRegistry.get_all():
            ref.stop(block=False)


class Actor(pykka.ThreadingActor):
    use_daemon_thread = True

    def __init__(self, system: System, name: str) -> None:
        super().__init__()
        self.system = system
        self.name = name
        self.generation = 0
        self.supervisor: Callable[[Any], None] | None = None
        self._has_exited = False

    def mailbox(self, message: Any) -> None:
        try:
            self.actor_ref.tell(message)
        except pykka.ActorDeadError:
            pass

    def on_begin(self) -> None: ...
    def on_end(self, reason: object) -> None: ...
    def on_message(self, message: Any) -> Any: ...

    def deferred(self) -> Deferred:
        return Deferred()

    def request(self, name: str, message: Any) -> int:
        return self.system.request(name, message, self.mailbox)

    def after(self, delay_s: float, message: Any) -> Timer:
        return self.system.timers.after(delay_s, lambda: self.mailbox(message))

    def work(self, key: Any, function: Callable[..., Any], *args: Any, **kw: Any) -> None:
        mailbox = self.mailbox

        def run() -> None:
            try:
                value = function(*args, **kw)
            except Exception as error:
                mailbox(WorkFailed(key, error))
            else:
                mailbox(Worked(key, value))

        self.system.pool.submit(run)

    def finish(self) -> None:
        self._exit(None)

    # pykka

    def on_start(self) -> None:
        try:
            self.on_begin()
        except BaseException as error:
            self._crash(error)
            return
        self.system.register(self.name, self.mailbox, self.generation)

    def on_receive(self, message: Any) -> Any:
        if self._has_exited:
            return
        try:
            if isinstance(message, _Asked):
                value = self.on_message(message.message)
                if isinstance(value, Deferred):
                    value.then(lambda good, v: self.system.answer(message, good, v))
                else:
                    self.system.answer(message, True, value)
            else:
                self.on_message(message)
        except BaseException as error:
            if isinstance(message, _Asked):
                self.system.answer(message, False, error)
            self._crash(error)

    def _crash(self, error: BaseException) -> None:
        logger.opt(exception=error).error("{} crashed", self.name)
        self._exit("".join(traceback.format_exception_only(error)).strip())

    def _exit(self, error: str | None) -> None:
        if self._has_exited:
            return
        self._has_exited = True
        try:
            self.on_end(error)
        except Exception:
            logger.exception("{}: on_end", self.name)
        self.system.unregister(self.name, self.generation, error is None)
        if self.supervisor:
            self.supervisor(Exited(self.name, self.generation, error))
        self.stop()
