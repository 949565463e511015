"""An answer that is given later arrives exactly once, whoever is faster."""

from __future__ import annotations

import threading

import pytest

from supervisor.answers import Deferred, refusal


def test_whoever_listens_first_hears_it_later() -> None:
    deferred, heard = Deferred(), []
    deferred.then(lambda good, value: heard.append((good, value)))
    assert heard == []
    deferred.set(7)
    assert heard == [(True, 7)]


def test_whoever_listens_late_hears_it_at_once() -> None:
    deferred, heard = Deferred(), []
    deferred.set(7)
    deferred.then(lambda good, value: heard.append((good, value)))
    assert heard == [(True, 7)]


def test_it_is_settled_once() -> None:
    deferred, heard = Deferred(), []
    deferred.then(lambda good, value: heard.append((good, value)))
    deferred.set(1)
    deferred.set(2)
    deferred.set_exception(ValueError("no"))
    assert heard == [(True, 1)]


def test_a_refusal_says_why() -> None:
    heard: list[tuple[bool, Exception]] = []
    refusal("not today").then(lambda good, value: heard.append((good, value)))
    (good, error) = heard[0]
    assert not good
    with pytest.raises(ValueError, match="not today"):
        raise error


def test_a_race_of_setters_and_a_listener_is_heard_once() -> None:
    for _ in range(200):
        deferred, heard = Deferred(), []
        start = threading.Barrier(3)

        def settle(value: int, deferred: Deferred = deferred, start: threading.Barrier = start) -> None:
            start.wait(60)
            deferred.set(value)

        threads = [threading.Thread(target=settle, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        start.wait(60)
        deferred.then(lambda good, value, heard=heard: heard.append((good, value)))
        for thread in threads:
            thread.join(60)
        assert heard in ([(True, 0)], [(True, 1)])
