"""One thread hears of every death and every message, in order, and of nothing that is not so."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from supervisor.channel import Channel
from supervisor.frames import Codec
from supervisor.watch import ROUND_MAX, Watcher
from tests.supervisor.actors_under_test import Log
from tests.supervisor.processes_under_test import Say

CODEC = Codec(Say)


class Sleeper:
    """A process that goes on until it is ended."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(["/bin/sleep", "60"])
        self.pidfd = os.pidfd_open(self.process.pid)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

    def wait_for_end(self) -> None:
        """It stays a zombie, and ends readable."""
        os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOWAIT)


@pytest.fixture
def sleeper() -> Iterator[Sleeper]:
    sleeper = Sleeper()
    yield sleeper
    sleeper.end()
    os.close(sleeper.pidfd)


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    here, there = Channel.pair(CODEC)
    other = Channel(there, CODEC)
    yield here, other
    here.close()
    other.close()


def put(log: Log, name: str) -> Any:
    return lambda message, descriptors: log(name, message.text, descriptors)


def test_the_end_of_a_process_is_told_once(watcher: Watcher, sleeper: Sleeper) -> None:
    log = Log()
    watcher.process(sleeper.pidfd, lambda: log("ended"))
    assert log.silent
    sleeper.process.kill()
    assert log.next() == ("ended",)
    second = Sleeper()
    watcher.process(second.pidfd, lambda: log("the second"))
    second.end()
    assert log.next() == ("the second",)
    assert log.silent
    os.close(second.pidfd)


def test_the_end_of_a_process_that_has_ended_already_is_told(watcher: Watcher, sleeper: Sleeper) -> None:
    log = Log()
    sleeper.end()
    watcher.process(sleeper.pidfd, lambda: log("ended"))
    assert log.next() == ("ended",)


def test_a_process_that_is_stopped_has_not_ended(watcher: Watcher, sleeper: Sleeper, pair: tuple[Channel, Channel]) -> None:
    log = Log()
    watcher.process(sleeper.pidfd, lambda: log("ended"))
    sleeper.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PIDFD, sleeper.pidfd, os.WSTOPPED)
    watcher.channel(pair[0], put(log, "said"), lambda: None)
    pair[1].send(Say("after it"))
    assert log.next() == ("said", "after it", [])
    assert log.silent
    watcher.forget(sleeper.pidfd)
    watcher.forget(pair[0].fileno())


def test_messages_arrive_in_order_with_their_descriptors_and_then_the_end(
    watcher: Watcher, pair: tuple[Channel, Channel]
) -> None:
    log = Log()
    here, there = pair
    watcher.channel(here, put(log, "said"), lambda: log("closed"))
    there.send(Say("one"))
    reader, writer = os.pipe()
    there.send(Say("two"), [writer])
    os.close(writer)
    assert log.next() == ("said", "one", [])
    _, text, (copy,) = log.next()
    assert text == "two"
    os.write(copy, b"through")
    assert os.read(reader, 10) == b"through"
    there.send(Say("three"))
    there.close()
    assert log.take(2) == [("said", "three", []), ("closed",)]
    os.close(copy)
    os.close(reader)


def test_a_peer_that_breaks_the_protocol_is_heard_no_more(
    watcher: Watcher, pair: tuple[Channel, Channel], logged: list[str]
) -> None:
    log = Log()
    here, there = pair
    watcher.channel(here, put(log, "said"), lambda: log("closed"))
    there.socket.send(b"garbage")
    assert log.next() == ("closed",)
    there.send(Say("it is sorry"))
    assert log.silent
    assert logged[0].startswith("a channel is closed, for its peer broke the protocol")


def test_what_was_forgotten_is_told_of_no_more(watcher: Watcher, sleeper: Sleeper, pair: tuple[Channel, Channel]) -> None:
    log = Log()
    watcher.process(sleeper.pidfd, lambda: log("ended"))
    watcher.forget(sleeper.pidfd)
    watcher.forget(sleeper.pidfd)  # no error
    sleeper.process.kill()
    sleeper.wait_for_end()
    watcher.channel(pair[0], put(log, "said"), lambda: None)
    pair[1].send(Say("after it"))
    assert log.next() == ("said", "after it", [])
    assert log.silent
    watcher.forget(pair[0].fileno())


