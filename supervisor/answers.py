"""What comes back to an actor: answers to its requests, results of its work; and answers that are given later."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class Vital:
    """A message for which somebody would wait for ever: a full inbox takes it all the same, for there is one to each wait."""


@dataclass(frozen=True)
class Answer(Vital):
    """To the request with that number."""

    request: int
    value: Any


@dataclass(frozen=True)
class Refused(Vital):
    """The request has no answer: its handler failed or said no, or there is nobody of that name."""

    request: int
    error: str


@dataclass(frozen=True)
class Worked(Vital):
    """What the function that was given to the worker pool under `key` has returned."""

    key: Any
    value: Any


@dataclass(frozen=True)
class WorkFailed(Vital):
    """What it has raised."""

    key: Any
    error: Exception


class Deferred:
    """An answer that its actor gives later, once.  Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._settled: tuple[bool, Any] | None = None
        self._listener: Callable[[bool, Any], None] | None = None

    def set(self, value: Any) -> None:
        self._settle(True, value)

    def set_exception(self, error: Exception) -> None:
        """Refuse; the text of `error` is for who asked."""
        self._settle(False, error)

    def then(self, listener: Callable[[bool, Any], None]) -> None:
        """Call `listener(good, value or error)` once it is settled; at once when it is already."""
        with self._lock:
            self._listener = listener
            settled = self._settled
        if settled is not None:
            listener(*settled)

    def _settle(self, good: bool, value: Any) -> None:
        with self._lock:
            if self._settled is not None:
                return
            self._settled = (good, value)
            listener = self._listener
        if listener is not None:
            listener(good, value)


def refusal(text: str) -> Deferred:
    """The answer of a handler that says no; its actor goes on."""
    refused = Deferred()
    refused.set_exception(ValueError(text))
    return refused
