"""Real isolated processes behind an actor: started, heard, found hung, replaced, and given back."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from supervisor import worker
from supervisor.actor import Stop
from supervisor.channel import Channel
from supervisor.isolation import Isolation, IsolationError, Process
from supervisor.watch import Watcher
from supervisor.worker import LOOKS, Ended, Said, Started
from tests.supervisor.actors_under_test import TIMEOUT_S, Log, hold
from tests.supervisor.bosses import SILENCE_S, Boss, Bosses, pid
from tests.supervisor.descendants import ends
from tests.supervisor.processes_under_test import FROM_CHILD, Crash, Say
from tests.supervisor.programs_under_test import ENTRIES

PATIENT_S = 2.0  # what beats, or begins, is not silent for so long on a machine with much to do


@contextmanager
def busy(watcher: Watcher) -> Iterator[None]:
    """The watcher's thread hears nothing meanwhile."""
    entered, go = threading.Event(), threading.Event()
    here, there = Channel.pair(FROM_CHILD)
    watcher.channel(here, lambda message, descriptors: hold(entered, go)(None), lambda: None)  # type: ignore[arg-type]
    there.send(FROM_CHILD.encode(Say("listen to this")))
    assert entered.wait(TIMEOUT_S)
    yield
    go.set()
    watcher.forget(here.fileno())
    here.close()
    there.close()


def test_a_worker_is_started_heard_and_spoken_to(bosses: Bosses) -> None:
    boss = bosses("echo")
    assert boss.next() == Started("worker", 1)
    said = boss.next()
    assert (said.worker, said.generation, said.message.text, said.message.pid) == ("worker", 1, "hello", pid(boss))
    boss.mailbox(lambda boss: boss.worker.send(Say("again")))
    assert boss.next().message.text == "again"
    assert boss.log.silent


@pytest.mark.parametrize(
    ("do", "how"),
    [
        (lambda boss: boss.worker.kill(), "killed by signal 9"),
        (lambda boss: boss.worker.process.signal(signal.SIGSEGV), "killed by signal 11"),
        (lambda boss: boss.worker.send(Crash()), "exit code 1"),
    ],
    ids=["killed", "segmentation fault", "raises"],
)
def test_a_worker_that_dies_is_replaced(bosses: Bosses, do: Callable[[Boss], None], how: str) -> None:
    boss = bosses("echo", again=True)
    boss.log.take(2)
    first = pid(boss)
    boss.mailbox(do)
    assert boss.next() == Ended("worker", 1, how)
    assert boss.next() == Started("worker", 2)
    assert boss.next().message.pid == pid(boss) != first
    assert boss.worker.restarts == 1


def test_a_worker_s_last_words_come_before_its_end(bosses: Bosses, watcher: Watcher) -> None:
    """Also when both are found at once, and the words are more than are taken in one round."""
    with busy(watcher):
        boss = bosses("chatter", "200")
        assert boss.next() == Started("worker", 1)
        assert ends(pid(boss), TIMEOUT_S)
    assert [boss.next().message.text for _ in range(200)] == [str(number) for number in range(200)]
    assert boss.next() == Ended("worker", 1, "exit code 0")


def test_a_worker_that_cannot_be_started_has_ended(bosses: Bosses) -> None:
    tries = iter([True, False])

    def make(fork: Callable[[], Process]) -> Process:
        if next(tries):
            raise IsolationError("no process")
        return fork()

    boss = bosses("echo", again=True, make=make)
    assert boss.next() == Ended("worker", 1, "it could not be started: no process")
    assert boss.next() == Started("worker", 2)


# --- hung ---


def test_a_worker_that_is_stopped_is_found_by_its_silence_and_replaced(bosses: Bosses) -> None:
    boss = bosses("beat", heartbeat=True, again=True, silence_s=PATIENT_S)
    assert boss.next() == Started("worker", 1)
    assert boss.next() == Said("worker", 1, Say("beat"))
    first = pid(boss)
    os.kill(first, signal.SIGSTOP)
    assert boss.next_but_beats() == Ended("worker", 1, "killed by signal 9", hung=True)
    assert boss.next_but_beats() == Started("worker", 2)
    assert boss.next() == Said("worker", 2, Say("beat"))
    assert pid(boss) != first


def test_a_worker_that_hangs_says_where_before_it_is_killed(
    bosses: Bosses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "DUMP_S", 60.0)  # however long that takes it on this machine
    boss = bosses("outlive", heartbeat=True, silence_s=PATIENT_S)
    assert boss.next() == Started("worker", 1)
    assert boss.next() == Ended("worker", 1, f"killed by signal {signal.SIGABRT.value}", hung=True)
    log = (tmp_path / "log").read_text()
    assert "Fatal Python error: Aborted" in log
    assert "in outlive" in log


def test_a_worker_that_beats_is_left_alone(bosses: Bosses) -> None:
    boss = bosses("beat", heartbeat=True, silence_s=PATIENT_S)
    boss.looks.take(LOOKS + 2)
    assert boss.next_but_beats() == Started("worker", 1)
    boss.mailbox(lambda boss: boss.worker.kill())
    assert boss.next_but_beats() == Ended("worker", 1, "killed by signal 9")


def test_a_worker_that_promised_no_heartbeat_may_be_silent(bosses: Bosses) -> None:
    boss, later = bosses("outlive"), Log()
    assert boss.next() == Started("worker", 1)
    boss.system.timers.after(3 * SILENCE_S, lambda: later("now"))
    later.next()
    assert boss.log.silent
    assert boss.looks.silent