def test_a_process_whose_pidfd_takes_a_dead_one_s_number_is_not_taken_for_dead(
    sleeper: Sleeper, pair: tuple[Channel, Channel]
) -> None:
    """In one round of events: a message, at which an actor closes the pidfd of a dead process, and that process's end."""
    watcher, log, dead = Watcher(), Log(), Sleeper()

    def arrived(message: Any, descriptors: list[int]) -> None:
        if message.text == "first":
            watcher.forget(dead.pidfd)
            os.dup2(sleeper.pidfd, dead.pidfd, inheritable=False)  # a new pidfd that got the number
            watcher.process(dead.pidfd, lambda: log("the living one has ended"))
        log(message.text)

    pair[1].send(Say("first"))
    dead.process.kill()
    dead.wait_for_end()
    watcher.channel(pair[0], arrived, lambda: None)
    watcher.process(dead.pidfd, lambda: log("the dead one has ended"))
    watcher.start()
    assert log.next() == ("first",)
    pair[1].send(Say("second"))
    assert log.next() == ("second",)  # a round later
    watcher.stop()
    dead.process.wait()
    os.close(dead.pidfd)


def test_a_channel_that_never_stops_speaking_does_not_drown_the_others(watcher: Watcher, pair: tuple[Channel, Channel]) -> None:
    log, heard = Log(), itertools.count()
    here, there = pair
    quiet_here, socket_there = Channel.pair(CODEC)
    quiet_there = Channel(socket_there, CODEC)

    def speaks_again(message: Any, descriptors: list[int]) -> None:
        if next(heard) < 100 * ROUND_MAX:  # that is for ever, for a watcher that takes all there is
            there.send(message)

    watcher.channel(here, speaks_again, lambda: None)
    watcher.channel(quiet_here, lambda message, descriptors: log(message.text, next(heard)), lambda: None)
    there.send(Say("speaks"))
    quiet_there.send(Say("has a word to say"))
    said_at = next(heard)
    text, heard_at = log.next()
    assert text == "has a word to say"
    assert heard_at - said_at <= 10 * ROUND_MAX
    watcher.forget(here.fileno())
    watcher.forget(quiet_here.fileno())
    quiet_here.close()
    quiet_there.close()


def test_last_words_are_all_that_lies_there(sleeper: Sleeper, pair: tuple[Channel, Channel]) -> None:
    """More than a round's: the process's end, which is known in the same round, comes after all of them."""
    watcher, log = Watcher(), Log()
    here, there = pair
    for number in range(2 * ROUND_MAX):
        there.send(Say(str(number)))
    there.close()
    sleeper.process.kill()
    sleeper.wait_for_end()

    def ended() -> None:
        watcher.last_words(here, put(log, "said"))
        log("ended")

    watcher.channel(here, put(log, "said"), lambda: None)
    watcher.process(sleeper.pidfd, ended)
    watcher.start()
    assert log.take(2 * ROUND_MAX) == [("said", str(number), []) for number in range(2 * ROUND_MAX)]
    assert log.next() == ("ended",)
    watcher.forget(here.fileno())
    watcher.last_words(here, put(log, "said"))  # nobody watches it: nothing
    watcher.stop()
    assert log.silent


def test_a_listener_that_fails_does_not_deafen_the_others(
    watcher: Watcher, sleeper: Sleeper, pair: tuple[Channel, Channel], logged: list[str]
) -> None:
    log = Log()

    def fail() -> None:
        raise RuntimeError("as it should")

    watcher.process(sleeper.pidfd, fail)
    watcher.channel(pair[0], put(log, "said"), lambda: log("closed"))
    sleeper.process.kill()
    sleeper.wait_for_end()
    pair[1].send(Say("still there"))
    assert log.next() == ("said", "still there", [])
    assert logged == ["a watcher's listener failed"]
    watcher.forget(pair[0].fileno())


def test_a_descriptor_that_is_none_is_an_error_of_who_asked(watcher: Watcher) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        watcher.process(9999, lambda: None)


def test_a_descriptor_that_can_be_read_is_told_once(watcher: Watcher) -> None:
    log = Log()
    reading, writing = os.pipe()
    watcher.readable(reading, lambda: log("readable"))
    assert log.silent
    os.write(writing, b"1")
    assert log.next() == ("readable",)
    os.write(writing, b"2")
    assert log.silent and not watcher.forget(reading)
    for end in (reading, writing):
        os.close(end)


def test_a_descriptor_that_is_forgotten_while_it_is_told_of_may_be_closed_at_once(watcher: Watcher, logged: list[str]) -> None:
    """And the next one that has its number is watched, and told of."""
    told = threading.Semaphore(0)
    switch_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # the two threads are to meet at every step
    try:
        for pause in range(5000):
            descriptor = os.eventfd(1)
            watcher.readable(descriptor, told.release)
            end_s = time.perf_counter() + pause % 100 * 2e-6
            while time.perf_counter() < end_s:
                pass
            forgotten = watcher.forget(descriptor)
            os.close(descriptor)
            assert forgotten or told.acquire(timeout=60)
    finally:
        sys.setswitchinterval(switch_s)
    assert logged == []
