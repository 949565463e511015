"""Real actors in real threads under everything at once: whatever happens to whom, each request is answered once, and all ends in order."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from loguru import logger

from supervisor.actor import Stop
from supervisor.answers import Deferred
from supervisor.exits import Exited
from supervisor.rules import EnsureChild, RestartChild, StartChild, State, TerminateChild, WhichChildren
from supervisor.spec import ChildSpec, Flags, Restart, Type
from supervisor.strategy import Strategy
from supervisor.system import System
from supervisor.tree import Supervisor
from tests.supervisor.actors_under_test import TIMEOUT_S, Log, Puppet, crash

ROUNDS = 400
PATIENCE_S = 60.0  # for machines on which much else runs


class Flaky(Puppet):
    """Every eleventh incarnation cannot begin, every seventh is ready only when a timer has come."""

    def on_begin(self) -> Deferred | None:
        super().on_begin()
        if self.generation % 11 == 0:
            raise OSError("not this time")
        if self.generation % 7 == 0:
            ready = Deferred()
            self.system.timers.after(0.002, lambda: ready.set(None))
            return ready
        return None


@pytest.fixture
def quiet() -> Iterator[None]:
    logger.disable("supervisor")
    yield
    logger.enable("supervisor")


@pytest.mark.parametrize("strategy", Strategy, ids=[strategy.value for strategy in Strategy])
@pytest.mark.parametrize("seed", range(3))
def test_a_storm(system: System, quiet: None, strategy: Strategy, seed: int) -> None:
    chance, log = random.Random(seed), Log()
    flags = Flags(intensity=None, backoff_s=(0.0, 0.001, 0.003), strategy=strategy)

    def leaf(name: str, restart: Restart) -> ChildSpec:
        return ChildSpec(name, lambda: Flaky(system, name, log), restart, shutdown_s=chance.choice([0, 5.0]))

    def inner() -> Supervisor:
        return Supervisor(system, "inner", [], flags)

    top = Supervisor(system, "top", [ChildSpec("inner", inner, type=Type.SUPERVISOR)], flags)
    exits: list[Exited] = []
    top.launch(next(system.generations), lambda message: exits.append(message) if isinstance(message, Exited) else None)
    assert top.begun.wait(TIMEOUT_S)
    names = [f"{where} {number}" for where in ("top", "inner") for number in range(4)]
    where = {name: name.split()[0] for name in names}
    for name in names:
        system.request(where[name], EnsureChild(leaf(name, chance.choice(list(Restart)))), log)

    asked: set[int] = set()
    answered: list[int] = []
    lock = threading.Lock()

    def answer(message: Any) -> None:
        with lock:
            answered.append(message.request)

    messages = [lambda puppet: puppet.generation, Puppet.finish, crash(ValueError("no")), crash(SystemExit("no"))]
    for _ in range(ROUNDS):
        name = chance.choice(names)
        what = chance.random()
        if what < 0.6:
            asked.add(system.request(name, chance.choice(messages), answer))
        elif what < 0.9:
            request = chance.choice(
                [
                    EnsureChild(leaf(name, Restart.PERMANENT)),
                    StartChild(leaf(name, chance.choice(list(Restart)))),
                    TerminateChild(name),
                    RestartChild(name),
                    WhichChildren(),
                ]
            )
            asked.add(system.request(where[name], request, answer))
        elif what < 0.95:
            system.tell("inner", EnsureChild(object()))  # type: ignore[arg-type]  # at which it crashes
        else:
            top.snapshot()

    # It is calm again: all that must be is there, and answers.
    for name in names:
        system.ask("top", EnsureChild(ChildSpec("inner", inner, type=Type.SUPERVISOR)), PATIENCE_S)
        ensure(system, where[name], EnsureChild(leaf(name, Restart.PERMANENT)))
    wait_until(lambda: all(row.state is State.RUNNING or row.state is State.DOWN for row in rows(system)))
    for row in rows(system):
        if row.type is Type.WORKER and row.state is State.RUNNING:
            assert_answers(system, where[row.id], row.id)
    top.mailbox(Stop())
    assert top.gone.wait(PATIENCE_S)
    wait_until(lambda: len(answered) >= len(asked))
    assert sorted(answered) == sorted(asked)
    assert len(exits) == 1
    wait_until(lambda: not any(thread.name.startswith(("Flaky", "Supervisor")) for thread in threading.enumerate()))


def assert_answers(system: System, supervisor: str, name: str) -> None:
    """Or it has ended for good meanwhile, for it was told to before, and had not come to that: then its supervisor knows."""
    try:
        assert system.ask(name, lambda puppet: puppet.name, PATIENCE_S) == name
    except RuntimeError:
        known = {row.id: row.state for row in ensure(system, supervisor, WhichChildren())}
        assert known.get(name, State.DOWN) is State.DOWN


def rows(system: System) -> list[Any]:
    return [row for name in ("top", "inner") for row in ensure(system, name, WhichChildren())]


def ensure(system: System, name: str, request: Any) -> Any:
    """Ask a supervisor that may just be on its way back."""
    for _ in range(int(PATIENCE_S / 0.01)):
        try:
            return system.ask(name, request, PATIENCE_S)
        except RuntimeError:
            threading.Event().wait(0.01)
    raise AssertionError(f"{name} does not come back")


def wait_until(holds: Any) -> None:
    for _ in range(int(PATIENCE_S / 0.01)):
        if holds():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it never is so")