def test_a_worker_is_not_hung_because_nobody_listened(bosses: Bosses, watcher: Watcher) -> None:
    """The watcher is busy, as when it waits for a disk: what the worker said lies in its channel unread."""
    boss = bosses("beat", heartbeat=True, silence_s=PATIENT_S / 2)
    boss.looks.take(1)
    while not boss.log.silent:
        boss.next()
    assert boss.next() == Said("worker", 1, Say("beat"))  # heard since it was last looked at
    with busy(watcher):
        boss.looks.take(3 * LOOKS)  # at the first it had been heard, at the others it had not
    boss.looks.take(LOOKS)
    boss.mailbox(lambda boss: boss.worker.kill())
    assert boss.next_but_beats() == Ended("worker", 1, "killed by signal 9")


@pytest.mark.parametrize("entry", ["babble", "hang_up"])
def test_a_worker_that_can_be_heard_no_more_is_ended(bosses: Bosses, entry: str) -> None:
    boss = bosses(entry)
    assert boss.next() == Started("worker", 1)
    assert boss.next() == Ended("worker", 1, "killed by signal 9")


def test_a_worker_that_does_not_read_is_killed(bosses: Bosses) -> None:
    boss = bosses("outlive")
    assert boss.next() == Started("worker", 1)

    def flood(boss: Boss) -> None:
        for _ in range(1000):
            boss.worker.send(Say("x" * 1000))
            if boss.worker._hung:
                return

    boss.mailbox(flood)
    assert boss.next() == Ended("worker", 1, "killed by signal 9", hung=True)


# --- generations, and what is left behind ---


def test_words_of_an_earlier_process_are_dropped(bosses: Bosses) -> None:
    boss = bosses("echo", again=True)
    boss.log.take(2)
    boss.mailbox(lambda boss: boss.worker.kill())
    assert isinstance(boss.next(), Ended)
    assert boss.next() == Started("worker", 2)
    assert boss.next().generation == 2
    boss.mailbox(Said("worker", 1, Say("late")))
    boss.mailbox(Said("another worker", 2, Say("not mine")))
    boss.mailbox(lambda boss: boss.worker.send(Say("last")))
    assert boss.next().message.text == "last"


def test_nothing_is_heard_of_a_worker_that_was_let_go(bosses: Bosses) -> None:
    boss = bosses("beat")  # it talks on until it is killed

    def let_go(boss: Boss) -> int:
        process = boss.worker.process
        assert process is not None
        boss.worker.let_go()
        return process.pid

    assert boss.next() == Started("worker", 1)
    assert ends(boss.system.ask("boss", let_go, TIMEOUT_S), TIMEOUT_S)
    while not boss.log.silent:
        assert isinstance(boss.next(), Said)  # from before
    boss.mailbox(Said("worker", 1, Say("late")))
    boss.system.ask("boss", lambda boss: None, TIMEOUT_S)
    assert boss.log.silent


@pytest.mark.parametrize("alive", [False, True])
def test_an_actor_that_ends_kills_its_worker_or_leaves_it_alive(bosses: Bosses, alive: bool) -> None:
    boss = bosses("outlive")
    assert boss.next() == Started("worker", 1)
    process = pid(boss)
    boss.alive = alive
    boss.mailbox(Stop())
    assert boss.gone.wait(TIMEOUT_S)
    assert ends(process, 0.0 if alive else TIMEOUT_S) is not alive
    if alive:
        os.kill(process, signal.SIGKILL)


@pytest.mark.parametrize("alive", [False, True])
def test_a_worker_that_is_just_being_started_when_its_actor_ends_is_given_back(bosses: Bosses, alive: bool) -> None:
    """Its pidfd and channel are closed (`nothing_left` looks), and it is killed or left alive, like one that runs."""
    entered, go, made = threading.Event(), threading.Event(), Log()

    def make(fork: Callable[[], Process]) -> Process:
        entered.set()
        assert go.wait(TIMEOUT_S)
        process = fork()
        made(process.pid)
        return process

    boss = bosses("outlive", make=make)
    boss.alive = alive
    assert entered.wait(TIMEOUT_S)
    boss.mailbox(Stop())
    assert boss.gone.wait(TIMEOUT_S)
    go.set()
    (process,) = made.next()
    assert ends(process, 0.1 if alive else TIMEOUT_S) is not alive
    if alive:
        os.kill(process, signal.SIGKILL)


def test_a_worker_that_was_made_when_its_actor_ended_before_it_heard_is_given_back(bosses: Bosses) -> None:
    """The result lies in the inbox of an actor that handles its last message."""
    entered, go, made = threading.Event(), threading.Event(), Log()

    def make(fork: Callable[[], Process]) -> Process:
        assert entered.wait(TIMEOUT_S)
        process = fork()
        made(process.pid)
        return process

    boss = bosses("outlive", make=make)
    boss.mailbox(lambda boss: (entered.set(), go.wait(TIMEOUT_S)))
    (process,) = made.next()
    boss.mailbox(Stop())
    go.set()
    assert boss.gone.wait(TIMEOUT_S)
    assert ends(process, TIMEOUT_S)


def test_a_worker_is_adopted(bosses: Bosses, tmp_path: Path) -> None:
    boss = bosses("write", make=lambda fork: (_ for _ in ()).throw(IsolationError("none")))
    assert isinstance(boss.next(), Ended)
    process = Isolation(str(tmp_path / "forkserver.sock")).start("worker", f"{ENTRIES}:echo", Say("from before"), FROM_CHILD)
    boss.mailbox(lambda boss: boss.worker.adopt(process))
    assert boss.next().message.text == "from before"
    os.kill(process.pid, signal.SIGKILL)
    assert boss.next() == Ended("worker", 2, "killed by signal 9")
